"""The command that prints every Lipschitz bound of a layer."""

from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, print_json
from attnrobust.errors import InputError
from attnrobust.text import shown

if TYPE_CHECKING:
    from attnrobust.lipschitz.table import BoundsTable
    from attnrobust.tokens import TokenMeasure

commands = typer.Typer()


@commands.command()
def bounds(
    model: o.ModelName,
    layer: o.Layer = None,
    texts: o.Texts = None,
    tokens: o.Tokens = None,
    radius: o.BallRadius = None,
    n: o.Count = None,
    epsilon: o.MoveSize = None,
    threat: o.ThreatKey = "frobenius",
    seed: o.Seed = 0,
    search: o.SearchSteps = None,
    device: o.Device = "cpu",
    json: o.Json = False,
) -> int:
    """Every Lipschitz bound of a layer: value, region, conditions, kind, and its ratio to the best lower bound."""
    if (texts is not None or tokens is not None) and n is not None:
        raise InputError("the inputs say how many tokens there are; leave --n out")
    if texts is None and tokens is None and (radius is None or n is None):
        raise InputError("give the inputs by --texts FILE or --tokens FILE, or --radius R together with --n N")
    from attnrobust.lipschitz.table import bounds_table
    from attnrobust.models.model import load_model
    from attnrobust.runs.inputs import parse_device, read_inputs
    from attnrobust.threats.parse import parse_move_threat

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
    from attnrobust.runs.inputs import on_device

    return on_device(measure, Displacement(1.0), device)[0]


def _print(table: "BoundsTable", title: str, threat: str) -> None:
    from attnrobust.reports.layout import Column, lay_out, words

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
    values = [Column(name, right=True, fold=False) for name in ("value", "best lower", "ratio")]
    columns = [*words("quantity", "bound"), *values, *words("kind", "region", "conditions")]
    heading = "Lipschitz bounds, the smallest first in each quantity"
    stdout.print(lay_out(columns, lines, title=heading, sections=True))
    lows = [(str(row.quantity), row.name, shown(row.value), row.where) for row in table.lower_bounds]
    if lows:
        columns = [*words("quantity", "by"), values[0], *words("where")]
        stdout.print(lay_out(columns, lows, title="lower bounds: values that are reached", sections=True))
    reasons = [(entry.method, entry.reason) for entry in table.skipped]
    if reasons:
        stdout.print(lay_out(words("bound", "why"), reasons, title="do not apply"))
