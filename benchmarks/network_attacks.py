"""Attacks on a whole model's decision: radii against long runs and foolbox, seconds of a step, memory.

    python -m benchmarks.network_attacks radii out.jsonl --sentences 4 --depths 0 3 5
    python -m benchmarks.network_attacks digits out.jsonl --images 20
    python -m benchmarks.network_attacks steps out.jsonl
    python -m benchmarks.network_attacks memory out.jsonl --tokens 128 512
    python -m benchmarks.network_attacks show out.jsonl

The model is MiniLM as a classifier by its nearest anchor sentence, tokens moving where a block begins, or one of three
small vision transformers that are trained on digits here, patches moving at the embeddings. Every line is one
measurement, written when it is made; a second call leaves out what the file has. Radii of foolbox's DDN and L2 PGD are
at as many queries as the default attack spent (their restarts and steps are chosen for it); all of them are verified by
the same code.
"""

import argparse
import copy
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402 - the numerical libraries read the variables once

import attnrobust as ar  # noqa: E402
from attnrobust.attacks.search.evaluate import Evaluator  # noqa: E402
from tests.digits import SMALL, TRAINED, Recipe, images, trained  # noqa: E402

ANCHORS = ("The food was wonderful.", "The train was late again.", "Stocks fell sharply today.")
SENTENCES = (
    "Dinner tasted great.",
    "My bus is delayed by an hour because of the snow.",
    "Markets dropped.",
    "The waiter brought cold soup, and nobody said sorry.",
    "Shares of the railway company rose after the strike.",
    "We missed the last connection and slept in the station.",
    "The bread is baked here every morning.",
    "Interest rates will stay where they are.",
    "The ferry leaves at noon.",
    "Her cake won the first prize.",
    "The bank reported a small loss.",
    "There are no seats left on this flight.",
    "He cooks better than his father ever did.",
    "Oil became cheaper this week.",
    "The tram stops in front of the theatre.",
    "That pizza was burnt.",
    "Investors are worried about the new tax.",
    "A tree fell on the line near the bridge.",
    "The wine list is short but good.",
    "The currency lost a tenth of its value.",
)
LONG = ar.AttackBudget(restarts=50, steps=100, rounds=2)
TURNS = 5
FILLER = "The food was wonderful and the service quick, we will come back soon with all of our friends. "


def problem_of(model: Any, goal: ar.Margin, sentence: str, depth: int) -> ar.Problem:
    read = model.network(sentence, head="mean", at=f"block:{depth}")
    return ar.Problem(read.graph, read.input.measure, ar.FrobeniusBall(), goal)


# ---- radii -----------------------------------------------------------------------------------------------------------


