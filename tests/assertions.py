"""Helpers that raise; none returns a truth value that a test could forget to look at."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from torch import Tensor

from attnrobust.errors import AttnRobustError
from attnrobust.threats.moves import MoveThreat


def assert_close(actual: Tensor, expected: Tensor, *, rtol: float, atol: float = 0.0, what: str = "values") -> None:
    """``|actual - expected| <= atol + rtol max |expected|``, NaN never equal; names the worst entry."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not bool(torch.isfinite(expected).all()):
        raise AssertionError(f"{what}: the expected values are not finite")
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = (actual - expected).abs()
    worst = float(error.max()) if error.numel() else 0.0
    allowed = atol + rtol * scale
    if not worst <= allowed:
        at = int(error.nan_to_num(nan=math.inf).argmax())
        raise AssertionError(
            f"{what}: differs by {worst:.3g} > {allowed:.3g} at flat index {at}: "
            f"{float(actual.flatten()[at])!r}, expected {float(expected.flatten()[at])!r}"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, *, what: str = "values") -> None:
    """Equal entry by entry, without any tolerance."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape or not torch.equal(actual, expected):
        raise AssertionError(f"{what}: not bit for bit the same")


def assert_at_most(lower: float, upper: float, *, rtol: float = 0.0, what: str = "bound") -> None:
    """``lower <= upper (1 + rtol)``; NaN on either side fails."""
    slack = rtol * abs(upper) if rtol else 0.0  # 0 times an infinite bound is NaN
    if not lower <= upper + slack:
        raise AssertionError(f"{what}: {lower!r} exceeds {upper!r} by {lower - upper:.3g}")


def assert_in_set(threat: MoveThreat, delta: Tensor, epsilon: float, *, rtol: float = 1e-12) -> None:
    """Every perturbation of the batch is within ``epsilon``; the tolerance covers the rounding of one rescaling."""
    distance = threat.distance(delta)
    if not bool((distance <= epsilon * (1 + rtol)).all()):
        raise AssertionError(f"{threat.key}: distance {float(distance.max())!r} is outside of {epsilon!r}")


@contextmanager
def refused(kind: type[AttnRobustError], *words: str) -> Iterator[None]:
    """The block raises ``kind`` with a one-line message that holds every one of ``words``."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    if "\n" in message or not message:
        raise AssertionError(f"the message is not one line: {message!r}")
    for word in words:
        if not re.search(word, message):
            raise AssertionError(f"the message does not name {word!r}: {message!r}")


@contextmanager
def shapes_unchecked() -> Iterator[None]:
    """The block runs as it does for users, without the tests' shape checks, so that the package's own refusals show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
