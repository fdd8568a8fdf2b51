"""The commands that compute every input of one layer or depth, threat and goal in memory: certify, attack, compare."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode, exit_code, require_threshold
from attnrobust.cli.goals import one_goal
from attnrobust.cli.output import console, print_json, say, typed
from attnrobust.cli.progress import tracked
from attnrobust.errors import InputError
from attnrobust.runs.early import require_files, require_model
from attnrobust.runs.reading import DEFAULT_ATTACK

if TYPE_CHECKING:
    from attnrobust.models.model import Model
    from attnrobust.runs.config import RunConfig
    from attnrobust.runs.rows import Row
    from attnrobust.runs.work import Workbench

commands = typer.Typer()

MOST_SENTENCES = 8
"""Inputs with a sentence each; more have one together."""


@commands.command("list-layers")
def list_layers(model: o.ModelName, json: o.Json = False) -> int:
    """List every attention layer of a model, why one is not supported, and the depths of the whole model."""
    require_model(model)
    from dataclasses import asdict

    from attnrobust.models.model import load_model
    from attnrobust.reports.tables import layer_table

    loaded = load_model(model)
    if json:
        for layer in loaded.layers():
            print_json(asdict(layer))
    else:
        console().print(layer_table(loaded.layers()))
        console().print(_whole(loaded))
    return ExitCode.OK


def _whole(model: "Model") -> str:
    """What can be asked about the whole model."""
    try:
        depths = model.depths()
    except InputError as error:
        return f"not read as a whole: {error}"
    goals = "decision, hidden, pooled" if model.decides else "nearest (by --anchors), hidden, pooled; it has no head"
    return f"the whole model: --at {' | '.join(depths)}; --goal {goals}"


@commands.command()
def certify(
    model: o.ModelName,
    layer: o.Layer = None,
    at: o.At = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerance = None,
    readout: o.Readout = None,
    pool: o.Pool = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.ThreatKey = "frobenius",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    methods: o.Methods = None,
    json: o.Json = False,
    out: o.ResultsOut = None,
    overwrite: o.Overwrite = False,
    fail_under: o.FailUnder = None,
    quiet: o.Quiet = False,
) -> int:
    """Certified radii: no move of the tokens within them breaks the goal. No attack."""
    asked = one_goal(goal, anchors, tolerance, readout, pool, label, row)
    config = one_place(
        model, layer, at, {"texts": texts, "images": images, "tokens": tokens, "dataset": dataset, "column": column},
        threat, seed, device, goal=asked,
        certificates=chosen_certificates(methods), attack={"method": None},
    )  # fmt: skip
    return compute(config, json=json, out=out, overwrite=overwrite, fail_under=fail_under, quiet=quiet)


@commands.command()
def attack(
    model: o.ModelName,
    layer: o.Layer = None,
    at: o.At = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerance = None,
    readout: o.Readout = None,
    pool: o.Pool = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.ThreatKey = "frobenius",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    attack: o.Method = DEFAULT_ATTACK,
    epsilon: o.Epsilon = None,
    token_radii: o.TokenRadii = False,
    json: o.Json = False,
    out: o.ResultsOut = None,
    overwrite: o.Overwrite = False,
    fail_under: o.FailUnder = None,
    quiet: o.Quiet = False,
) -> int:
    """Verified attack radii: the nearest tokens found that break the goal. No certificate."""
    asked = one_goal(goal, anchors, tolerance, readout, pool, label, row)
    config = one_place(
        model, layer, at, {"texts": texts, "images": images, "tokens": tokens, "dataset": dataset, "column": column},
        threat, seed, device, goal=asked,
        certificates=(), attack={"method": attack, "epsilon": epsilon, "token_radii": token_radii},
    )  # fmt: skip
    return compute(config, json=json, out=out, overwrite=overwrite, fail_under=fail_under, quiet=quiet)


@commands.command()
def compare(
    model: o.ModelName,
    layer: o.Layer = None,
    at: o.At = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerance = None,
    readout: o.Readout = None,
    pool: o.Pool = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.ThreatKey = "frobenius",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    methods: o.Methods = None,
    all_certificates: o.AllCertificates = False,
    attack: o.Method = DEFAULT_ATTACK,
    token_radii: o.TokenRadii = False,
    json: o.Json = False,
    out: o.ResultsOut = None,
    overwrite: o.Overwrite = False,
    fail_under: o.FailUnder = None,
    quiet: o.Quiet = False,
) -> int:
    """Both, input by input: certified radius, attack radius and the gap between them."""
    asked = one_goal(goal, anchors, tolerance, readout, pool, label, row)
    config = one_place(
        model, layer, at, {"texts": texts, "images": images, "tokens": tokens, "dataset": dataset, "column": column},
        threat, seed, device, goal=asked,
        certificates=chosen_certificates(methods, everything=all_certificates),
        attack={"method": attack, "token_radii": token_radii},
    )  # fmt: skip
    return compute(config, json=json, out=out, overwrite=overwrite, fail_under=fail_under, quiet=quiet)


# ---- shared ----------------------------------------------------------------------------------------------------------


def one_place(
    model: str,
    layer: str | None,
    at: str | None,
    inputs: Mapping[str, Path | str | None],
    threat: str,
    seed: int,
    device: str,
    *,
    certificates: Iterable[str] | None,
    goal: Mapping[str, Any],
    attack: Mapping[str, Any],
) -> "RunConfig":
    """The configuration of a run of one layer or depth, threat and goal."""
    from attnrobust.runs.config import make_config

    files = {name: path for name, path in inputs.items() if isinstance(path, Path)}
    if len(files) != 1:
        raise InputError("give the inputs by exactly one of --texts, --images, --tokens and --dataset")
    return make_config(
        {
            **{name: path.expanduser().absolute() for name, path in files.items()},
            "column": inputs.get("column"),
            "model": model,
            "layers": None if layer is None else [layer],
            "at": at,
            "threats": [threat],
            "goals": [goal],
            "certificates": None if certificates is None else list(certificates),
            "attack": attack,
            "seed": seed,
            "device": device,
        }
    )


def chosen_certificates(methods: str | None, *, everything: bool = False) -> list[str] | None:
    """Names of certificates, ``all``, or None for those that can win; refuses a list without any."""
    if everything and methods is not None:
        raise InputError("--certificates and --all-certificates exclude each other; give one of them")
    names = ["all"] if everything else None if methods is None else o.split_names(methods)
    if names == []:
        raise InputError("--certificates names no certificate; leave it out to run those that can win")
    return names


def compute(
    config: "RunConfig",
    *,
    json: bool,
    out: Path | None,
    overwrite: bool,
    fail_under: float | None,
    quiet: bool,
) -> ExitCode:
    """Every row: what can be refused is refused before the first, and files are written before tables are shown."""
    require_threshold(fail_under)
    require_files(config)
    from attnrobust.runs.run import rows_in_memory
    from attnrobust.runs.storage.files import require_results_place
    from attnrobust.runs.work import Workbench

    if out is not None:
        require_results_place(out)
    bench = Workbench(config)
    job = None if out is None else _job(bench, out, overwrite=overwrite)
    bench.refuse_hopeless()
    if not quiet:
        _tell_absolute(bench)
    total = len(bench.items())
    printed = _Printed(json=json, patient=out is not None)
    rows = list(printed.each(tracked(rows_in_memory(bench), total, quiet=quiet)))
    if out is not None and job is not None:
        _store(out, rows, config, job)
    if not json:
        _print_tables(rows)
    printed.raise_what_failed()
    return exit_code(rows, fail_under=fail_under)


def _tell_absolute(bench: "Workbench") -> None:
    """What a tolerance without a percent sign is as a share of the output's norm at the first input."""
    from attnrobust.runs.inputs import output_norm
    from attnrobust.text import read_tolerance, shown

    text = bench.config.goals[0].tolerance
    if text is None or read_tolerance(text)[1]:
        return
    task = bench.task(bench.items()[0])
    norm = output_norm(task.network, task.clean, task.goal)
    if norm:
        share = shown(100.0 * read_tolerance(text)[0] / norm, 3)
        say(f"tolerance {text} is {share}% of the output's norm at {task.input_id}; write {text}% for a share of it")


