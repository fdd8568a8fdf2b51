"""What ``certify``, ``attack``, ``compare`` and ``demo`` share: from options to printed and stored rows."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from attnrobust.attacks import attack_for
from attnrobust.certify import method_named
from attnrobust.cli.exits import ExitCode, exit_code, say
from attnrobust.cli.progress import tracked
from attnrobust.errors import InputError
from attnrobust.goals import Goal
from attnrobust.models.capture import CapturedInput
from attnrobust.models.listing import LayerInfo
from attnrobust.models.model import Model, load_model
from attnrobust.reports.tables import certificate_table, gap_plot, layer_table, result_table
from attnrobust.runs.files import json_text, require_writable, write_results
from attnrobust.runs.inputs import make_goal, make_tasks, parse_device, read_inputs
from attnrobust.runs.rows import Row, RowOptions, RowTask, evaluate_row
from attnrobust.threats.base import Threat
from attnrobust.threats.parse import parse_threat

WIDTH_OF_FILES = 200
"""Columns of tables that go to a file or a pipe, where nothing says how wide it is."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The options of one command, as the user wrote them.

    Args:
        model: Name of the model.
        layer: Name of the layer, or None for the only one.
        texts: Text file, or None.
        tokens: Token file, or None.
        tolerance: Allowed displacement, or None.
        readout: Readout file, or None.
        pool: Pooling, or None.
        label: Label, or None.
        threat: Key of the threat.
        seed: Seed of the run.
        device: Where the layer and its inputs live.
        certify: Whether to run certificates.
        methods: Certificates by name, with commas; None means all.
        attack: Attack by name; None means none.
        epsilon: Fixed budget of the attack, or None.
        json: Print JSON rows instead of tables.
        out: Directory of the result files, or None.
        fail_under: Threshold, or None.
        quiet: No progress.
    """

    model: str
    layer: str | None = None
    texts: Path | None = None
    tokens: Path | None = None
    tolerance: str | None = None
    readout: Path | None = None
    pool: str | None = None
    label: int | None = None
    threat: str = "frobenius"
    seed: int = 0
    device: str = "cpu"
    certify: bool = True
    methods: str | None = None
    attack: str | None = None
    epsilon: float | None = None
    json: bool = False
    out: Path | None = None
    fail_under: float | None = None
    quiet: bool = False


def run_job(job: Job, *, inputs: tuple[str, ...] | None = None) -> ExitCode:
    """Run a job: everything that can be refused is refused before the first row, and files are written last.

    Args:
        job: The options.
        inputs: Texts that take the place of the input files (the demo).

    Returns:
        The exit code.

    Raises:
        AttnRobustError: Options or files that cannot be used.
    """
    threat, device = parse_threat(job.threat), parse_device(job.device)
    options, goal = _row_options(job, threat), _goal(job)
    if job.out is not None:
        require_writable(job.out)
    model = load_model(job.model, device=device)
    captured = _captured(job, model, inputs)
    tasks = make_tasks(model, job.layer, captured, threat=threat, goal=goal, seed=job.seed, device=device)
    rows = list(_printed(job, tracked(_evaluated(tasks, options), len(tasks), quiet=job.quiet)))
    if not job.json:
        print_tables(rows)
    if job.out is not None:
        _store(job, rows)
    return exit_code(rows, fail_under=job.fail_under)


def _row_options(job: Job, threat: Threat) -> RowOptions:
    methods = None
    if job.methods is not None:
        methods = tuple(name.strip() for name in job.methods.split(",") if name.strip())
        if not methods:
            raise InputError("--methods names no certificate; leave it out to run all")
        for name in methods:
            method_named(name)
    if job.attack is not None:
        attack_for(threat, job.attack)
    if job.fail_under is not None and not job.fail_under >= 0:
        raise InputError(f"--fail-under must be a number >= 0; got {job.fail_under}")
    return RowOptions(certify=job.certify, methods=methods, attack=job.attack, epsilon=job.epsilon)


def _goal(job: Job) -> Goal:
    return make_goal(tolerance=job.tolerance, readout=job.readout, pool=job.pool, label=job.label)


def _captured(job: Job, model: Model, inputs: tuple[str, ...] | None) -> tuple[CapturedInput, ...]:
    if inputs is not None:
        return model.capture(job.layer, inputs)
    return read_inputs(model, job.layer, texts=job.texts, tokens=job.tokens)


def _evaluated(tasks: list[RowTask], options: RowOptions) -> Iterator[Row]:
    return (evaluate_row(task, options) for task in tasks)


def _printed(job: Job, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        if job.json:
            print_json(row.as_dict())
        yield row


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout, at once."""
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def print_tables(rows: list[Row]) -> None:
    """The tables of rows on stdout."""
    stdout = console()
    stdout.print(result_table(rows))
    certificates = certificate_table(rows)
    if certificates is not None:
        stdout.print(certificates)


def print_layers(layers: Sequence[LayerInfo]) -> None:
    """Attention layers as a table on stdout."""
    console().print(layer_table(layers))


def console() -> Console:
    """Stdout; not cut to 80 columns where it is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_FILES)


def _store(job: Job, rows: list[Row]) -> None:
    assert job.out is not None  # noqa: S101 - the caller asked; narrows the type
    plot = gap_plot(rows, title=_title(job, rows))
    run = {name: str(value) if isinstance(value, Path) else value for name, value in vars(job).items()}
    written = write_results(job.out, rows, run=run, plot=plot)
    say("wrote " + ", ".join(str(path) for path in written))


def _title(job: Job, rows: list[Row]) -> str:
    layer = rows[0].layer if rows else job.layer
    goal = rows[0].goal if rows else ""
    return f"{job.model}, {layer}: {goal}, {job.threat}"
