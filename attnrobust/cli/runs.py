"""Commands for many inputs: run, resume, config, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnrobust.cli.compare import console
from attnrobust.cli.exits import ExitCode, exit_code, say
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.progress import tracked
from attnrobust.runs.files import write_text

if TYPE_CHECKING:
    from attnrobust.runs.config import RunConfig
    from attnrobust.runs.run import Outcome

many = typer.Typer()

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML or JSON; flags go over it.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of a run.")]
Model = Annotated[str | None, typer.Option(metavar="MODEL", help="As for compare.")]
Layers = Annotated[list[str] | None, typer.Option("--layer", metavar="NAME", help="Name, suffix or glob; repeatable.")]
Texts = Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: UTF-8 text, one a line.")]
Tokens = Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: .npz or .safetensors arrays (n, d).")]
Threats = Annotated[list[str] | None, typer.Option("--threat", metavar="T", help="As for compare; repeatable.")]
Tolerances = Annotated[list[str] | None, typer.Option("--tolerance", metavar="X", help="A goal each; repeatable.")]
Methods = Annotated[str | None, typer.Option(metavar="A,B", help="Certificates to run; default all that apply.")]
Method = Annotated[str | None, typer.Option("--method", metavar="NAME", help="The attack.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Output directory; default attnrobust-run.")]
Engine = Annotated[str | None, typer.Option(metavar="E", help="local (default) or ray.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Worker processes; 0 (default) works in this process.")]
Timeout = Annotated[float | None, typer.Option(metavar="S", help="Seconds a row may take; needs workers.")]
ShardText = Annotated[str | None, typer.Option("--shard", metavar="i/N", help="Compute only this share of the rows.")]
FailUnder = Annotated[float | None, typer.Option(metavar="R", help="Exit with 1 if a certified radius is below R.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@many.command()
def run(
    config: ConfigFile = None,
    model: Model = None,
    layer: Layers = None,
    texts: Texts = None,
    tokens: Tokens = None,
    threat: Threats = None,
    tolerance: Tolerances = None,
    methods: Methods = None,
    method: Method = None,
    seed: Seed = None,
    device: Device = None,
    out: Out = None,
    engine: Engine = None,
    workers: Workers = None,
    timeout: Timeout = None,
    shard: ShardText = None,
    fail_under: FailUnder = None,
    quiet: Quiet = False,
) -> int:
    """Compute many rows: inputs x layers x threats x goals, into a directory that can be resumed."""
    options = dict(locals())
    from attnrobust.runs.run import run as run_all

    effective = _effective(options)
    with stopping() as stop:
        outcome = run_all(effective, shard=_shard(shard), stop=stop, watch=_watch(quiet=quiet))
    return _told(outcome, fail_under)


@many.command()
def resume(
    directory: Directory,
    engine: Engine = None,
    workers: Workers = None,
    timeout: Timeout = None,
    shard: ShardText = None,
    fail_under: FailUnder = None,
    quiet: Quiet = False,
) -> int:
    """Go on with a run that was interrupted, killed or ran out of disk."""
    from attnrobust.runs.run import resume as resume_run

    changes = {"engine": engine, "workers": workers, "timeout": timeout}
    with stopping() as stop:
        outcome = resume_run(directory, changes=changes, shard=_shard(shard), stop=stop, watch=_watch(quiet=quiet))
    return _told(outcome, fail_under)


@many.command("config")
def show_config(
    config: ConfigFile = None,
    model: Model = None,
    layer: Layers = None,
    texts: Texts = None,
    tokens: Tokens = None,
    threat: Threats = None,
    tolerance: Tolerances = None,
    methods: Methods = None,
    method: Method = None,
    seed: Seed = None,
    device: Device = None,
    out: Out = None,
    engine: Engine = None,
    workers: Workers = None,
    timeout: Timeout = None,
    print_it: Annotated[bool, typer.Option("--print", help="Print the effective configuration (the default).")] = True,
) -> int:
    """Check a run configuration and print the effective one, defaults and flags included."""
    options = dict(locals())
    effective = _effective(options)
    if print_it:
        typer.echo(effective.as_yaml(), nl=False)
    return ExitCode.OK


@many.command()
def export(
    directory: Directory,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as CSV.")] = None,
    jsonl: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as JSON lines.")] = None,
) -> int:
    """Write the rows of a run as CSV or JSON lines."""
    from attnrobust.runs.export import export_rows

    export_rows(directory, csv=csv, jsonl=jsonl)
    return ExitCode.OK


@many.command()
def report(
    directory: Directory,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write; default beside the results.")] = None,
) -> int:
    """Write a self-contained HTML report and its plots, of a run or of what compare wrote."""
    from attnrobust.reports.page import write_report

    say("wrote " + ", ".join(str(path) for path in write_report(directory, out=out)))
    return ExitCode.OK


@many.command()
def check(
    directory: Directory,
    min_certified: Annotated[float | None, typer.Option(metavar="R", help="Least certified radius.")] = None,
    max_gap: Annotated[float | None, typer.Option(metavar="G", help="Largest gap.")] = None,
    quantile: Annotated[float, typer.Option(metavar="Q", help="Share of the rows that may fall short.")] = 0.0,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML.")] = None,
) -> int:
    """Judge a finished run: exit 0 if it reaches the thresholds, 1 if not, 3 if a row is UNSOUND."""
    from attnrobust.reports.gate import Thresholds, judge, junit_xml, summary
    from attnrobust.reports.page import read_report_data

    thresholds = Thresholds(min_certified=min_certified, max_gap=max_gap, quantile=quantile)
    data = read_report_data(directory)
    verdict = judge(data.rows, thresholds, planned=data.planned)
    if junit is not None:
        write_text(junit, junit_xml(verdict, name=f"attnrobust {directory.name}"))
    say(summary(verdict))
    if verdict.unsound:
        return ExitCode.UNSOUND
    return ExitCode.OK if verdict.passed else ExitCode.BELOW


# ---- shared ----------------------------------------------------------------------------------------------------------


def _effective(options: dict[str, Any]) -> "RunConfig":
    """The configuration of a command's options; flags go over the file."""
    from attnrobust.runs.config import load_config

    changes = {
        **{name: options[name] for name in ("model", "texts", "tokens", "seed", "device")},
        "layers": options["layer"] or None,
        "threats": options["threat"] or None,
        "goals": options["tolerance"] or None,
        "certificates": None if options["methods"] is None else _names(options["methods"]),
        "attack": {"method": options["method"]},
        "output": options["out"],
        "execution": {name: options[name] for name in ("engine", "workers", "timeout")},
    }
    return load_config(options["config"], changes=changes)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _shard(text: str | None) -> Any:
    from attnrobust.runs.plan import parse_shard

    return None if text is None else parse_shard(text)


def _watch(*, quiet: bool) -> Any:
    return lambda rows, total: tracked(rows, total, quiet=quiet)


def _told(outcome: "Outcome", fail_under: float | None) -> int:
    """Summary of everything on disk, how to go on, and the exit code."""
    from attnrobust.reports.tables import summary_table

    rows, directory = outcome.store.rows(), outcome.store.directory
    console().print(summary_table(rows))
    total = outcome.store.manifest.rows
    say(f"{outcome.computed} rows computed, {len(rows)} of {total} in {directory}")
    code = exit_code(rows, fail_under=fail_under)
    if outcome.remaining:
        say(f"{outcome.remaining} rows are left; go on with: attnrobust resume {directory}")
        return code or ExitCode.INTERRUPTED
    return code
