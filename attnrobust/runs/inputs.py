"""From what a user writes (texts, files, options) to the goals and tasks of rows."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.goals import Goal, Margin, Pool, parse_tolerance
from attnrobust.models.arrays import read_arrays
from attnrobust.models.capture import CapturedInput, read_texts, read_tokens
from attnrobust.models.model import Model
from attnrobust.runs.rows import RowTask
from attnrobust.threats.measures import Copies, MeasureThreat
from attnrobust.threats.moves import Threat
from attnrobust.tokens import TokenMeasure

DEFAULT_TOLERANCE = "10%"


def parse_pool(text: str) -> Pool:
    """Read ``all``, ``mean`` or ``row:I``.

    Raises:
        InputError: Anything else.
    """
    if text == "all":
        return "all"
    if text == "mean":
        return "mean"
    if re.fullmatch(r"row:\d+", text):
        return int(text.removeprefix("row:"))
    raise InputError(f"pool {text!r}: give all, mean or row:I, as in row:0")


def read_readout(path: Path, *, pool: Pool, label: int | None) -> Margin:
    """Read a linear readout: arrays ``weight`` (c, e) and optional ``bias`` (c,).

    Args:
        path: ``.npz`` or ``.safetensors``.
        pool: How the rows of the output are pooled.
        label: The class that must stay; None means the clean prediction.

    Raises:
        InputError: A missing file or array, or shapes that do not fit.
        UnknownNameError: An array that has no meaning here.
    """
    arrays = read_arrays(path)
    for name in arrays:
        if name not in ("weight", "bias"):
            raise UnknownNameError(f"array of the readout file {path}", name, ("weight", "bias"))
    if "weight" not in arrays:
        raise InputError(f"{path} lacks the array weight (classes, width); bias (classes) is optional")
    try:
        return Margin(weight=arrays["weight"], bias=arrays.get("bias"), pool=pool, label=label)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def make_goal(*, tolerance: str | None, readout: Path | None, pool: str | None, label: int | None) -> Goal:
    """The goal that the options describe; without any, a displacement of ``DEFAULT_TOLERANCE``.

    Args:
        tolerance: As in ``parse_tolerance``; excludes ``readout``.
        readout: A readout file; then the goal is its margin.
        pool: As in ``parse_pool``; None means "mean" for a readout and "all" for a tolerance.
        label: Only with ``readout``.

    Raises:
        InputError: Options that exclude each other, or values that cannot be read.
    """
    if readout is None:
        if label is not None:
            raise InputError("a label needs a readout; give --readout FILE or leave --label out")
        return parse_tolerance(tolerance or DEFAULT_TOLERANCE, parse_pool(pool or "all"))
    if tolerance is not None:
        raise InputError("a readout and a tolerance exclude each other; give one of --readout and --tolerance")
    return read_readout(readout, pool=parse_pool(pool or "mean"), label=label)


def read_inputs(
    model: Model, layer: str | None, *, texts: Path | None, tokens: Path | None
) -> tuple[CapturedInput, ...]:
    """The inputs of a layer: texts run through the model, or tokens from a file.

    Args:
        model: The model.
        layer: A layer's name; None means the only one.
        texts: A text file, one input a line.
        tokens: A file of arrays (n, d); excludes ``texts``.

    Raises:
        InputError: Neither or both, or a file that cannot be used.
    """
    if (texts is None) == (tokens is None):
        raise InputError("give the inputs by exactly one of --texts FILE and --tokens FILE")
    if texts is not None:
        return model.capture(layer, read_texts(texts))
    assert tokens is not None  # noqa: S101 - exactly one of them is given; narrows the type
    return read_tokens(tokens, width=model.resolve(layer).d)


def parse_device(text: str) -> torch.device:
    """Read ``cpu``, ``cuda`` or ``cuda:1``; refuses a device that this machine does not have.

    Raises:
        InputError: No such device.
    """
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {text!r} is not there; give cpu, or cuda where there is a GPU") from error
    return device


def on_device(measure: TokenMeasure, goal: Goal, device: str | torch.device) -> tuple[TokenMeasure, Goal]:
    """Tokens and goal where the layer lives; their digests stay the same."""
    if isinstance(goal, Margin):
        goal = replace(goal, weight=goal.weight.to(device), bias=None if goal.bias is None else goal.bias.to(device))
    return TokenMeasure(measure.points.to(device), measure.mass.to(device)), goal


def make_tasks(
    model: Model,
    layer: str | None,
    inputs: Sequence[CapturedInput],
    *,
    threat: Threat,
    goal: Goal,
    seed: int,
    device: str | torch.device = "cpu",
    measures: MeasureThreat | Copies | None = None,
) -> list[RowTask]:
    """One task per input of a layer.

    Args:
        model: The model.
        layer: A layer's name; None means the only one.
        inputs: The layer's inputs.
        threat: What may move.
        goal: What must stay true.
        seed: Seed of the run.
        device: Where the layer lives.
        measures: What may happen to the token measure, if it is not the threat on moved tokens.
    """
    name, network = model.resolve(layer).name, model.layer(layer)
    tasks = []
    for captured in inputs:
        measure, there = on_device(captured.measure, goal, device)
        tasks.append(
            RowTask(
                captured.id, name, network, measure, threat, there, seed=seed, text=captured.text,
                tokens=captured.token_strings, measures=measures,
            )
        )  # fmt: skip
    return tasks
