"""The commands together, and the entry of the console script."""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from attnrobust import __version__
from attnrobust.cli import (
    bench,
    bounds,
    compare,
    curve,
    demo,
    fixed_point,
    leaderboard,
    listing,
    reproduce,
    runs,
    scan,
    smooth,
)
from attnrobust.cli.exits import guarded
from attnrobust.cli.output import GIVEN, print_without_failing

app = typer.Typer(
    name="attnrobust",
    help="Attack and certify attention layers, input by input: certified radius <= robust radius <= attack radius.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 below --fail-under, 2 wrong usage or input, 3 an UNSOUND row. "
    "Words (threat, goal, radius, gap, kind): docs/glossary.md.",
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"attnrobust {__version__}")
        raise typer.Exit
    return wanted


VERBOSE = ("--verbose", "-v")
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]
Verbose = Annotated[bool, typer.Option(*VERBOSE, help="Tracebacks of failed rows on stderr; anywhere.")]


@app.callback()
def _common(
    version: Version = False,  # noqa: ARG001 - its callback does the work
    verbose: Verbose = False,
) -> None:
    if verbose:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("attnrobust").setLevel(logging.DEBUG)


_MODULES = (listing, compare, curve, demo, runs, scan, bench, leaderboard, smooth, bounds, fixed_point, reproduce)
for _module in _MODULES:
    app.registered_commands.extend(_module.commands.registered_commands)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None means those of the process.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if arguments is None else arguments
    GIVEN.set(tuple(given))
    return guarded(lambda: app(args=verbose_first(given), prog_name="attnrobust", standalone_mode=False))


def verbose_first(arguments: Sequence[str]) -> list[str]:
    """``-v`` and ``--verbose`` may stand anywhere before ``--``."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    asked = [word for word in given[:end] if word in VERBOSE]
    return asked + [word for i, word in enumerate(given) if i >= end or word not in VERBOSE]


def main() -> NoReturn:
    """Entry of the console script; ends the process with the exit code."""
    print_without_failing()
    raise SystemExit(run())
