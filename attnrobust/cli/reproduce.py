"""The command that repeats an experiment of a paper."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, print_json, say
from attnrobust.errors import InputError
from attnrobust.text import shown

if TYPE_CHECKING:
    from attnrobust.reproduce.run import Outcome

commands = typer.Typer()

OUT = Path("attnrobust-reproduce")
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="The experiment; see --list.")]
Full = Annotated[bool, typer.Option("--full", help="The paper's sizes, where a CPU allows them: hours.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help=f"Default {OUT}/NAME; resumable.")]
Listed = Annotated[bool, typer.Option("--list", help="The experiments: paper, statement, minutes.")]


@commands.command()
def reproduce(
    name: Name = None,
    full: Full = False,
    out: Out = None,
    seed: o.Seed = 0,
    listed: Listed = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Repeat an experiment of a paper: table, figure, and what agrees with it."""
    if listed:
        _list(json)
        return ExitCode.OK
    if name is None:
        raise InputError("name an experiment; --list shows them")
    from attnrobust.reproduce.experiment import Setting, Size
    from attnrobust.reproduce.registry import experiment_named
    from attnrobust.reproduce.run import run_experiment

    experiment = experiment_named(name)
    setting = Setting(size=Size.FULL if full else Size.DEFAULT, seed=seed)
    directory = out if out is not None else OUT / (f"{name}-full" if full else name)
    outcome = run_experiment(
        experiment, directory, setting=setting, overwrite=overwrite, tell=(lambda _: None) if quiet else say
    )
    if json:
        verdicts = [asdict(verdict) | {"verdict": verdict.word} for verdict in outcome.verdicts]
        print_json({"experiment": name, "out": str(directory), "seconds": outcome.seconds, "verdicts": verdicts})
    else:
        _print(name, outcome)
    outcome.require_sound()
    return ExitCode.OK


def _list(json: bool) -> None:
    from attnrobust.reproduce.registry import EXPERIMENTS

    if json:
        for e in EXPERIMENTS:
            about = {"name": e.name, "paper": e.paper, "statement": e.statement}
            print_json(about | {"minutes": e.minutes[0], "minutes_full": e.minutes[1]})
        return
    from attnrobust.reports.layout import Column, lay_out, words

    lines = [(e.name, e.paper, e.statement, *(shown(float(m), 2) for m in e.minutes)) for e in EXPERIMENTS]
    minutes = [Column(title, right=True, fold=False) for title in ("minutes", "--full")]
    columns = [Column("name", fold=False), *words("paper", "statement"), *minutes]
    console().print(lay_out(columns, lines, title="experiments; minutes on one core, those of --full estimated"))


def _print(name: str, outcome: "Outcome") -> None:
    from attnrobust.reports.layout import lay_out, words

    stdout = console()
    lines = [(v.claim, v.paper, v.ours, v.word, v.reason) for v in outcome.verdicts]
    columns = words("statement", "paper", "measured", "verdict", "why")
    stdout.print(lay_out(columns, lines, title=f"{name}: what agrees with the paper"))
    stdout.print(f"{len(outcome.rows)} rows in {outcome.directory}: table.csv, table.md, figure.png, figure.svg")
