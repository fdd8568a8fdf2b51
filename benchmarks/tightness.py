"""Tightness of the certificates: attack radius, certified radius per method, gap, seconds and memory of many cases.

    python -m benchmarks.tightness run --suite one-head --out results     # goes on where it stopped
    python -m benchmarks.tightness_page --out results                     # docs/tightness.md and its plot

Every row compares all methods with the same attack on the same problem. Suites: see ``SUITES``.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

import attnrobust as ar
from attnrobust.certify import METHODS
from attnrobust.models.model import Model, load_model
from attnrobust.threats.parse import parse_threat

PASSAGES = Path(__file__).with_name("passages.txt")
LAYERS = range(6)
SEEDS = (0, 1, 2)
TOLERANCES = (0.01, 0.1, 1.0)
LENGTHS = (8, 16, 32, 64, 128)
LONG = max(LENGTHS)  # tokens that one passage can give


@dataclass(frozen=True)
class Case:
    """One row: where the layer and the tokens come from, what may move, what must stay true.

    Args:
        source: "d16", "d64" (one head, random weights of variance 1/d) or "minilm0" to "minilm5".
        n: Tokens.
        seed: Random seed, or which passage.
        threat: Key of the threat; "one" means token n // 2.
        goal: "margin", or a relative tolerance of the displacement.
    """

    source: str
    n: int
    seed: int
    threat: str
    goal: str

    @property
    def key(self) -> str:
        """Identifier in the results."""
        return f"{self.source}/n{self.n}/{self.seed}/{self.threat}/{self.goal}"


def _one_head() -> Iterator[Case]:
    for threat in ("frobenius", "one", "any-token", "per-token", "per-token-linf"):
        for source in ("d16", "d64"):
            for n in (4, 8, 16, 32):
                yield from (Case(source, n, seed, threat, "margin") for seed in SEEDS)


def _minilm(goals: tuple[str, ...], lengths: tuple[int, ...], threats: tuple[str, ...]) -> Iterator[Case]:
    for n in lengths:
        for threat in threats:
            for layer in LAYERS:
                for goal in goals:
                    yield from (Case(f"minilm{layer}", n, seed, threat, goal) for seed in SEEDS)


DISPLACEMENTS = tuple(f"{tolerance:g}" for tolerance in TOLERANCES)
SUITES = {
    "one-head": tuple(_one_head()),
    "minilm-margin": tuple(_minilm(("margin",), LENGTHS, ("frobenius",))),
    "minilm-margin-threats": tuple(_minilm(("margin",), (16,), ("one", "any-token", "per-token", "per-token-linf"))),
    "minilm-displacement": tuple(_minilm(DISPLACEMENTS, LENGTHS, ("frobenius",))),
    "minilm-displacement-threats": tuple(_minilm(DISPLACEMENTS, (16,), ("one", "any-token", "per-token"))),
    "long": tuple(Case("minilm2", 512, 0, "frobenius", goal) for goal in ("margin", "0.01", "0.1")),
    "smoke": (Case("d16", 4, 0, "frobenius", "margin"), Case("minilm2", 8, 0, "frobenius", "0.1")),
}


# ---- problems ------------------------------------------------------------------------------------------------------


@cache
def _model() -> Model:
    return load_model("minilm")


@cache
def _layer(index: int, *, projected: bool) -> ar.Attention:
    return _model().layer(_layer_name(index, projected=projected))


def _layer_name(index: int, *, projected: bool) -> str:
    return f"encoder.layer.{index}.attention" + ("" if projected else ".self")


@cache
def _pretrained_tokens(index: int, n: int, passage: int) -> torch.Tensor:
    """The layer's input for a run of words of a passage (long ones: of several) that gives exactly n tokens."""
    passages = PASSAGES.read_text(encoding="utf-8").splitlines()
    words = " ".join(
        passages[(passage + k) % len(passages)] for k in range(1 if n <= LONG else 2 * len(passages))
    ).split()
    for start in range(len(words)):
        tail = words[start:]
        # More words, more tokens; two marks frame the text.
        count = bisect_left(range(len(tail) + 1), n, key=lambda length: _token_count(" ".join(tail[:length])))
        text = " ".join(tail[:count])
        if _token_count(text) == n:
            return _model().capture(_layer_name(index, projected=False), [text])[0].measure.points
    raise ValueError(f"passage {passage} has no run of words with {n} tokens")


@cache
def _token_count(text: str) -> int:
    if not text:
        return 0
    try:
        return len(_model().capture(_layer_name(0, projected=False), [text])[0].token_strings)
    except ar.InputError:  # longer than the model's positions
        return sys.maxsize


