"""From what a user writes (texts, files, options) to the goals and tasks of rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attnrobust.attacks import attack_for
from attnrobust.certify import method_named
from attnrobust.errors import InputError, UnknownNameError, UnsupportedThreatError
from attnrobust.goals import Displacement, Goal, Margin, Pool, parse_tolerance, pool_weights
from attnrobust.models.arrays import read_arrays
from attnrobust.models.capture import CapturedInput, read_texts, read_tokens
from attnrobust.models.model import Model
from attnrobust.problem import TokenMap
from attnrobust.runs.datasets import read_dataset
from attnrobust.runs.reading import (
    DEFAULT_TOLERANCE,
    parse_pool,
    require_goal_options,
)
from attnrobust.threats.parse import parse_threat
from attnrobust.tokens import TokenMeasure


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
    require_goal_options(tolerance=tolerance, readout=readout, pool=pool, label=label)
    if readout is None:
        return parse_tolerance(tolerance or DEFAULT_TOLERANCE, parse_pool(pool or "all"))
    return read_readout(readout, pool=parse_pool(pool or "mean"), label=label)


def read_inputs(
    model: Model,
    layer: str | None,
    *,
    texts: Path | None = None,
    tokens: Path | None = None,
    dataset: Path | None = None,
    column: str | None = None,
) -> tuple[CapturedInput, ...]:
    """The inputs of a layer: texts of a file or a data set run through the model, or tokens from a file.

    Args:
        model: The model.
        layer: A layer's name; None means the only one.
        texts: A text file, one input a line.
        tokens: A file of arrays (n, d).
        dataset: A data set with texts in a column; of these three exactly one is given.
        column: That column; None chooses it by name.

    Raises:
        InputError: Not exactly one of them, or a file that cannot be used.
    """
    if sum(given is not None for given in (texts, tokens, dataset)) != 1:
        raise InputError("give the inputs by exactly one of --texts FILE, --tokens FILE and --dataset PATH")
    if dataset is not None:
        return model.capture(layer, read_dataset(dataset, column=column))
    if texts is not None:
        return model.capture(layer, read_texts(texts))
    assert tokens is not None  # noqa: S101 - exactly one of them is given; narrows the type
    return read_tokens(tokens, width=model.resolve(layer).d)


def parse_device(text: str) -> torch.device:
    """Read ``cpu``, ``cuda`` or ``cuda:1``; refuses a device that this machine does not have.

    Raises:
        InputError: No such device.
    """
    if text.partition(":")[0] == "mps":
        raise InputError("device mps (Apple GPU) has no float64, in which every radius is proved; give cpu")
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


def output_norm(network: TokenMap, clean: TokenMeasure, goal: Goal) -> float | None:
    """Norm of what a displacement is measured of at the clean tokens; None of other goals."""
    if not isinstance(goal, Displacement):
        return None
    output, weights = network(clean.points, clean.mass), pool_weights(goal.pool, clean.mass)
    return float(torch.linalg.vector_norm(output if weights is None else weights @ output))


def require_methods(threats: Sequence[str], *, certificates: Sequence[str], attack: str | None) -> None:
    """Refuse certificates and attacks that do not exist, or that speak about none of these threats.

    Raises:
        UnknownNameError: No such certificate, attack or threat.
        InputError: Numbers of a threat that cannot be read; a foolbox attack that is refused.
        UnsupportedThreatError: An attack that does not search one of the threats, a certificate that covers none.
    """
    asked = [parse_threat(threat) for threat in threats]
    for method in map(method_named, certificates):
        if not any(type(threat) in method.threats for threat in asked):
            raise UnsupportedThreatError(
                f"certificate {method.name!r} does not speak about {' or '.join(threats)}; "
                "leave the certificates out to run all that apply"
            )
    if attack is not None:
        for threat in asked:
            attack_for(threat, attack)
