"""The command that writes one problem for other verifiers."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnrobust.cli import options as o
from attnrobust.cli.compare import one_place
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.goals import one_goal
from attnrobust.cli.output import console, place, print_json, say
from attnrobust.errors import InputError
from attnrobust.runs.early import require_files
from attnrobust.runs.reading import DEFAULT_ATTACK

if TYPE_CHECKING:
    from attnrobust.interchange.export import ExportedProblem
    from attnrobust.runs.evaluate import RowTask
    from attnrobust.runs.work import Workbench

commands = typer.Typer()


@commands.command("export-problem")
def export_problem(
    model: o.ModelName,
    epsilon: o.ExportRadius,
    out: o.ExportOut,
    layer: o.Layer = None,
    at: o.At = None,
    texts: o.Texts = None,
    images: o.Images = None,
    tokens: o.Tokens = None,
    dataset: o.Dataset = None,
    column: o.ColumnName = None,
    number: o.InputNumber = None,
    goal: o.GoalName = None,
    anchors: o.Anchors = None,
    tolerance: o.Tolerance = None,
    readout: o.Readout = None,
    pool: o.Pool = None,
    label: o.Label = None,
    row: o.Row = None,
    threat: o.ThreatKey = "per-token-linf",
    box: o.BoxSide = None,
    precision: o.FilePrecision = "float32",
    vnnlib: o.VnnlibVersion = "1.0",
    json: o.Json = False,
    overwrite: o.OverwriteFiles = False,
) -> int:
    """One problem as ONNX and VNN-LIB, for other verifiers: a layer or model, one input, a box of moves, a label."""
    if goal not in ("decision", "nearest") and readout is None:
        raise InputError(
            "VNN-LIB states linear constraints on outputs, no norm of them: ask for a margin by --readout FILE, or of "
            "the whole model by --goal decision or nearest"
        )
    asked = one_goal(goal, anchors, tolerance, readout, pool, label, row)
    config = one_place(
        model, layer, at, {"texts": texts, "images": images, "tokens": tokens, "dataset": dataset, "column": column},
        threat, 0, "cpu", goal=asked,
        certificates=(), attack={"method": DEFAULT_ATTACK},
    )  # fmt: skip
    require_files(config)
    from attnrobust.interchange.box import PRECISIONS, SIDES, named
    from attnrobust.interchange.export import export_problem as write
    from attnrobust.interchange.export import require_free
    from attnrobust.interchange.onnx_file import onnx_version
    from attnrobust.interchange.vnnlib import VERSIONS
    from attnrobust.problem import Problem
    from attnrobust.runs.work import Workbench

    side, exact = named("box", box, (None, *SIDES)), named("precision", precision, PRECISIONS)
    version = named("VNN-LIB version", vnnlib, VERSIONS)
    require_free(out, overwrite=overwrite)
    onnx_version()
    task = _task(Workbench(config), number)
    problem = Problem(task.network, task.clean, task.threat, task.goal)
    written = write(
        problem, out, epsilon=epsilon, box=side, precision=exact, vnnlib_version=version,
        overwrite=overwrite, about=_about(model, task),
    )  # fmt: skip
    if json:
        print_json(written.to_dict())
    else:
        _print(written)
    say("wrote " + ", ".join(map(place, written.paths)))
    return ExitCode.OK


def _task(bench: "Workbench", number: int | None) -> "RowTask":
    """The input that is asked for."""
    if len(bench.places) > 1:
        raise InputError(f"one problem is about one place, not {len(bench.places)}: {', '.join(bench.places)}")
    bench.refuse_hopeless()
    items = bench.items()
    if number is None and len(items) > 1:
        raise InputError(f"the file has {len(items)} inputs and one problem is about one; name it by --input 1, 2, ...")
    if not 1 <= (number or 1) <= len(items):
        raise InputError(f"there is no input {number}; the file has {len(items)}")
    return bench.task(items[(number or 1) - 1])


def _about(model: str, task: "RowTask") -> dict[str, str]:
    """What the problem is about, in words."""
    told = {
        "model": Path(model).name,
        "layer": task.layer,
        "input": task.input_id,
        "text": task.text,
        "scope": task.scope,
    }
    return {name: value for name, value in told.items() if value}


def _print(written: "ExportedProblem") -> None:
    stdout = console()
    stdout.print(
        f"X (1, {written.n}, {written.width}), Y (1, {written.classes}), {written.precision}, opset {written.opset}, "
        f"VNN-LIB {written.vnnlib_version}: {written.threat}, radius {written.epsilon:g}, label {written.label}"
    )
    stdout.print(f"box {written.box}, half-width {written.half_width:.6g} an entry")
    stdout.print(f"sat:   {written.sat}")
    stdout.print(f"unsat: {written.unsat}")
    rounded = f"{written.rounded_weights} of {written.weights} weights rounded to {written.precision}"
    stdout.print(f"{rounded}; logits at the clean tokens differ by at most {written.difference:.2g}")
