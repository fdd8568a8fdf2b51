"""The command about smoothed decisions."""

from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.compare import one_place
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.goals import one_goal
from attnrobust.cli.output import console, print_json
from attnrobust.cli.progress import tracked
from attnrobust.errors import InputError
from attnrobust.runs.early import require_files
from attnrobust.runs.reading import DEFAULT_ATTACK

if TYPE_CHECKING:
    from attnrobust.runs.smoothed import SmoothedRow

commands = typer.Typer()


@commands.command()
def smooth(
    model: o.ModelName,
    sigma: o.Sigma,
    layer: o.Layer = None,
    at: o.At = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    readout: o.Readout = None,
    pool: o.Pool = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.ThreatKey = "frobenius",
    samples: o.Samples = 2000,
    failure_probability: o.FailureProbability = 1e-3,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Another model, the majority decision under Gaussian noise on the tokens: certified and attacked."""
    if goal not in ("decision", "nearest") and readout is None:
        raise InputError("smoothing is about a decision; give --goal decision or nearest with --at, or --readout")
    asked = one_goal(goal, anchors, None, readout, pool, label, row)
    config = one_place(
        model, layer, at, {"texts": texts, "images": images, "tokens": tokens, "dataset": dataset, "column": column},
        threat, seed, device, goal=asked,
        certificates=(), attack={"method": DEFAULT_ATTACK},
    )  # fmt: skip
    require_files(config)
    from attnrobust.runs.smoothed import smoothed_rows
    from attnrobust.runs.work import Workbench
    from attnrobust.smoothing.record import Smoothing

    smoothing = Smoothing(sigma, samples=samples, failure_probability=failure_probability)
    bench = Workbench(config)
    bench.refuse_hopeless()
    rows = []
    for one in tracked(smoothed_rows(bench, smoothing), len(bench.items()), quiet=quiet):
        rows.append(one)
        if json:
            print_json(one.as_dict())
    if not json:
        _print(rows, smoothing.key)
    return ExitCode.OK


def _print(rows: list["SmoothedRow"], title: str) -> None:
    from attnrobust.reports.smoothed import smoothed_table

    console().print(smoothed_table(rows, title=title))
