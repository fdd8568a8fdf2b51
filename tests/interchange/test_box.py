"""Boxes in and around the sets of threats, and how their bounds are rounded."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, UnsupportedThreatError
from attnrobust.interchange.box import Box, Precision, Side, box_of
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.threats.parse import parse_threat
from tests.assertions import shapes_unchecked

CLEAN = torch.tensor([[0.1, -7.3, 1e-3], [250.1, 0.0, -1.0 / 3.0]], dtype=torch.float64)
KEYS = ("frobenius", "per-token", "per-token-l1", "per-token-linf", "token:1", "per-token:0")


def corners(box: Box) -> Tensor:
    """Moves to the farthest corner, and to every face."""
    low, high = box.lower - CLEAN, box.upper - CLEAN
    far = torch.where(low.abs() > high.abs(), low, high)
    faces = [
        torch.zeros_like(far).index_put((torch.tensor(i), torch.tensor(j)), far[i, j])
        for i in range(2)
        for j in range(3)
    ]
    return torch.stack([far, *faces])


@pytest.mark.parametrize("key", KEYS)
def test_an_inscribed_box_is_in_the_set_and_touches_it(key: str) -> None:
    threat = parse_threat(key)
    assert isinstance(threat, MoveThreat)
    box = box_of(threat, CLEAN, 0.3, side="inscribed", precision="float64")
    farthest = threat.distance(corners(box)).max()
    assert farthest <= 0.3 * (1 + 1e-15)  # the distance itself is computed
    assert farthest >= 0.3 * (1 - 1e-12)


@pytest.mark.parametrize("key", [*KEYS, "any-token"])
def test_an_enclosing_box_holds_the_set_and_no_smaller_one_does(key: str) -> None:
    threat = parse_threat(key)
    assert isinstance(threat, MoveThreat)
    box = box_of(threat, CLEAN, 0.3, side="enclosing", precision="float64")
    gradient = torch.randn(400, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes = torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)
    moved = CLEAN + 0.3 * torch.cat([threat.steepest(one)[None] for one in (*gradient, *axes, *-axes)])
    assert bool(((moved >= box.lower - 1e-13) & (moved <= box.upper + 1e-13)).all())
    movable = threat.movable(2)[:, None].expand(2, 3)
    torch.testing.assert_close(moved.amax(0)[movable], box.upper[movable], rtol=1e-12, atol=1e-12)
    assert bool((box.lower[~movable] == CLEAN[~movable]).all())


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("side", ["inscribed", "enclosing"])
def test_bounds_are_rounded_to_their_side(side: Side, precision: Precision) -> None:
    """In exact arithmetic, to the nearest number of the precision on that side."""
    dtype = {"float32": torch.float32, "float64": torch.float64}[precision]
    box = box_of(PerTokenBall("linf"), CLEAN, 0.1, side=side, precision=precision)
    towards = math.inf if side == "inscribed" else -math.inf
    for bound, sign, direction in ((box.lower, -1, towards), (box.upper, 1, -towards)):
        assert bool((bound == bound.to(dtype).double()).all())
        back = torch.nextafter(bound.to(dtype), torch.full_like(bound, -direction, dtype=dtype)).double()
        for clean, found, beyond in zip(CLEAN.flatten(), bound.flatten(), back.flatten(), strict=True):
            exact = Fraction(float(clean)) + sign * Fraction(0.1)
            inner, outer = sorted((Fraction(float(found)), Fraction(float(beyond))))
            assert inner <= exact <= outer
            assert exact not in (inner, outer) or exact == Fraction(float(found))


def test_a_box_threat_needs_no_side_and_certifies() -> None:
    box = box_of(PerTokenBall("linf"), CLEAN, 0.1, side=None, precision="float32")
    assert (box.side, box.exact, box.half_width) == ("enclosing", True, 0.1)
    assert box.unsat == "no move within the radius breaks the goal of the exported network"


@pytest.mark.parametrize(
    ("key", "side", "says"),
    [
        ("frobenius", None, "is no box"),
        ("per-token-l1", None, "box enclosing"),
        ("any-token", "inscribed", "token:I"),
        ("wasserstein:2", "enclosing", "does more than move tokens"),
        ("copies:1", "enclosing", "does more than move tokens"),
    ],
)
def test_what_no_box_says_is_refused(key: str, side: Side | None, says: str) -> None:
    with pytest.raises(UnsupportedThreatError, match=says):
        box_of(parse_threat(key), CLEAN, 0.1, side=side, precision="float32")


def test_numbers_that_the_precision_does_not_have_are_refused() -> None:
    with pytest.raises(InputError, match=r"no float32 number lies within .* token 0, entry 0"):
        box_of(FrobeniusBall((1,)), CLEAN, 0.1, side="inscribed", precision="float32")
    with pytest.raises(InputError, match="beyond the range of float32"):
        box_of(PerTokenBall("linf"), CLEAN, 1e39, side=None, precision="float32")
    with pytest.raises(InputError, match="epsilon"):
        box_of(PerTokenBall("linf"), CLEAN, 0.0, side=None, precision="float32")
    with shapes_unchecked(), pytest.raises(UnknownNameError, match="inscribed"):
        box_of(PerTokenBall("linf"), CLEAN, 0.1, side="inside", precision="float32")  # type: ignore[arg-type]


class Subclass(PerTokenBall):
    """Somebody's own threat."""


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    with pytest.raises(UnsupportedThreatError):
        box_of(Subclass("linf"), CLEAN, 0.1, side="enclosing", precision="float32")
