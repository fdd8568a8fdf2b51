"""Attacks on MiniLM's layers: what copies and splitting gain over moving, and how near the attack is to its optimum.

    python -m benchmarks.attack_gain --out results     # goes on where it stopped; writes the tables of docs/attacks.md

Suite "gain": token duplication (one copy, four copies) and mass splitting (halves; any shares) against moving alone.
Suite "optimum": the default attack, and foolbox DDN and L2 PGD with as many queries, against 50 restarts x 500 steps.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attnrobust.attacks import AttackBudget, MassSplitting, attack
from attnrobust.problem import Problem
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall
from benchmarks.tightness import LAYERS, Case, problem_of

PAGE = Path(__file__).parent.parent / "docs" / "attacks.md"
TOKENS = 16
GOALS = ("margin", "0.1")
PASSAGES = (0, 1, 2)
SMALL = AttackBudget(restarts=4, steps=30, rounds=2)
SPLIT = AttackBudget(restarts=2, steps=20, rounds=1)
LONG = AttackBudget(restarts=50, steps=500)
Values = dict[str, float]


# ---- measuring -----------------------------------------------------------------------------------------------------


def gain(problem: Problem) -> Values:
    """Radius of moving / radius with copies or splitting, each measured as the attack does (larger is better)."""
    longest = float(torch.linalg.vector_norm(problem.clean.points, dim=-1).max())
    values = {}
    for copies in (1, 4):
        values[f"copies{copies}"] = attack(replace(problem, threat=Copies(copies)), budget=SMALL).gain
    for name, fractions in (("halves", (0.5,)), ("any", None)):
        split = replace(problem, threat=CouplingBall(2, domain_radius=longest * (1 + 1e-9)))
        values[name] = attack(split, method=MassSplitting(fractions=fractions), budget=SPLIT).gain
    return values


def optimum(problem: Problem) -> Values:
    """Radii of the default attack, of foolbox at as many queries, and of the long run."""
    default = attack(problem)
    same = AttackBudget(queries=default.queries)
    values = {"default": default.radius, "queries": float(default.queries), "seconds": default.seconds}
    for name in ("foolbox:DDN", "foolbox:L2PGD"):
        values[name] = attack(problem, method=name, budget=same).radius
    long = attack(problem, budget=LONG, seed=1)
    return values | {"long": long.radius, "long_queries": float(long.queries)}


SUITES: dict[str, Callable[[Problem], Values]] = {"gain": gain, "optimum": optimum}


def run(suite: str, out: Path, *, seconds: float, tokens: int) -> int:
    """Measure what is not in the results yet; the number of cases that are left when the time is used up."""
    out.mkdir(parents=True, exist_ok=True)
    path, start = out / f"{suite}.jsonl", time.perf_counter()
    done = {(row["layer"], row["goal"], row["passage"]) for row in rows_of(path)}
    cases = [(layer, goal, passage) for passage in PASSAGES for goal in GOALS for layer in LAYERS]
    todo = [case for case in cases if case not in done]
    with path.open("a", encoding="utf-8") as stream:
        for number, (layer, goal, passage) in enumerate(todo):
            if time.perf_counter() - start > seconds:
                return len(todo) - number
            problem = problem_of(Case(f"minilm{layer}", tokens, passage, "frobenius", goal))
            row = {"layer": layer, "goal": goal, "passage": passage} | SUITES[suite](problem)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            print(f"[{number + 1}/{len(todo)}] {suite} {row}", flush=True)
    return 0


def rows_of(path: Path) -> list[dict]:
    """Finished rows."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- tables --------------------------------------------------------------------------------------------------------


def gain_table(rows: Sequence[dict]) -> list[str]:
    """Per goal and layer: median gain, smallest and largest."""
    names = ("copies1", "copies4", "halves", "any")
    lines = ["| goal | layer | inputs | one copy | four copies | splitting, halves | splitting, any shares |"]
    lines.append("|---|---|---|---|---|---|---|")
    for goal, layer, group in _groups(rows):
        cells = [_spread([row[name] for row in group]) for name in names]
        lines.append(f"| {goal} | {layer} | {len(group)} | " + " | ".join(cells) + " |")
    return lines


def optimum_table(rows: Sequence[dict]) -> list[str]:
    """Per goal and layer: radii relative to the best that any run found, largest over the inputs."""
    names = ("default", "foolbox:DDN", "foolbox:L2PGD", "long")
    lines = ["| goal | layer | inputs | default attack | foolbox DDN | foolbox L2 PGD | 50 x 500 | queries | s |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for goal, layer, group in _groups(rows):
        best = [min(row[name] for name in names) for row in group]
        worst = [max(row[name] / b for row, b in zip(group, best, strict=True)) for name in names]
        cells = [f"{value:.4f}" if value < 10 else "none" for value in worst]
        cost = f"{statistics.median(row['queries'] for row in group):.0f}"
        seconds = f"{statistics.median(row['seconds'] for row in group):.1f}"
        lines.append(f"| {goal} | {layer} | {len(group)} | " + " | ".join([*cells, cost, seconds]) + " |")
    return lines


def _groups(rows: Sequence[dict]) -> Iterable[tuple[str, int, list[dict]]]:
    for goal in GOALS:
        for layer in LAYERS:
            group = [row for row in rows if (row["goal"], row["layer"]) == (goal, layer)]
            if group:
                yield ("margin" if goal == "margin" else f"{float(goal):.0%}"), layer, group


def _spread(values: Sequence[float]) -> str:
    told = [f"{value:.3g}" if value < 1e6 else "0 radius" for value in sorted(values)]
    middle = told[len(told) // 2]
    return middle if told[0] == told[-1] else f"{middle} ({told[0]} to {told[-1]})"


def write_page(out: Path) -> None:
    """Put the tables between their marks in docs/attacks.md."""
    text = PAGE.read_text(encoding="utf-8")
    for suite, table in (("gain", gain_table), ("optimum", optimum_table)):
        begin, end = f"<!-- {suite} table -->\n", f"<!-- end of {suite} table -->"
        head, rest = text.split(begin)
        lines = table(rows_of(out / f"{suite}.jsonl"))
        text = head + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--suite", choices=tuple(SUITES), action="append", help="default all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="wall time of each suite")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of an input (a folder holds one length)")
    parser.add_argument("--no-page", action="store_true", help="leave docs/attacks.md as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    left = sum(
        run(suite, options.out, seconds=options.seconds, tokens=options.tokens) for suite in options.suite or SUITES
    )
    if not options.no_page:
        write_page(options.out)
    if left:
        print(f"{left} cases are left; run the same command again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
