"""The commands."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from attnrobust import __version__
from attnrobust.attacks import DEFAULT_ATTACK
from attnrobust.cli.bench import benching
from attnrobust.cli.bounds import bounding
from attnrobust.cli.compare import Job, print_json, print_layers, run_job
from attnrobust.cli.exits import ExitCode, guarded
from attnrobust.cli.fixed_point import repeating
from attnrobust.cli.runs import many
from attnrobust.cli.scan import scanning
from attnrobust.demo import DEMO_LAYER, DEMO_MODEL, DEMO_TOLERANCE, demo_sentences
from attnrobust.models.model import load_model

app = typer.Typer(
    name="attnrobust",
    help="Attack and certify attention layers, input by input: certified radius <= robust radius <= attack radius.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 below --fail-under, 2 wrong usage or input, 3 an UNSOUND row.",
)

DEMO_OUT = Path("attnrobust-results")

# ---- options ---------------------------------------------------------------------------------------------------------

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="minilm, a Hugging Face directory or name, or a weights file.")
]
Layer = Annotated[
    str | None, typer.Option(metavar="NAME", help="Layer, or a suffix that only it has; see list-layers.")
]
Texts = Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: UTF-8 text, one a line.")]
Tokens = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Inputs: .npz or .safetensors, every array (n, d) is one.")
]
Tolerance = Annotated[
    str | None,
    typer.Option(metavar="X", help="Allowed move of the output: 1% of its norm, or a number. Default 10%."),
]
Readout = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Linear readout (weight, bias): its label must stay instead.")
]
Pool = Annotated[
    str | None, typer.Option(metavar="P", help="mean or row:I (or all, for a tolerance): the part that counts.")
]
Label = Annotated[int | None, typer.Option(metavar="CLASS", help="The label; default the clean prediction.")]
ThreatKey = Annotated[
    str,
    typer.Option(
        "--threat",
        metavar="T",
        help="frobenius, per-token, any-token, token:I or tokens:I,J,...; of the token measure: wasserstein:P or "
        "coupling:P (P = 1, 2, inf; :within:R bounds the tokens), copies:K or copies:K:MOVES.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...")]
Methods = Annotated[str | None, typer.Option(metavar="A,B", help="Certificates to run; default all that apply.")]
Method = Annotated[str, typer.Option("--method", metavar="NAME", help="The attack; default the threat's own.")]
Epsilon = Annotated[
    float | None, typer.Option(metavar="R", help="Fixed budget: the worst point within it, not the nearest violation.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a row on stdout instead of tables.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Write results.parquet, results.json and gap.png there.")]
FailUnder = Annotated[
    float | None, typer.Option(metavar="R", help="Exit with 1 if the radius of any input is below R.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]

# ---- commands --------------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"attnrobust {__version__}")
        raise typer.Exit
    return wanted


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks of failed rows on stderr.")]


@app.callback()
def _common(
    version: Version = False,  # noqa: ARG001 - its callback does the work
    verbose: Verbose = False,
) -> None:
    if verbose:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("attnrobust").setLevel(logging.DEBUG)


@app.command("list-layers")
def list_layers(model: ModelName, json: Json = False) -> int:
    """List every attention layer of a model, and why one is not supported."""
    layers = load_model(model).layers()
    if json:
        for layer in layers:
            print_json(asdict(layer))
    else:
        print_layers(layers)
    return ExitCode.OK


@app.command()
def certify(
    model: ModelName,
    layer: Layer = None,
    texts: Texts = None,
    tokens: Tokens = None,
    tolerance: Tolerance = None,
    readout: Readout = None,
    pool: Pool = None,
    label: Label = None,
    threat: ThreatKey = "frobenius",
    seed: Seed = 0,
    device: Device = "cpu",
    methods: Methods = None,
    json: Json = False,
    out: Out = None,
    fail_under: FailUnder = None,
    quiet: Quiet = False,
) -> int:
    """Certified radii: no move of the tokens within them breaks the goal. No attack."""
    return run_job(Job(**locals()))  # the parameters are exactly the job's fields


@app.command()
def attack(
    model: ModelName,
    layer: Layer = None,
    texts: Texts = None,
    tokens: Tokens = None,
    tolerance: Tolerance = None,
    readout: Readout = None,
    pool: Pool = None,
    label: Label = None,
    threat: ThreatKey = "frobenius",
    seed: Seed = 0,
    device: Device = "cpu",
    attack: Method = DEFAULT_ATTACK,
    epsilon: Epsilon = None,
    json: Json = False,
    out: Out = None,
    fail_under: FailUnder = None,
    quiet: Quiet = False,
) -> int:
    """Verified attack radii: the nearest tokens found that break the goal. No certificate."""
    return run_job(Job(**locals(), certify=False))


@app.command()
def compare(
    model: ModelName,
    layer: Layer = None,
    texts: Texts = None,
    tokens: Tokens = None,
    tolerance: Tolerance = None,
    readout: Readout = None,
    pool: Pool = None,
    label: Label = None,
    threat: ThreatKey = "frobenius",
    seed: Seed = 0,
    device: Device = "cpu",
    methods: Methods = None,
    attack: Method = DEFAULT_ATTACK,
    json: Json = False,
    out: Out = None,
    fail_under: FailUnder = None,
    quiet: Quiet = False,
) -> int:
    """Both, input by input: certified radius, attack radius and the gap between them."""
    return run_job(Job(**locals()))


@app.command()
def demo(
    layer: Layer = DEMO_LAYER,
    tolerance: Tolerance = DEMO_TOLERANCE,
    threat: ThreatKey = "frobenius",
    seed: Seed = 0,
    device: Device = "cpu",
    methods: Methods = None,
    attack: Method = DEFAULT_ATTACK,
    json: Json = False,
    out: Out = DEMO_OUT,
    fail_under: FailUnder = None,
    quiet: Quiet = False,
) -> int:
    """Compare on what ships with the package: one layer of all-MiniLM-L6-v2, eight sentences."""
    return run_job(Job(**locals(), model=DEMO_MODEL), inputs=demo_sentences())


app.registered_commands.extend(
    [
        *many.registered_commands,
        *scanning.registered_commands,
        *bounding.registered_commands,
        *repeating.registered_commands,
        *benching.registered_commands,
    ]
)


# ---- entry -----------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None means those of the process.

    Returns:
        The exit code.
    """
    return guarded(lambda: app(args=arguments, prog_name="attnrobust", standalone_mode=False))


def main() -> NoReturn:
    """Entry of the console script; ends the process with the exit code."""
    raise SystemExit(run())
