"""Tightness of the certificates: attack radius, certified radius per method, gap, seconds and memory of many cases.

    python benchmarks/tightness.py run --suite one-head --out results     # goes on where it stopped
    python benchmarks/tightness.py table --out results                    # Markdown, medians and worst
    python benchmarks/tightness.py plot --out results                     # gap against tolerance, one line per method

Every row compares all methods with the same attack on the same problem. Suites: see ``SUITES``.
"""

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure

import attnrobust as ar
from attnrobust.layers.model import Model, load_model
from attnrobust.threat import parse_threat

PASSAGES = Path(__file__).with_name("passages.txt")
LAYERS = range(6)
SEEDS = (0, 1, 2)
TOLERANCES = (0.01, 0.1, 1.0)


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
    "minilm-margin": tuple(_minilm(("margin",), (8, 16, 32, 64, 128), ("frobenius",))),
    "minilm-margin-threats": tuple(_minilm(("margin",), (16,), ("one", "any-token", "per-token", "per-token-linf"))),
    "minilm-displacement": tuple(_minilm(DISPLACEMENTS, (16, 64, 128), ("frobenius",))),
    "minilm-displacement-threats": tuple(_minilm(DISPLACEMENTS, (16,), ("one", "any-token", "per-token"))),
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
    """The layer's input for a run of words of a passage that gives exactly n tokens."""
    words = PASSAGES.read_text(encoding="utf-8").splitlines()[passage].split()
    name = _layer_name(index, projected=False)
    for start in range(len(words)):
        for count in range(max(1, n // 2 - 4), n - 1):  # two marks frame the text; a word gives one token or more
            if start + count > len(words):
                break
            tokens = _token_count(" ".join(words[start : start + count]))
            if tokens == n:
                text = " ".join(words[start : start + count])
                return _model().capture(name, [text])[0].measure.points
            if tokens > n:
                break
    raise ValueError(f"passage {passage} has no run of words with {n} tokens")


@cache
def _token_count(text: str) -> int:
    return len(_model().capture(_layer_name(0, projected=False), [text])[0].token_strings)


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
    """Attack and certify one case."""
    problem = problem_of(case)
    attack = ar.attack(problem, seed=0)
    with contextlib.suppress(OSError):  # not Linux: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    report = ar.certify(problem, methods=methods, seed=0)
    radii = {c.method: {"radius": c.radius, "seconds": c.seconds, "kind": str(c.kind)} for c in report.certificates}
    broken = [m for m, c in radii.items() if attack.radius < float(c["radius"]) * (1 - 1e-9)]
    return {
        "key": case.key, **asdict(case), "attack": attack.radius, "attack_seconds": attack.seconds,
        "certificates": radii, "peak_mib": _peak_mib(), "unsound": broken,
    }  # fmt: skip


def run(suite: str, out: Path, *, only: str, methods: list[str] | None, seconds: float) -> int:
    """Run the cases that are not in the results yet; stop after so many seconds."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{suite}.jsonl"
    done = {row["key"] for row in _rows(path)}
    todo = [case for case in SUITES[suite] if case.key not in done and only in case.key]
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


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


# ---- tables and the plot -------------------------------------------------------------------------------------------


def best(row: dict) -> tuple[str, float]:
    """Name and radius of the largest certificate."""
    name = max(row["certificates"], key=lambda method: row["certificates"][method]["radius"])
    return name, row["certificates"][name]["radius"]


def gap(row: dict, method: str | None = None) -> float:
    """Attack radius over certified radius, of one method or of the best."""
    radius = best(row)[1] if method is None else row["certificates"].get(method, {"radius": 0.0})["radius"]
    return row["attack"] / radius if radius > 0 else math.inf


def table(out: Path) -> str:
    """Markdown: one line per source, threat and goal; medians over lengths and seeds, and the worst."""
    lines = [
        "| source | threat | goal | n | rows | gap median | worst | by | s median | s worst | peak MiB |",
        "|" + "---|" * 11,
    ]
    groups: dict[tuple, list[dict]] = {}
    for path in sorted(out.glob("*.jsonl")):
        for row in _rows(path):
            groups.setdefault((row["source"], row["threat"], row["goal"], row["n"]), []).append(row)
    for (source, threat, goal, n), rows in groups.items():
        gaps = [gap(row) for row in rows]
        seconds = [row["certificates"][best(row)[0]]["seconds"] for row in rows]
        names = sorted({best(row)[0] for row in rows})
        peak = max((row["peak_mib"] or 0.0) for row in rows)
        lines.append(
            f"| {source} | {threat} | {goal} | {n} | {len(rows)} | {statistics.median(gaps):.3f} | {max(gaps):.3f} | "
            f"{', '.join(names)} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {peak:.0f} |"
        )
    return "\n".join(lines)


def plot(out: Path) -> Path:
    """Median gap of every method: against the tolerance (displacement) and against the number of tokens (margin)."""
    rows = [row for path in sorted(out.glob("*.jsonl")) for row in _rows(path) if row["threat"] == "frobenius"]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(ncols=2)
    panels = (
        ([r for r in rows if r["goal"] != "margin"], "goal", "tolerance, share of the output norm"),
        ([r for r in rows if r["goal"] == "margin" and r["source"].startswith("minilm")], "n", "tokens n (margin)"),
    )
    for axis, (part, by, label) in zip(axes, panels, strict=True):
        for method in sorted({m for row in part for m in row["certificates"]}):
            xs = sorted({float(row[by]) for row in part})
            ys = [statistics.median(gap(r, method) for r in part if float(r[by]) == x) for x in xs]
            axis.plot(xs, ys, marker="o", label=method)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="gap = attack radius / certified radius (median)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path = out / "gap.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "plot"))
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke")
    parser.add_argument("--out", type=Path, default=Path("tightness-results"))
    parser.add_argument("--only", default="", help="run only cases whose key holds this text")
    parser.add_argument("--methods", help="certificates, comma separated; default all")
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "run":
        methods = args.methods.split(",") if args.methods else None
        return run(args.suite, args.out, only=args.only, methods=methods, seconds=args.max_seconds)
    print(table(args.out) if args.action == "table" else plot(args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