def _job(bench: "Workbench", out: Path, *, overwrite: bool) -> str:
    """The digest of the job; refuses a directory with the results of another."""
    from attnrobust.runs.plan import meaning
    from attnrobust.runs.storage.files import job_digest, require_same_job

    job = job_digest({name: value for name, value in meaning(bench).items() if name != "threads"})
    if not overwrite:
        require_same_job(out, job)
    return job


class _Printed:
    """Rows as JSON lines while they come; a stdout that fails does not cost the files that are still to be written.

    Args:
        json: Whether to print at all.
        patient: Keep the error until the files are written.
    """

    def __init__(self, *, json: bool, patient: bool) -> None:
        self._json, self._patient = json, patient
        self._failed: OSError | None = None

    def each(self, rows: Iterable["Row"]) -> Iterator["Row"]:
        """Pass rows on and print them."""
        for row in rows:
            if self._json and self._failed is None:
                self._print(row)
            yield row

    def _print(self, row: "Row") -> None:
        from attnrobust.runs.yardsticks import as_json

        try:
            print_json(as_json(row))
        except OSError as error:  # the reader went away, or the disk behind a redirection is full
            if not self._patient:
                raise
            self._failed = error

    def raise_what_failed(self) -> None:
        """Raise what printing raised, if anything."""
        if self._failed is not None:
            raise self._failed


