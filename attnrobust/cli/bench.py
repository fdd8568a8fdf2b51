"""The command that lets attacks compete."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attnrobust.cli.compare import console, print_json
from attnrobust.cli.exits import ExitCode, exit_code, say
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.progress import tracked
from attnrobust.errors import InputError
from attnrobust.reports.tables import shown

if TYPE_CHECKING:
    from attnrobust.runs.bench import AttackScore, Benchmark

benching = typer.Typer()

BENCH_OUT = Path("attnrobust-bench")
MOST_INPUTS = 20
"""Inputs with a line each; more are summarised alone."""

Budget = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="'NAME KEY=N ...'", help="Of one attack: restarts, steps, queries, seconds."),
]


@benching.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for compare.")],
    attacks: Annotated[str, typer.Option(metavar="A,B,C", help="The attacks, as for attack --method.")],
    layer: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Name, suffix or glob; repeatable.")] = None,
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: UTF-8 text, one a line.")] = None,
    tokens: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: arrays (n, d).")] = None,
    tolerance: Annotated[str | None, typer.Option(metavar="X", help="As for compare.")] = None,
    readout: Annotated[Path | None, typer.Option(metavar="FILE", help="As for compare.")] = None,
    pool: Annotated[str | None, typer.Option(metavar="P", help="As for compare.")] = None,
    label: Annotated[int | None, typer.Option(metavar="CLASS", help="As for compare.")] = None,
    threat: Annotated[list[str] | None, typer.Option(metavar="T", help="As for compare; repeatable.")] = None,
    epsilons: Annotated[
        str | None, typer.Option(metavar="R,R", help="Where success is counted; default around the best radii.")
    ] = None,
    queries: Annotated[int | None, typer.Option(metavar="N", help="Most forward evaluations of one input.")] = None,
    seconds: Annotated[float | None, typer.Option(metavar="S", help="Most wall time of one input.")] = None,
    restarts: Annotated[int | None, typer.Option(metavar="N", help="Starting points.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of a round.")] = None,
    budget: Budget = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Rows, one run for each attack; resumable.")] = BENCH_OUT,
    workers: Annotated[int, typer.Option(metavar="N", help="Worker processes; 0 works in this process.")] = 0,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Ends a row that hangs; needs workers.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Let attacks compete on the same inputs: success, smallest radii, local optimality, queries, seconds."""
    from attnrobust.runs.bench import bench as run_bench
    from attnrobust.runs.config import load_config

    at = None if epsilons is None else parse_epsilons(epsilons)
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    changes: dict[str, Any] = {
        "model": model,
        "layers": layer or None,
        "texts": texts,
        "tokens": tokens,
        "threats": threat or None,
        "goals": [{"tolerance": tolerance, "readout": readout, "pool": pool, "label": label}],
        "attack": {"restarts": restarts, "steps": steps, "queries": queries, "seconds": seconds},
        "seed": seed,
        "device": device,
        "output": out,
        "execution": {"workers": workers, "timeout": timeout},
    }
    config = load_config(changes=changes)
    with stopping() as stop:
        found = run_bench(
            config,
            names,
            budgets=dict(parse_budget(text) for text in budget or ()),
            stop=stop,
            watch=lambda rows, total: tracked(rows, total, quiet=quiet),
        )
    scores = found.scores(at)
    if json:
        print_json(as_values(found, scores))
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


def as_values(found: "Benchmark", scores: Sequence["AttackScore"]) -> dict[str, Any]:
    """Everything for JSON: scores, and the radii input by input."""
    return {
        "attacks": list(found.attacks),
        "remaining": found.remaining,
        "scores": [asdict(s) | {"success": [{"epsilon": e, "share": v} for e, v in s.success.items()]} for s in scores],
        "inputs": [asdict(winner) for winner in found.winners()],
    }


def tables(found: "Benchmark", scores: Sequence["AttackScore"]) -> Iterator[Table]:
    """One table for each layer, threat and goal; and one of the radii if the inputs are few."""
    for key in dict.fromkeys((s.layer, s.threat, s.goal) for s in scores):
        yield _score_table(", ".join(key), [s for s in scores if (s.layer, s.threat, s.goal) == key])
    winners = found.winners()
    if 0 < len(winners) <= MOST_INPUTS and len(found.attacks) > 1:
        table = Table(title="smallest radius by input (* wins)", title_justify="left")
        for place, name in enumerate(("input", "layer", "threat", "goal", *found.attacks)):
            table.add_column(name, justify="right" if place >= 4 else "left", overflow="fold")
        for w in winners:
            cells = [shown(w.radii.get(a)) + ("*" if a in w.winners else " ") for a in found.attacks]
            table.add_row(w.input_id, w.layer, w.threat, w.goal, *cells)
        yield table


def _score_table(title: str, scores: Sequence["AttackScore"]) -> Table:
    caption = "optimality: best known radius / its radius, 1 is best; medians over the inputs"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    epsilons = list(next((s.success for s in scores if s.success), {}))
    heading = ("attack", "wins", "found", *(f"<= {shown(e)}" for e in epsilons))
    heading += ("median radius", "optimality", "worst", "queries", "s", "status")
    for name in heading:
        table.add_column(name, justify="left" if name in ("attack", "status") else "right", overflow="fold")
    for s in scores:
        told = ", ".join(f"{count} {status}" for status, count in s.statuses.items())
        cells = [s.attack, f"{s.wins}", f"{s.found}/{s.rows}", *(f"{s.success.get(e, 0.0):.0%}" for e in epsilons)]
        cells += [shown(s.median_radius), shown(s.optimality, 3), shown(s.worst_optimality, 3)]
        table.add_row(*cells, "-" if s.queries is None else f"{s.queries:.0f}", shown(s.seconds, 3), told)
    return table
