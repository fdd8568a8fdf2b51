"""Seconds, radii and memory of certificates of this checkout against another one, on the cases of ``tightness``.

    git worktree add ../before v1.0
    python -m benchmarks.speed_pairs --before ../before --set short
    python -m benchmarks.speed_pairs --before ../before --set page --out pairs.jsonl   # goes on where it stopped

Two processes, one per checkout and one thread each, answer the same case one after the other; seconds are those of the
process (CPU), so other work on the machine disturbs them little.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

Answer = dict[str, float]

SHORT = (
    *((f"{source}/n16/0/frobenius/margin", "margin-majorant") for source in ("d16", "d64")),
    ("d64/n16/0/per-token/margin", "margin-majorant"),
    *((f"minilm{layer}/n16/0/frobenius/margin", "margin-majorant") for layer in (0, 2, 5)),
    *((f"minilm{layer}/n64/0/frobenius/margin", "margin-majorant") for layer in (0, 2, 5)),
    *((f"minilm{layer}/n{n}/0/frobenius/0.1", "displacement") for n in (16, 64) for layer in (0, 2, 5)),
)
LONG = (("minilm2/n512/0/frobenius/margin", "margin-majorant"), ("minilm2/n512/0/frobenius/0.1", "displacement"))
METHOD_OF = {True: "margin-majorant", False: "displacement"}


def cases(name: str) -> tuple[tuple[str, str], ...]:
    """Cases and their certificates; "page" is every case of the tightness page."""
    if name == "page":
        return tuple(_page())
    return {"short": SHORT, "long": LONG, "smoke": SHORT[:1]}[name]


def _page() -> Iterator[tuple[str, str]]:
    from benchmarks.tightness import SUITES

    for suite, members in SUITES.items():
        for case in members if suite not in ("long", "smoke") else ():
            one = case.goal == "margin" and case.threat in ("one", "any-token")
            yield case.key, "margin-one-token" if one else METHOD_OF[case.goal == "margin"]


# ---- one checkout --------------------------------------------------------------------------------------------------


def serve() -> int:
    """Answer cases from the input, one line each, with the code of the present directory."""
    import torch

    import attnrobust as ar
    from benchmarks.tightness import SUITES, Case, problem_of

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for more than a second
    known = {case.key: case for suite in SUITES.values() for case in suite}
    for line in sys.stdin:
        key, method = json.loads(line)
        problem = problem_of(known.get(key) or _case(key, Case))
        with contextlib.suppress(OSError):  # not Linux: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start = time.process_time()
        found = ar.certify(problem, methods=[method], seed=0).certificates
        seconds = time.process_time() - start
        answer = {"seconds": seconds, "radius": found[0].radius if found else 0.0, "mib": _peak_mib()}
        answer["proofs"] = found[0].evaluations if found else 0
        print(json.dumps(answer), flush=True)
    return 0


def _case(key: str, make: type) -> object:
    source, n, seed, threat, goal = key.split("/")
    return make(source, int(n[1:]), int(seed), threat, goal)


def _peak_mib() -> float:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Checkout:
    """A process that answers cases with the code of one directory."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        script = str(Path(__file__).resolve())
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve"], cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def answer(self, key: str, method: str) -> Answer:
        """What the checkout measures at one case."""
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: PT018 - pipes
        self.process.stdin.write(json.dumps([key, method]) + "\n")
        self.process.stdin.flush()
        answer: Answer = json.loads(self.process.stdout.readline())
        return answer


# ---- both ----------------------------------------------------------------------------------------------------------


def compare(name: str, before: Path, out: Path | None, *, only: str, repeats: int, seconds: float) -> int:
    """Measure the cases on both sides and print the table."""
    old, new = Checkout(before.resolve()), Checkout(Path(__file__).resolve().parents[1])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done, start = {(row["key"], row["method"]) for row in rows}, time.perf_counter()
    print(HEADER, *(line_of(row) for row in rows), sep="\n")
    for key, method in cases(name):
        if (key, method) in done or only not in key or time.perf_counter() - start > seconds:
            continue
        pairs = [(old.answer(key, method), new.answer(key, method)) for _ in range(repeats)]
        row = {"key": key, "method": method}
        row |= {side: best([pair[k] for pair in pairs]) for k, side in enumerate(("before", "after"))}
        rows.append(row)
        print(line_of(row), flush=True)
        if out:
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    print(summary(rows))
    return 0


def best(answers: list[Answer]) -> Answer:
    """The fastest of several answers."""
    return min(answers, key=lambda answer: answer["seconds"])


HEADER = "| case | certificate | s before | s after | x | radius after / before | proofs | MiB |\n" + "|---" * 8 + "|"


def line_of(row: dict) -> str:
    """One line of the table."""
    old, new = row["before"], row["after"]
    return (
        f"| {row['key']} | {row['method']} | {old['seconds']:.2f} | {new['seconds']:.2f} "
        f"| {old['seconds'] / max(new['seconds'], 1e-9):.1f} | {ratio(row):.4f} "
        f"| {old['proofs']} -> {new['proofs']} | {old['mib']:.0f} -> {new['mib']:.0f} |"
    )


def ratio(row: dict) -> float:
    """Radius after over radius before; 1 where both are 0."""
    old, new = row["before"]["radius"], row["after"]["radius"]
    return new / old if old else float(new == old)


def summary(rows: list[dict]) -> str:
    """Smallest and median ratio of radii, and the ratio of all seconds."""
    if not rows:
        return "no case"
    ratios = [ratio(row) for row in rows]
    total = [sum(row[side]["seconds"] for row in rows) for side in ("before", "after")]
    return (
        f"{len(rows)} cases: radius smallest {min(ratios):.4f}, median {statistics.median(ratios):.4f}; "
        f"seconds {total[0]:.1f} -> {total[1]:.1f}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--set", choices=("smoke", "short", "long", "page"), default="short")
    parser.add_argument("--only", default="", help="only cases whose key holds this text")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results, one line a case")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    if args.serve:
        return serve()
    if args.before is None:
        parser.error("--before DIRECTORY is needed")
    return compare(args.set, args.before, args.out, only=args.only, repeats=args.repeats, seconds=args.max_seconds)


if __name__ == "__main__":
    raise SystemExit(main())
