"""The command that lets attacks compete."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode, exit_code
from attnrobust.cli.goals import one_goal
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.output import console, print_json, say
from attnrobust.cli.progress import tracked
from attnrobust.cli.protocol import bench_by_protocol
from attnrobust.errors import InputError
from attnrobust.runs.early import refuse_unknown_names, require_files
from attnrobust.text import exactly, shown

if TYPE_CHECKING:
    from rich.table import Table

    from attnrobust.runs.bench import AttackScore, Benchmark

commands = typer.Typer()

BENCH_OUT = Path("attnrobust-bench")
MOST_INPUTS = 20
"""Inputs with a line each; more are summarised alone."""


@commands.command()
def bench(
    model: o.ModelName,
    attacks: o.Attacks = None,
    protocol: o.ProtocolName = None,
    layer: o.Layers = None,
    at: o.Depths = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerance = None,
    readout: o.Readout = None,
    pool: o.Pool = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.Threats = None,
    epsilons: o.Epsilons = None,
    queries: o.Queries = None,
    seconds: o.Seconds = None,
    restarts: o.Restarts = None,
    steps: o.Steps = None,
    budget: o.Budgets = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    out: o.BenchOut = None,
    workers: o.Workers = 0,
    timeout: o.Timeout = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Let attacks compete on the same inputs: success, smallest radii, local optimality, queries, seconds."""
    if protocol is not None:
        measured = {
            "model": model, "layers": layer or None, "texts": texts, "images": images, "tokens": tokens,
            "dataset": dataset, "column": column, "execution": {"workers": workers},
        }  # fmt: skip
        fixed = {
            "--attacks": attacks, "--at": at or None, "--goal": goal, "--anchors": anchors, "--tolerance": tolerance,
            "--readout": readout, "--pool": pool, "--label": label, "--row": row, "--threat": threat or None,
            "--epsilons": epsilons, "--queries": queries, "--seconds": seconds, "--restarts": restarts,
            "--steps": steps, "--budget": budget or None, "--seed": seed or None,
            "--device": None if device == "cpu" else device, "--timeout": timeout,
        }  # fmt: skip
        return bench_by_protocol(protocol, measured, fixed, out=out, json=json, quiet=quiet)
    if attacks is None:
        raise InputError("name the attacks, as in --attacks token-moving,foolbox:DDN, or give --protocol standard")
    from attnrobust.runs.config import load_config

    counted = None if epsilons is None else parse_epsilons(epsilons)
    config = load_config(
        changes={
            "model": model, "layers": layer or None, "at": at or None, "texts": texts, "images": images,
            "tokens": tokens, "dataset": dataset, "column": column, "threats": threat or None,
            "goals": [one_goal(goal, anchors, tolerance, readout, pool, label, row)],
            "attack": {"restarts": restarts, "steps": steps, "queries": queries, "seconds": seconds},
            "seed": seed, "device": device, "output": out or BENCH_OUT,
            "execution": {"workers": workers, "timeout": timeout},
        }
    )  # fmt: skip
    require_files(config)
    names = o.split_names(attacks)
    for name in names:
        refuse_unknown_names(threats=(), attack=name)
    from attnrobust.runs.bench import bench as run_bench

    with stopping() as stop:
        found = run_bench(
            config,
            names,
            budgets=dict(parse_budget(text) for text in budget or ()),
            stop=stop,
            watch=lambda rows, total: tracked(rows, total, quiet=quiet, places=True),
        )
    scores = found.scores(counted)
    if json:
        print_json(found.to_dict(counted))
    else:
        for table in tables(found, scores):
            console().print(table)
    code = exit_code([row for rows in found.rows.values() for row in rows])
    if found.remaining:
        say(f"{found.remaining} rows are left; give the same command again to go on")
        return code or ExitCode.INTERRUPTED
    return code


def parse_epsilons(text: str) -> tuple[float, ...]:
    """Read positive numbers with commas between them.

    Raises:
        InputError: Anything else.
    """
    try:
        values = tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        values = ()
    if not values or not all(0.0 < value < float("inf") for value in values):
        raise InputError(f"--epsilons {text!r}: give positive numbers with commas, as in 0.1,0.2")
    return values


def parse_budget(text: str) -> tuple[str, dict[str, int | float]]:
    """Read ``NAME KEY=N ...``.

    Raises:
        InputError: Anything else.
    """
    name, *parts = text.split() or [""]
    values: dict[str, int | float] = {}
    try:
        for part in parts:
            key, number = part.split("=")
            values[key] = float(number) if key == "seconds" else int(number)
    except ValueError as error:
        raise InputError(f"--budget {text!r}: give a name and numbers, as in 'foolbox:DDN queries=500'") from error
    if not values:
        raise InputError(f"--budget {text!r}: give a name and numbers, as in 'foolbox:DDN queries=500'")
    return name, values


def tables(found: "Benchmark", scores: Sequence["AttackScore"]) -> Iterator["Table"]:
    """One table for each layer, threat and goal; and one of the radii if the inputs are few."""
    from attnrobust.reports.layout import lay_out, numbers, words

    for key in dict.fromkeys((s.layer, s.threat, s.goal) for s in scores):
        yield _score_table(", ".join(key), [s for s in scores if (s.layer, s.threat, s.goal) == key])
    winners = found.winners()
    if 0 < len(winners) <= MOST_INPUTS and len(found.attacks) > 1:
        lines = [
            (
                *(w.input_id, w.layer, w.threat, w.goal),
                *(shown(w.radii.get(a)) + ("*" if a in w.winners else " ") for a in found.attacks),
            )
            for w in winners
        ]
        columns = [*words("input", "layer", "threat", "goal"), *numbers(*found.attacks)]
        yield lay_out(columns, lines, title="smallest radius by input (* wins)")


def _score_table(title: str, scores: Sequence["AttackScore"]) -> "Table":
    from attnrobust.reports.layout import lay_out, numbers, words

    caption = "optimality: best known radius / its radius, 1 is best; medians over the inputs"
    epsilons = list(next((s.success for s in scores if s.success), {}))
    heading = ("wins", "found", *(f"<= {exactly(e)}" for e in epsilons))
    heading += ("median radius", "optimality", "worst", "queries", "s")
    lines = []
    for s in scores:
        ended = ", ".join(f"{count} {status}" for status, count in s.statuses.items())
        cells = [s.attack, f"{s.wins}", f"{s.found}/{s.rows}", *(f"{s.success.get(e, 0.0):.0%}" for e in epsilons)]
        cells += [shown(s.median_radius), shown(s.optimality, 3), shown(s.worst_optimality, 3)]
        lines.append((*cells, "-" if s.queries is None else f"{s.queries:.0f}", shown(s.seconds, 3), ended))
    columns = [*words("attack"), *numbers(*heading), *words("status")]
    return lay_out(columns, lines, title=title, caption=caption)