def _print_tables(rows: list["Row"]) -> None:
    from attnrobust.reports.tables import certificate_table, result_table
    from attnrobust.reports.tokens import MOST_INPUTS, token_tables
    from attnrobust.reports.units import row_verdict, run_verdicts, scale_note

    stdout = console()
    stdout.print(result_table(rows))
    certificates = certificate_table(rows)
    if certificates is not None:
        stdout.print(certificates)
    for table in token_tables(rows):
        stdout.print(table)
    if (more := sum(bool(row.token_radii) for row in rows) - MOST_INPUTS) > 0:
        stdout.print(f"the tokens of {more} more inputs are in --json, and in the report of --out")
    sentences = map(row_verdict, rows) if 1 < len(rows) <= MOST_SENTENCES else ()
    for sentence in filter(None, (*sentences, *run_verdicts(rows), scale_note(rows))):
        stdout.print(sentence)


def _store(out: Path, rows: list["Row"], config: "RunConfig", job: str) -> None:
    from attnrobust.reports.plots import gap_plot
    from attnrobust.runs.storage.files import write_results

    places, goal = ", ".join(dict.fromkeys(row.layer for row in rows)), rows[0].goal if rows else ""
    plot = gap_plot(rows, title=f"{config.model}, {places}: {goal}, {config.threats[0]}")
    written = write_results(out, rows, run=_options(config), job=job, plot=plot, command=typed())
    say("wrote " + ", ".join(str(path) for path in written))


def _options(config: "RunConfig") -> dict[str, Any]:
    """What was computed, for the JSON file and the report; file names are absolute."""
    from attnrobust.runs.early import KINDS

    values = config.model_dump(mode="json")
    (goal,), attack, names = values["goals"], values["attack"], values["certificates"]
    return {
        **{name: values[name] for name in ("model", *KINDS, "column", "seed", "device")},
        **goal,
        "at": None if config.at is None else ", ".join(config.at),
        "layer": None if config.layers is None else config.layers[0],
        "threat": config.threats[0],
        "certify": config.certifies,
        "methods": ",".join(names) if names else None,
        "attack": attack["method"],
        "epsilon": attack["epsilon"],
    }
