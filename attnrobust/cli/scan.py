"""The command that scans a whole model."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attnrobust.cli.compare import console, print_json
from attnrobust.cli.exits import ExitCode, exit_code, say
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.progress import tracked
from attnrobust.models.model import load_model
from attnrobust.reports.tables import shown

if TYPE_CHECKING:
    from attnrobust.runs.scan import Scan

scanning = typer.Typer()

SCAN_OUT = Path("attnrobust-scan")
SHOWN_HEADS, SHOWN_TOKENS = 15, 15


@scanning.command()
def scan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for compare.")],
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: UTF-8 text, one a line.")] = None,
    tokens: Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: arrays (n, d), for every layer.")] = None,
    tolerance: Annotated[str, typer.Option(metavar="X", help="Allowed move of each layer's output.")] = "10%",
    threat: Annotated[str, typer.Option(metavar="T", help="As for compare.")] = "frobenius",
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Certificates; default all that apply.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Rank the heads too.")] = True,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Rows, resumable; see run and report.")] = SCAN_OUT,
    workers: Annotated[int, typer.Option(metavar="N", help="Worker processes; 0 works in this process.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="The rankings as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Run every supported attention layer and rank layers, heads and tokens by vulnerability."""
    from attnrobust.runs.config import load_config
    from attnrobust.runs.run import run
    from attnrobust.runs.scan import outermost, rank
    from attnrobust.runs.work import Workbench

    layers = [layer.name for layer in outermost(load_model(model).layers())]
    certificates = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    changes: dict[str, Any] = {
        "model": model,
        "layers": layers or ["*"],
        "texts": texts,
        "tokens": tokens,
        "threats": [threat],
        "goals": [tolerance],
        "certificates": certificates,
        "seed": seed,
        "output": out,
        "execution": {"workers": workers},
    }
    config = load_config(changes=changes)
    with stopping() as stop:
        outcome = run(config, stop=stop, watch=lambda rows, total: tracked(rows, total, quiet=quiet))
    rows = outcome.store.rows()
    ranking = rank(rows, Workbench(config), heads=heads and not outcome.remaining)
    if json:
        print_json(asdict(ranking))
    else:
        _print(ranking)
    code = exit_code(rows)
    if outcome.remaining:
        say(f"{outcome.remaining} rows are left; give the same command again to go on")
        return code or ExitCode.INTERRUPTED
    say(f"rows are in {out}; see attnrobust report {out}")
    return code


def _print(ranking: "Scan") -> None:
    stdout = console()
    lines = [
        (r.layer, str(r.rows), *map(_percent, (r.relative_attack, r.relative_certified)),
         *map(shown, (r.attack_radius, r.certified_radius)), shown(r.gap, 3))
        for r in ranking.layers
    ]  # fmt: skip
    heading = ("layer", "rows", "attack / input", "certified / input", "attack radius", "certified radius", "gap")
    stdout.print(_table("layers, the most vulnerable first (medians over the inputs)", heading, lines))
    if ranking.heads:
        cells = [(f"{r.layer} head {r.head}", shown(r.relative), shown(r.sensitivity)) for r in ranking.heads]
        count = f"{min(SHOWN_HEADS, len(cells))} of {len(cells)}"
        title = f"heads, the most sensitive {count} (first order, a ranking and no bound)"
        stdout.print(_table(title, ("head", "relative", "singular value"), cells[:SHOWN_HEADS]))
    if ranking.tokens:
        cells = [(r.token, f"{r.share:.1%}", str(r.rows)) for r in ranking.tokens]
        title = f"tokens, the {min(SHOWN_TOKENS, len(cells))} of {len(cells)} that attacks move most"
        stdout.print(_table(title, ("token", "mean share of the move", "rows"), cells[:SHOWN_TOKENS]))
    if ranking.unsupported:
        reasons = [(layer.name, layer.reason) for layer in ranking.unsupported]
        stdout.print(_table("not supported", ("layer", "why"), reasons, numbers=False))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"


def _table(title: str, heading: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: bool = True) -> Table:
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(heading):
        table.add_column(name, justify="right" if place and numbers else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table
