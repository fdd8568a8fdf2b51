"""The command that prints every Lipschitz bound of a layer."""

from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, print_json
from attnrobust.errors import InputError
from attnrobust.runs.early import refuse_unknown_names, require_there
from attnrobust.text import shown

if TYPE_CHECKING:
    from rich.table import Table

    from attnrobust.lipschitz.table import BoundsTable
    from attnrobust.tokens import TokenMeasure

commands = typer.Typer()

WIDEST_REGION, WIDEST_REASON = 28, 64
"""Characters, so that no table has more than a hundred columns."""


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
    require_there(model, texts=texts, tokens=tokens)
    refuse_unknown_names(threats=[threat])
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
    stdout = console()
    size = "" if table.epsilon is None else f"; finite moves of {shown(table.epsilon)} ({threat})"
    stdout.print(f"{title}: {table.n} tokens of width {table.width}, R = {shown(table.radius)}{size}")
    for part in (_upper(table), _lower(table), _conditions(table), _skipped(table)):
        if part is not None:
            stdout.print(part)


def _upper(table: "BoundsTable") -> "Table":
    """The bounds of each quantity below what is reached of it."""
    from rich.text import Text

    from attnrobust.reports.layout import Column, lay_out, numbers

    columns = [
        Column("bound"),
        *numbers("value", "ratio"),
        Column("kind", widest=19),
        Column("holds for", widest=WIDEST_REGION),
    ]
    lines: list[tuple[str | Text, ...]] = []
    seen = set[str]()
    for row in table.bounds:
        lower, quantity = table.best_lower(row.quantity), str(row.quantity)
        if quantity not in seen:
            found = (shown(lower.value), "1", "reached", lower.where) if lower is not None else ("-", "-", "", "")
            lines.append((Text(quantity, style="bold"), *found))
        seen.add(quantity)
        kind = str(row.kind) if row.failure_probability == 0 else f"{row.kind} {row.failure_probability:.0e}"
        ratio = "-" if row.ratio is None else shown(row.ratio)
        lines.append((f"  {row.name}", shown(row.value), ratio, kind, row.region))
    title = "Lipschitz bounds, the smallest first; above those of each quantity the largest value that is reached"
    return lay_out(columns, lines, title=title, new_section=[isinstance(line[0], Text) for line in lines])


def _lower(table: "BoundsTable") -> "Table | None":
    from attnrobust.reports.layout import Column, lay_out, numbers, words

    lows = [(str(row.quantity), row.name, shown(row.value), row.where) for row in table.lower_bounds]
    columns = [*words("quantity", "by"), *numbers("value"), Column("where", widest=WIDEST_REGION)]
    title = "lower bounds: values that are reached"
    return lay_out(columns, lows, title=title, sections=True) if lows else None


def _conditions(table: "BoundsTable") -> "Table":
    """What each bound asks of the layer, once."""
    from attnrobust.reports.layout import Column, lay_out

    lines = list(dict.fromkeys((row.name, row.conditions) for row in table.bounds))
    return lay_out([Column("bound"), Column("conditions", widest=WIDEST_REASON)], lines, title="what they ask for")


def _skipped(table: "BoundsTable") -> "Table | None":
    from attnrobust.reports.layout import Column, lay_out

    reasons = {entry.method: entry.reason for entry in reversed(table.skipped)}
    lines = list(reversed(reasons.items()))
    return (
        lay_out([Column("bound"), Column("why", widest=WIDEST_REASON)], lines, title="do not apply") if lines else None
    )