def problem_of(case: Case) -> ar.Problem:
    """Build the problem of a case."""
    threat = parse_threat(f"token:{case.n // 2}" if case.threat == "one" else case.threat)
    if case.source.startswith("minilm"):
        index = int(case.source.removeprefix("minilm"))
        layer = _layer(index, projected=case.goal == "margin")
        inputs = [_pretrained_tokens(index, case.n, (case.seed + k) % 3) for k in range(2)]
    else:
        d = int(case.source.removeprefix("d"))
        generator = torch.Generator().manual_seed(1000 * d + 10 * case.n + case.seed)
        weights = torch.randn(3, 1, d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        layer = ar.Attention(w_q=weights[0], w_k=weights[1], w_v=weights[2])
        inputs = list(torch.randn(2, case.n, d, generator=generator, dtype=torch.float64))
    goal: ar.Goal = (
        ar.Displacement(float(case.goal), relative=True) if case.goal != "margin" else _centroids(layer, inputs)
    )
    return ar.Problem(layer, ar.TokenMeasure(inputs[0]), threat, goal)


def _centroids(layer: ar.Attention, inputs: list[torch.Tensor]) -> ar.Margin:
    """Nearest-centroid readout of the mean output: the input's own pooled output against another input's."""
    centroids = torch.stack([layer(x).mean(dim=0) for x in inputs])
    return ar.Margin(weight=centroids, bias=-0.5 * centroids.square().sum(dim=1))


# ---- running -------------------------------------------------------------------------------------------------------


def _peak_mib() -> float | None:
    """Peak resident memory since the last reset (Linux); None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def run_case(case: Case, methods: list[str] | None) -> dict[str, object]:
    """Attack and certify one case; seconds are those of the process on one thread, whatever runs beside it."""
    problem = problem_of(case)
    start = time.process_time()
    attack = ar.attack(problem, seed=0)
    attack_seconds = time.process_time() - start
    with contextlib.suppress(OSError):  # not Linux: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    radii = {}
    for name in methods or [method.name for method in METHODS]:
        start = time.process_time()
        for c in ar.certify(problem, methods=[name], seed=0).certificates:
            radii[name] = {"radius": c.radius, "seconds": time.process_time() - start, "kind": str(c.kind)}
    broken = [m for m, c in radii.items() if attack.radius < float(c["radius"]) * (1 - 1e-9)]
    return {
        "key": case.key, **asdict(case), "attack": attack.radius, "attack_seconds": attack_seconds,
        "certificates": radii, "peak_mib": _peak_mib(), "unsound": broken,
    }  # fmt: skip


def run(suite: str, out: Path, *, only: str, methods: list[str] | None, seconds: float) -> int:
    """Run the cases that are not in the results yet; stop after so many seconds."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{suite}.jsonl"
    done = {row["key"] for row in rows_of(path)}
    todo = [case for case in SUITES[suite] if case.key not in done and only in case.key]
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for more than a second
    start, unsound = time.perf_counter(), 0
    with path.open("a", encoding="utf-8") as stream:
        for number, case in enumerate(todo, start=1):
            if time.perf_counter() - start > seconds:
                print(f"time is used up; {len(todo) - number + 1} cases are left, run the same command again")
                break
            row = run_case(case, methods)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            unsound += bool(row["unsound"])
            name, radius = best(row)
            print(
                f"[{number}/{len(todo)}] {case.key}: attack {row['attack']:.4g} {name} {radius:.4g} gap {gap(row):.3f}"
            )
    return 3 if unsound else 0


def rows_of(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def best(row: dict) -> tuple[str, float]:
    """Name and radius of the largest certificate."""
    name = max(row["certificates"], key=lambda method: row["certificates"][method]["radius"])
    return name, row["certificates"][name]["radius"]


def gap(row: dict, method: str | None = None) -> float:
    """Attack radius over certified radius, of one method or of the best."""
    radius = best(row)[1] if method is None else row["certificates"].get(method, {"radius": 0.0})["radius"]
    return row["attack"] / radius if radius > 0 else math.inf


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run",))
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke")
    parser.add_argument("--out", type=Path, default=Path("tightness-results"))
    parser.add_argument("--only", default="", help="run only cases whose key holds this text")
    parser.add_argument("--methods", help="certificates, comma separated; default all")
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = args.methods.split(",") if args.methods else None
    return run(args.suite, args.out, only=args.only, methods=methods, seconds=args.max_seconds)


if __name__ == "__main__":
    raise SystemExit(main())
