"""The command that prints every Lipschitz bound of a layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from attnrobust.cli.compare import console, print_json
from attnrobust.cli.exits import ExitCode
from attnrobust.errors import InputError
from attnrobust.models.model import load_model
from attnrobust.reports.tables import shown
from attnrobust.runs.inputs import on_device, parse_device, read_inputs
from attnrobust.threats.parse import parse_move_threat

if TYPE_CHECKING:
    from attnrobust.lipschitz.table import BoundsTable
    from attnrobust.tokens import TokenMeasure

bounding = typer.Typer()


@bounding.command()
def bounds(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for compare.")],
    layer: Annotated[str | None, typer.Option(metavar="NAME", help="Layer, or a suffix; see list-layers.")] = None,
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: UTF-8 text, one a line.")] = None,
    tokens: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: arrays (n, d).")] = None,
    radius: Annotated[
        float | None, typer.Option(metavar="R", help="Radius of the ball of tokens; default the largest token norm.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", metavar="N", help="Token count, where there are no inputs.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(metavar="E", help="Size of finite moves around the input; default 1% of its norm.")
    ] = None,
    threat: Annotated[str, typer.Option(metavar="T", help="How finite moves are measured.")] = "frobenius",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    search: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps of ascent for lower bounds; default 40 if small, else 0."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON object an input on stdout.")] = False,
) -> int:
    """Every Lipschitz bound of a layer: value, region, conditions, kind, and its ratio to the best lower bound."""
    from attnrobust.lipschitz.table import bounds_table

    if (texts is not None or tokens is not None) and n is not None:
        raise InputError("the inputs say how many tokens there are; leave --n out")
    if texts is None and tokens is None and (radius is None or n is None):
        raise InputError("give the inputs by --texts FILE or --tokens FILE, or --radius R together with --n N")
    measured, place = parse_move_threat(threat), parse_device(device)
    loaded = load_model(model, device=place)
    name, network = loaded.resolve(layer).name, loaded.layer(layer)
    inputs: list[tuple[str | None, str | None, TokenMeasure | None]] = [(None, None, None)]
    if texts is not None or tokens is not None:
        captured = read_inputs(loaded, layer, texts=texts, tokens=tokens)
        inputs = [(c.id, c.text, c.measure) for c in captured]
    for identifier, text, measure in inputs:
        there = None if measure is None else _moved(measure, device)
        table = bounds_table(
            network, there, n=n, radius=radius, epsilon=epsilon, threat=measured, seed=seed, search=search
        )
        if json:
            asked = {"model": model, "layer_name": name, "input": identifier, "text": text, "threat": measured.key}
            print_json({**asked, "seed": seed, **table.as_dict()})
        else:
            _print(table, f"{model}, {name}" + ("" if identifier is None else f", {identifier}"), measured.key)
    return ExitCode.OK


def _moved(measure: "TokenMeasure", device: str) -> "TokenMeasure":
    from attnrobust.goals import Displacement

    return on_device(measure, Displacement(1.0), device)[0]


def _print(table: "BoundsTable", title: str, threat: str) -> None:
    stdout = console()
    size = "" if table.epsilon is None else f"; finite moves of {shown(table.epsilon)} ({threat})"
    stdout.print(f"{title}: {table.n} tokens of width {table.width}, R = {shown(table.radius)}{size}")
    lines = []
    for row in table.bounds:
        lower = table.best_lower(row.quantity)
        ratio = "-" if row.ratio is None else shown(row.ratio)
        found = "-" if lower is None else shown(lower.value)
        kind = str(row.kind) if row.failure_probability == 0 else f"{row.kind} {row.failure_probability:.0e}"
        lines.append((str(row.quantity), row.name, shown(row.value), found, ratio, kind, row.region, row.conditions))
    heading = ("quantity", "bound", "value", "best lower", "ratio", "kind", "region", "conditions")
    stdout.print(_table("Lipschitz bounds, the smallest first in each quantity", heading, lines))
    lows = [(str(row.quantity), row.name, shown(row.value), row.where) for row in table.lower_bounds]
    if lows:
        stdout.print(_table("lower bounds: values that are reached", ("quantity", "by", "value", "where"), lows))
    reasons = [(entry.method, entry.reason) for entry in table.skipped]
    if reasons:
        stdout.print(_table("do not apply", ("bound", "why"), reasons))


def _table(title: str, heading: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in heading:
        number = name in ("value", "best lower", "ratio")
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    previous = None
    for line in lines:
        if heading[0] == "quantity" and previous is not None and line[0] != previous:
            table.add_section()
        previous = line[0]
        table.add_row(*line)
    return table