def radii(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Default attack, long run, DDN and L2 PGD at equal queries."""
    model = ar.load_model("minilm")
    goal = ar.nearest_anchor_readout(model, ANCHORS)
    for index, sentence in enumerate(SENTENCES[: options.sentences]):
        for depth in options.depths:
            yield (
                f"radii/{index}/block:{depth}",
                lambda s=sentence, d=depth: _radii(problem_of(model, goal, s, d), options),  # type: ignore[misc]
            )


def digits(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The same for three vision transformers, on images that they were not trained on."""
    pixels, _ = images()
    for recipe in SMALL:
        name = f"digits/{recipe.blocks} blocks, {(8 // recipe.patch) ** 2} patches, {recipe.activation}"
        for index in range(options.first, options.first + options.images):
            image = pixels[TRAINED + index : TRAINED + index + 1]
            yield f"{name}/{index}", lambda r=recipe, i=image: _radii(digit_problem(r, i), options)  # type: ignore[misc]


def digit_problem(recipe: Recipe, image: torch.Tensor) -> ar.Problem:
    read = ar.read_network(trained(recipe), {"pixel_values": image})
    network, goal = read.decision()
    return ar.Problem(network, read.input.measure, ar.FrobeniusBall(), goal)


def _radii(problem: ar.Problem, options: argparse.Namespace) -> dict[str, Any]:
    own = _attacked(problem, "default", ar.AttackBudget())
    values = {"tokens": problem.clean.n, "norm": float(problem.clean.points.norm()), "default": own}
    values["DDN"] = _attacked(problem, "foolbox:DDN", ar.AttackBudget(restarts=8, steps=max(1, own["queries"] // 8)))
    share = max(1, own["queries"] // 24)  # three sizes, eight restarts
    values["L2PGD"] = _attacked(problem, "foolbox:L2PGD", ar.AttackBudget(restarts=8, steps=share, rounds=3))
    if options.long:
        values["long"] = _attacked(problem, "default", LONG)
    return values


def _attacked(problem: ar.Problem, method: str, budget: ar.AttackBudget) -> dict[str, Any]:
    start = time.process_time()
    result = ar.attack(problem, method=method, budget=budget)
    seconds = time.process_time() - start
    return {"radius": result.radius, "queries": result.queries, "seconds": seconds, "status": str(result.status)}


# ---- one step --------------------------------------------------------------------------------------------------------


def steps(_: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """One evaluation of the search beside forward and backward of the model's own encoder, in both precisions."""
    for tokens, rows in ((16, 8), (128, 2)):
        yield f"steps/{tokens}x{rows}", lambda n=tokens, r=rows: _step(n, r)  # type: ignore[misc]


def _step(tokens: int, rows: int) -> dict[str, Any]:
    model, problem = long_problem(tokens)
    encoder = model.module.encoder
    evaluator = Evaluator([problem], memory_bytes=1 << 30)
    moves = 0.01 * torch.randn(1, rows, *problem.clean.points.shape, dtype=torch.float64)
    target = torch.zeros(1, rows, dtype=torch.int64)
    runs: dict[str, Callable[[], object]] = {
        "step": torch.no_grad()(lambda: evaluator.shares_and_gradient(moves, target)),
        "float32": lambda: _forward_and_backward(single, problem.clean.points + moves[0], torch.float32),
        "float64": lambda: _forward_and_backward(encoder, problem.clean.points + moves[0], torch.float64),
    }
    single = copy.deepcopy(encoder).float()
    seconds = dict.fromkeys(runs, math.inf)
    for _ in range(TURNS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    ratios = {f"step/{name}": seconds["step"] / seconds[name] for name in ("float32", "float64")}
    return {"seconds": seconds, "searched in": str(evaluator.graphs[0].dtype), **ratios}


def _forward_and_backward(encoder: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype).requires_grad_(True)
    torch.autograd.grad(encoder(x)[0].sum(), x)


def long_problem(tokens: int) -> tuple[Any, ar.Problem]:
    model = ar.load_model("minilm")
    read = model.network(FILLER * max(1, min(tokens // 8, 25)), head="mean")
    points = read.input.measure.points
    points = torch.cat([points] * math.ceil(tokens / points.shape[0]))[:tokens]
    goal = ar.nearest_anchor_readout(model, ANCHORS)
    return model, ar.Problem(read.graph, ar.TokenMeasure(points), ar.FrobeniusBall(), goal)


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Largest memory of the process, before and after some steps of the attack; largest inputs last."""
    for tokens in sorted(options.tokens):
        yield f"memory/{tokens}", lambda n=tokens: _memory(n)  # type: ignore[misc]


def _memory(tokens: int) -> dict[str, Any]:
    _, problem = long_problem(tokens)
    _ = problem.resolved
    before = _peak()
    start = time.process_time()
    result = ar.attack(problem, budget=ar.AttackBudget(restarts=8, steps=2, rounds=1))
    seconds = time.process_time() - start
    return {"before": before, "peak": _peak(), "seconds": seconds, "queries": result.queries, "radius": result.radius}


def _peak() -> float:
    """Largest resident size so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- the file --------------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure(options: argparse.Namespace) -> None:
    """Every measurement that the file does not have."""
    done = {line["name"] for line in lines_of(options.out)}
    for name, run in {"radii": radii, "digits": digits, "steps": steps, "memory": memory}[options.what](options):
        if name not in done:
            values = {"name": name, **run()}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            print(json.dumps(values), flush=True)


def show(options: argparse.Namespace) -> None:
    """Radii relative to the smallest known one of each question; other lines as they are."""
    for line in lines_of(options.out):
        attacks = {key: value for key, value in line.items() if isinstance(value, dict) and "radius" in value}
        if not attacks:
            print(json.dumps(line))
            continue
        best = min(value["radius"] for value in attacks.values())
        shown = "  ".join(
            f"{key} {value['radius'] / best:.4f} ({value['queries']} queries, {value['seconds']:.1f} s)"
            for key, value in attacks.items()
        )
        print(f"{line['name']}: {best:.5g} of {line['norm']:.4g}: {shown}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network_attacks", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("radii", "digits", "steps", "memory", "show"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first image; 20 for images held out")
    parser.add_argument("--sentences", type=int, default=len(SENTENCES))
    parser.add_argument("--depths", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--long", action="store_true", help="the run with 50 restarts as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "show":
        show(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
