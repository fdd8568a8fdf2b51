"""The command that scans a whole model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.compare import chosen_certificates
from attnrobust.cli.exits import ExitCode, exit_code
from attnrobust.cli.goals import one_goal
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.output import console, print_json, say
from attnrobust.cli.progress import tracked
from attnrobust.runs.early import refuse_unknown_names, require_there
from attnrobust.text import shown

if TYPE_CHECKING:
    from attnrobust.runs.config import RunConfig
    from attnrobust.runs.rows import Row
    from attnrobust.runs.scan import Scan

commands = typer.Typer()

SCAN_OUT = Path("attnrobust-scan")
SHOWN_HEADS, SHOWN_TOKENS = 15, 15


@commands.command()
def scan(
    model: o.ModelName,
    at: o.Depths = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerance = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.ThreatKey = "frobenius",
    methods: o.Methods = None,
    all_certificates: o.AllCertificates = False,
    seed: o.Seed = 0,
    heads: o.Heads = True,
    token_radii: o.TokenRadii = False,
    out: o.ScanOut = SCAN_OUT,
    workers: o.Workers = 0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Run every supported attention layer and rank layers, heads and tokens; with --goal, every depth of the model."""
    require_there(model, texts=texts, images=images, tokens=tokens, dataset=dataset)
    asked = one_goal(goal, anchors, tolerance, None, None, label, row)
    certificates = chosen_certificates(methods, everything=all_certificates)
    refuse_unknown_names(threats=[threat], certificates=() if certificates in (None, ["all"]) else certificates)
    from dataclasses import asdict

    from attnrobust.runs.config import load_config
    from attnrobust.runs.run import run
    from attnrobust.runs.scan import rank
    from attnrobust.runs.work import Workbench

    places = {"at": at or ["*"]} if goal is not None or at else {"layers": _layers(model)}
    config = load_config(
        changes=places | {
            "model": model, "texts": texts, "images": images, "tokens": tokens,
            "dataset": dataset, "column": column, "threats": [threat], "goals": [asked],
            "certificates": certificates, "seed": seed, "output": out,
            "execution": {"workers": workers}, "attack": {"token_radii": token_radii},
        }
    )  # fmt: skip
    with stopping() as stop:
        outcome = run(config, stop=stop, watch=lambda rows, total: tracked(rows, total, quiet=quiet, places=True))
    rows = outcome.store.rows()
    if config.at is not None:
        _draw(rows, config)
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


def _layers(model: str) -> list[str]:
    """The layers that count, each once."""
    from attnrobust.models.model import load_model
    from attnrobust.runs.scan import outermost

    return [layer.name for layer in outermost(load_model(model).layers())] or ["*"]


def _draw(rows: Sequence["Row"], config: "RunConfig") -> None:
    """The depth profile, beside the rows."""
    from attnrobust.reports.depths import PROFILE_NAME, depth_plot
    from attnrobust.runs.storage.atomic import write_atomically

    write_atomically(config.output, {PROFILE_NAME: depth_plot(rows, title=config.model)})


def _print(ranking: "Scan") -> None:
    from attnrobust.reports.depths import depth_table
    from attnrobust.reports.layout import lay_out, numbers, words

    stdout = console()
    if ranking.depths:
        stdout.print(depth_table(ranking.depths))
    lines = [
        (r.layer, str(r.rows), *map(_percent, (r.relative_attack, r.relative_certified)),
         *map(shown, (r.attack_radius, r.certified_radius)), shown(r.gap, 3))
        for r in ranking.layers
    ]  # fmt: skip
    heading = numbers("rows", "attack / input", "certified / input", "attack radius", "certified radius", "gap")
    title = "layers, the most vulnerable first (medians over the inputs)"
    if ranking.layers or not ranking.depths:
        stdout.print(lay_out([*words("layer"), *heading], lines, title=title))
    if ranking.heads:
        cells = [(f"{r.layer} head {r.head}", shown(r.relative), shown(r.sensitivity)) for r in ranking.heads]
        title = f"heads, the most sensitive {SHOWN_HEADS} of {len(cells)} (first order, a ranking and no bound)"
        columns = [*words("head"), *numbers("relative", "singular value")]
        stdout.print(lay_out(columns, cells[:SHOWN_HEADS], title=title))
    if ranking.tokens:
        cells = [(r.token, f"{r.share:.1%}", str(r.rows)) for r in ranking.tokens]
        title = f"tokens, the {min(SHOWN_TOKENS, len(cells))} of {len(cells)} that attacks move most"
        columns = [*words("token"), *numbers("mean share of the move", "rows")]
        stdout.print(lay_out(columns, cells[:SHOWN_TOKENS], title=title))
    if ranking.unsupported:
        reasons = [(layer.name, layer.reason) for layer in ranking.unsupported]
        stdout.print(lay_out(words("layer", "why"), reasons, title="not supported"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"
