"""Commands for many inputs: run, resume, config, export, report, check."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.compare import MOST_SENTENCES, chosen_certificates
from attnrobust.cli.exits import ExitCode, exit_code, require_threshold
from attnrobust.cli.goals import many_goals
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.output import console, place, say
from attnrobust.cli.progress import tracked
from attnrobust.errors import InputError
from attnrobust.runs.early import require_files, require_results

if TYPE_CHECKING:
    from attnrobust.runs.plan import Shard
    from attnrobust.runs.rows import Row
    from attnrobust.runs.run import Outcome

commands = typer.Typer()

MOST_WORST = 5
"""Rows that ``check`` names."""


@commands.command()
def run(
    config: o.ConfigFile = None,
    model: o.ModelOption = None,
    layer: o.Layers = None,
    at: o.Depths = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    threat: o.Threats = None,
    goal: o.GoalNames = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerances = None,
    row: o.Row = None,
    methods: o.Methods = None,
    all_certificates: o.AllCertificates = False,
    method: o.MethodChange = None,
    seed: o.SeedChange = None,
    device: o.DeviceChange = None,
    out: o.RunOut = None,
    engine: o.Engine = None,
    workers: o.WorkersChange = None,
    timeout: o.Timeout = None,
    shard: o.ShardText = None,
    fail_under: o.FailUnder = None,
    quiet: o.Quiet = False,
) -> int:
    """Compute many rows: inputs x layers (or depths) x threats x goals, into a directory that can be resumed."""
    from attnrobust.runs.config import load_config

    require_threshold(fail_under)
    effective = load_config(
        config,
        changes={
            "model": model, "texts": texts, "images": images, "tokens": tokens,
            "dataset": dataset, "column": column, "layers": layer or None,
            "at": at or None, "threats": threat or None, "goals": many_goals(goal, tolerance, anchors, row),
            "certificates": chosen_certificates(methods, everything=all_certificates),
            "attack": {"method": method}, "seed": seed, "device": device, "output": out,
            "execution": {"engine": engine, "workers": workers, "timeout": timeout},
        },
    )  # fmt: skip
    require_files(effective)
    from attnrobust.runs.run import run as run_all

    with stopping() as stop:
        outcome = run_all(effective, shard=_shard(shard), stop=stop, watch=_watch(quiet=quiet))
    return _summarise(outcome, fail_under)


@commands.command()
def resume(
    directory: o.RunDirectory,
    engine: o.Engine = None,
    workers: o.WorkersChange = None,
    timeout: o.Timeout = None,
    shard: o.ShardText = None,
    fail_under: o.FailUnder = None,
    quiet: o.Quiet = False,
) -> int:
    """Go on with a run that was interrupted, killed or ran out of disk."""
    require_threshold(fail_under)
    require_results(directory, run=True)
    from attnrobust.runs.run import resume as resume_run

    changes = {"engine": engine, "workers": workers, "timeout": timeout}
    with stopping() as stop:
        outcome = resume_run(directory, changes=changes, shard=_shard(shard), stop=stop, watch=_watch(quiet=quiet))
    return _summarise(outcome, fail_under)


@commands.command("config")
def show_config(
    config: o.ConfigFile = None,
    model: o.ModelOption = None,
    layer: o.Layers = None,
    at: o.Depths = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    threat: o.Threats = None,
    goal: o.GoalNames = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerances = None,
    row: o.Row = None,
    methods: o.Methods = None,
    all_certificates: o.AllCertificates = False,
    method: o.MethodChange = None,
    seed: o.SeedChange = None,
    device: o.DeviceChange = None,
    out: o.RunOut = None,
    engine: o.Engine = None,
    workers: o.WorkersChange = None,
    timeout: o.Timeout = None,
    print_it: o.PrintConfig = True,
) -> int:
    """Check a run configuration and print the effective one, defaults and flags included."""
    from attnrobust.runs.config import load_config

    effective = load_config(
        config,
        changes={
            "model": model, "texts": texts, "images": images, "tokens": tokens,
            "dataset": dataset, "column": column, "layers": layer or None,
            "at": at or None, "threats": threat or None, "goals": many_goals(goal, tolerance, anchors, row),
            "certificates": chosen_certificates(methods, everything=all_certificates),
            "attack": {"method": method}, "seed": seed, "device": device, "output": out,
            "execution": {"engine": engine, "workers": workers, "timeout": timeout},
        },
    )  # fmt: skip
    if print_it:
        typer.echo(effective.as_yaml(), nl=False)
    return ExitCode.OK


@commands.command()
def export(
    directory: o.RunDirectory,
    csv: o.Csv = None,
    jsonl: o.Jsonl = None,
    log_to: o.LogTo = None,
) -> int:
    """Write the rows of a run as CSV or JSON lines, or tell an experiment tracker."""
    require_results(directory, run=True)
    from attnrobust.runs.loggers import log_run, require_tracker
    from attnrobust.runs.storage.export import export_rows

    if log_to is not None:
        require_tracker(log_to)
    if log_to is None or csv is not None or jsonl is not None:
        export_rows(directory, csv=csv, jsonl=jsonl)
    if log_to is not None:
        log_run(directory, log_to)
        say(f"told {log_to} about {place(directory)}")
    return ExitCode.OK


@commands.command()
def report(
    directory: o.RunDirectory,
    out: o.ReportOut = None,
) -> int:
    """Write a self-contained HTML report and its plots, of a run or of what compare wrote."""
    require_results(directory)
    from attnrobust.reports.page import write_report

    say("wrote " + ", ".join(map(place, write_report(directory, out=out))))
    return ExitCode.OK


@commands.command()
def check(
    directory: o.RunDirectory,
    min_certified: o.MinCertified = None,
    max_gap: o.MaxGap = None,
    quantile: o.Quantile = 0.0,
    kind: o.Kinds = None,
    baseline: o.Baseline = None,
    worse: o.Worse = "1%",
    junit: o.Junit = None,
) -> int:
    """Judge a finished run: exit 0 if it reaches the thresholds, 1 if not, 3 if a row is UNSOUND."""
    require_results(directory)
    if baseline is not None:
        require_results(baseline)
    from attnrobust.reports.baseline import worse_than
    from attnrobust.reports.data import is_stale, read_report_data
    from attnrobust.reports.gate import Thresholds, judge, junit_xml, of_kinds, summary, worst
    from attnrobust.runs.storage.atomic import require_writable_file, write_text

    number, _, of = (min_certified or "").strip().partition(" ")
    least, is_share = (None, False) if min_certified is None else _threshold("--min-certified", number)
    if of and not is_share:
        raise InputError(f"--min-certified {min_certified!r}: only a share has a unit, as in '2% token'")
    if least is None and max_gap is None and baseline is not None:
        least = 0.0  # the baseline alone judges
    thresholds = Thresholds(
        min_certified=None if is_share else least, min_share=least if is_share else None, max_gap=max_gap,
        quantile=quantile, share_of=of.strip() or "norm",
    )  # fmt: skip
    allowed = _threshold("--worse", worse)[0]
    if junit is not None:
        require_writable_file(junit, option="--junit")
    data = read_report_data(directory)
    rows = of_kinds(data.rows, kind or ())
    verdict = judge(rows, thresholds, planned=data.planned)
    if junit is not None:
        write_text(junit, junit_xml(verdict, name=f"attnrobust {directory.name}"))
    before = [] if baseline is None else of_kinds(read_report_data(baseline).rows, kind or ())
    fallen = [] if baseline is None else worse_than(rows, before, allowed=allowed)
    say(summary(verdict))
    for line in (*worst(verdict, MOST_WORST), *fallen):
        say(line)
    if is_stale(directory, data.rows):
        say(f"the report in {directory} shows other rows; make it again by attnrobust report {directory}")
    if verdict.unsound:
        return ExitCode.UNSOUND
    return ExitCode.OK if verdict.passed and not fallen else ExitCode.BELOW


# ---- shared ----------------------------------------------------------------------------------------------------------


def _threshold(option: str, text: str) -> tuple[float, bool]:
    """A number, and whether it is a share; ``0`` and ``0%`` are allowed.

    Raises:
        InputError: Neither.
    """
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise InputError(f"{option} {text!r}: give a number >= 0, or a share such as 0.3%")
    is_share = text.strip().endswith("%")
    return (value / 100 if is_share else value), is_share


def _shard(text: str | None) -> "Shard | None":
    from attnrobust.runs.plan import parse_shard

    return None if text is None else parse_shard(text)


def _watch(*, quiet: bool) -> Callable[[Iterator["Row"], int], Iterable["Row"]]:
    return lambda rows, total: tracked(rows, total, quiet=quiet, places=True)


def _summarise(outcome: "Outcome", fail_under: float | None) -> int:
    """Summary of everything on disk, how to go on, and the exit code."""
    from attnrobust.reports.tables import summary_table
    from attnrobust.reports.units import run_verdicts, scale_note

    rows, directory = outcome.store.rows(), place(outcome.store.directory)
    console().print(summary_table(rows))
    for sentence in filter(None, (*run_verdicts(rows)[:MOST_SENTENCES], scale_note(rows))):
        console().print(sentence)
    total = outcome.store.manifest.rows
    say(f"{outcome.computed} rows computed, {len(rows)} of {total} in {directory}")
    code = exit_code(rows, fail_under=fail_under)
    if outcome.remaining:
        say(f"{outcome.remaining} rows are left; go on with: attnrobust resume {shlex.quote(directory)}")
        return code or ExitCode.INTERRUPTED
    return code
