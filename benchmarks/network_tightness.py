"""Gaps of whole-network certificates: attack radius over certified radius, on MiniLM and small random networks.

    python benchmarks/network_tightness.py --out rows.jsonl --blocks 0:1 --tokens 8 --tolerances 1% 10%

One row per question, appended to a JSON-lines file; rows that are there already are skipped. One preparation serves all
tolerances of a part of the network. ``benchmarks/network_tightness_page.py`` makes the page of the rows.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import attnrobust as ar
from attnrobust.certify.network.composite.bound import DisplacementBound
from attnrobust.certify.network.composite.margin import MarginBound
from attnrobust.certify.network.composite.method import NetworkCompositeLarge
from attnrobust.certify.network.composite.recursion import Parts
from attnrobust.certify.radius import largest_radius

TEXT = "My grandmother kept every letter in a biscuit tin, and after she died we read them all on one long afternoon."
ANCHORS = ("The food was wonderful.", "The train was late again.", "We read old letters together.")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", default="0:1", help="first:last of the part that is certified, such as 0:6")
    parser.add_argument("--tokens", type=int, default=8, help="length of the text with its special tokens")
    parser.add_argument("--tolerances", nargs="*", default=["1%", "10%"])
    parser.add_argument("--decision", action="store_true", help="the nearest of three anchors, from the first block on")
    parser.add_argument("--sketch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack-steps", type=int, default=60)
    parser.add_argument("--one-metric", action="store_true", help="without the nodes' own metrics: half the time")
    options = parser.parse_args()
    done = _done(options.out)
    for row in _rows(options, done):
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=1), flush=True)


def _done(path: Path) -> set[str]:
    return {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()


def _rows(options: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    first, last = map(int, options.blocks.split(":"))
    model = ar.load_model("minilm")
    read = _read(model, options)
    depths = read.graph.depths()
    clean = read.graph.states(read.input.measure.points, keep=(depths[first],))[depths[first]]
    stop = read.graph.output if options.decision or last >= len(depths) else depths[last]
    graph = read.graph.part(depths[first], stop)
    goals: list[Any] = list(options.tolerances)
    if options.decision:
        goals = [ar.nearest_anchor_readout(model, ANCHORS)]
    base: Any = None
    for goal in goals:
        name = "decision" if options.decision else goal
        metrics = "one-metric" if options.one_metric else "own-metrics"
        key = f"minilm {options.blocks} n={options.tokens} s={options.sketch} {metrics} seed={options.seed} {name}"
        if key in done:
            continue
        problem = ar.Problem(graph, ar.TokenMeasure(clean), ar.FrobeniusBall(), goal)
        start = time.perf_counter()
        method = NetworkCompositeLarge()
        type(method).sketch, type(method).own_metrics = options.sketch, not options.one_metric
        if base is None:
            base = method.prepare(problem, seed=options.seed)
            _ = base.usage(0.1 * (base.first_guess or 1.0))  # everything that does not depend on the radius
        bound = replace(base, problem=problem)
        prepared = time.perf_counter() - start
        radius, evaluations = largest_radius(_usage(bound), first_guess=bound.first_guess)
        certified = time.perf_counter() - start - prepared
        attack = _attack(problem, bound, steps=options.attack_steps)
        yield {
            "key": key, "certified": radius, "attack": attack, "gap": attack / radius if radius else None,
            "slope": _slope(bound), "linear": _linear(bound, radius),
            "clean norm": float(torch.linalg.vector_norm(clean)),
            "prepared_s": round(prepared, 1), "search_s": round(certified, 1), "evaluations": evaluations,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "failure": bound.failure_probability, "parts": _parts(bound, radius),
        }  # fmt: skip


def _read(model: Any, options: argparse.Namespace) -> Any:
    """The network at the longest beginning of the text that has at most the wanted number of tokens."""
    words, head = TEXT.split(), "mean" if options.decision else "states"
    for count in range(len(words), 0, -1):
        read = model.network(" ".join(words[:count]), head=head)
        if read.input.measure.n <= options.tokens:
            return read
    raise SystemExit(f"no beginning of the text has {options.tokens} tokens")


def _parts(bound: DisplacementBound | MarginBound, radius: float) -> dict[str, Any]:
    """What binds a little beyond the certified radius: at the readout (of every class) and at the ports."""
    recursion = bound.preparation.recursion(1.05 * radius)
    norms = [drop.norms for drop in bound.classes] if isinstance(bound, MarginBound) else [bound.preparation.readout]
    shown = {name: _numbers(parts) for name, parts in recursion.parts.items()}
    return {"readout": [_numbers(recursion.at(each)) for each in norms], **shown}


def _usage(bound: DisplacementBound | MarginBound) -> Callable[[float], float]:
    return lambda radius: bound.usage(radius).value


def _slope(bound: DisplacementBound | MarginBound) -> float | list[float]:
    return [drop.slope for drop in bound.classes] if isinstance(bound, MarginBound) else bound.preparation.first


def _linear(bound: DisplacementBound | MarginBound, radius: float) -> float:
    """The largest share of a budget that the first order uses."""
    slopes = [drop.slope for drop in bound.classes] if isinstance(bound, MarginBound) else [bound.preparation.first]
    budgets = bound.problem.resolved.budgets.tolist()
    share: float = max(slope / budget for slope, budget in zip(slopes, budgets, strict=True))
    return radius * bound.factor * share


def _numbers(parts: Parts) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in vars(parts).items()}


def _attack(problem: ar.Problem, bound: DisplacementBound | MarginBound, *, steps: int) -> float:
    """Ascent of the usage from the top direction on growing and shrinking spheres; the smallest violating radius."""
    best = float("inf")
    guess = bound.first_guess or 1.0
    preparation = bound.preparation
    for sign in (1.0, -1.0):
        move = sign * _direction(preparation)
        radius = 2.0 * guess
        for _ in range(steps):
            move = move.detach().requires_grad_(True)
            usage = problem.usage(radius * move)
            (gradient,) = torch.autograd.grad(usage, move)
            value = float(usage.detach())
            if value >= 1.0:
                best = min(best, radius)
            radius = min(radius / max(value, 1e-3) ** 0.9 * 1.0005, 50.0 * guess)
            move = gradient / torch.linalg.vector_norm(gradient)
    return best


def _direction(preparation: Any) -> torch.Tensor:
    record, readout = preparation.record, preparation.output
    start = torch.Generator().manual_seed(0)
    move = torch.randn(preparation.moves.size, dtype=torch.float64, generator=start)
    for _ in range(12):
        image = record.push({record.wiring.source: preparation.moves.tokens(move)}, readout.states)
        back = record.pull(readout.cotangents(readout.flat(image)), (record.wiring.source,))
        move = preparation.moves.flat(back[record.wiring.source])
        move = move / torch.linalg.vector_norm(move)
    tokens: torch.Tensor = preparation.moves.tokens(move)
    return tokens


if __name__ == "__main__":
    main()
