"""The command that shows certified accuracy."""

from pathlib import Path
from typing import Annotated

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, print_json, say
from attnrobust.runs.early import require_results

commands = typer.Typer()

PlotFile = Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="Draw the curves there.")]


@commands.command()
def curve(
    directory: o.RunDirectory,
    epsilons: o.Epsilons = None,
    out: PlotFile = None,
    json: o.Json = False,
) -> int:
    """Certified accuracy of a run: the share of inputs certified, undecided and broken at each size."""
    require_results(directory)
    from attnrobust.cli.bench import parse_epsilons
    from attnrobust.reports.curve import curve_table, curves, scope_of
    from attnrobust.reports.data import read_report_data

    data = read_report_data(directory)
    if missing := max(0, data.planned - len(data.rows)):
        say(f"incomplete: {missing} of {data.planned} rows are not computed yet; the shares are of those that are")
    found = curves(data.rows, epsilons=None if epsilons is None else parse_epsilons(epsilons))
    for one in found:
        if json:
            print_json(one.as_dict())
        else:
            console().print(curve_table(one, scope=scope_of(data.rows, one)))
    if out is not None:
        from attnrobust.figure import png
        from attnrobust.reports.plots import curve_plot
        from attnrobust.runs.storage.atomic import require_writable_file, write_atomically

        require_writable_file(out, option="--out")
        write_atomically(out.parent, {out.name: png(*curve_plot(data.rows))})
    return ExitCode.OK
