"""The command that ranks results of a protocol."""

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, place, print_json, say
from attnrobust.errors import InputError

commands = typer.Typer()


@commands.command()
def leaderboard(folder: o.ResultsFolder, out: o.PageOut = None, json: o.Json = False) -> int:
    """Rank results of bench --protocol: over the same inputs, by the median certified share of the norm."""
    if out is not None and out.suffix not in (".md", ".html"):
        raise InputError(f"--out {out}: give a page that ends in .md or .html")
    from attnrobust.reports.leaderboard import leaderboard as rank
    from attnrobust.reports.leaderboard import page, read_folder, tables
    from attnrobust.runs.storage.atomic import write_text

    board = rank(read_folder(folder))
    if out is not None:
        write_text(out, page(board, html=out.suffix == ".html"))
        say(f"wrote {place(out)}")
    if json:
        print_json(board.as_dict())
    else:
        for table in tables(board):
            console().print(table)
    return ExitCode.UNSOUND if any(line.unsound for group in board.groups for line in group.lines) else ExitCode.OK
