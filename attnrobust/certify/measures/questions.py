"""What certificates for token measures read from a problem, and what cannot be answered soundly.

Goals are read as the attacks read them: the mass-weighted mean of all atoms, any atom of the goal's row, or for a
displacement of all rows ``sqrt(n) W_2`` between the output measures. With ``Copies``, all rows and one row are the
original tokens.
"""

import math

import torch

from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import DOMAIN_ROUNDING, CouplingBall, MeasureThreat
from attnrobust.tokens import MASS_SUM_TOLERANCE

OUTWARD_MASS = 1.0 + 8.0 * MASS_SUM_TOLERANCE
"""Room on every used share; token measures divide their masses by the sum, so the bounds do not rest on it."""


def ball_of(problem: Problem) -> MeasureThreat:
    """The ball of measures that the problem asks about."""
    threat = problem.threat
    assert isinstance(threat, MeasureThreat)  # noqa: S101 - the template refuses others; narrows the type
    return threat


def copies_of(problem: Problem) -> Copies:
    """The copies that the problem asks about."""
    threat = problem.threat
    assert isinstance(threat, Copies)  # noqa: S101 - the template refuses others; narrows the type
    return threat


def order_of(problem: Problem) -> float:
    """Order p of the distance."""
    return float(ball_of(problem).order)


def row_of(problem: Problem) -> int | None:
    """The one row that the goal reads, or None."""
    pool = getattr(problem.goal, "pool", None)
    return pool if isinstance(pool, int) else None


def reads_all_rows(problem: Problem) -> bool:
    """Whether all rows count, as ``sqrt(n) W_2`` between output measures."""
    return problem.resolved.weights is None


def clean_radius(problem: Problem) -> float:
    """Largest norm of a clean token."""
    return float(torch.linalg.vector_norm(problem.clean.points, dim=-1).max())


def ball_radius(problem: Problem, size: float) -> float:
    """Radius of a ball around 0 that holds every atom of the threat's set of this size."""
    threat, clean = ball_of(problem), clean_radius(problem)
    reach = clean + size if math.isinf(threat.order) else math.inf
    declared = math.inf if threat.domain_radius is None else threat.domain_radius
    # An atom on the boundary may round beyond it; the clean tokens themselves may have done so.
    return max(min(reach, declared * (1.0 + 2.0 * DOMAIN_ROUNDING)), clean)


def refuse_ball(problem: Problem) -> str | None:
    """Why a ball of measures has no sound answer here, with the cure; None where it may have one."""
    threat, row = ball_of(problem), row_of(problem)
    masked = has_mask(problem)
    if type(threat) is not CouplingBall and (masked or row is not None):
        what = "the layer's mask" if masked else "a goal on one row"
        return (
            f"{what} needs to know which token an atom came from, and {threat.key!r} does not say; "
            f"use {CouplingBall(threat.order).key!r}, where every atom has a parent"
        )
    if math.isinf(threat.order):
        return None
    if row is not None:
        return (
            f"under {threat.key!r} an atom of row {row} with a tiny mass moves as far as it likes, so its "
            "output has no bound; use 'coupling:inf', or read the mean (pool 'mean')"
        )
    if threat.domain_radius is None:
        return (
            f"under {threat.key!r} a tiny mass moves as far as it likes; declare the largest norm of a token, as "
            f"in '{threat.key}:within:R' (domain_radius=R)"
        )
    return None


def refuse_masks(problem: Problem) -> str | None:
    """Why a bound for attention without masks does not speak about the problem; None if it does."""
    if has_mask(problem):
        return "it speaks about attention without any mask; coupling:inf has certificates for masks"
    return None


def refuse_order(problem: Problem, *orders: float) -> str | None:
    """Why a bound for some orders p does not speak about the problem; None if it does."""
    if order_of(problem) in orders:
        return None
    names = " or ".join("inf" if math.isinf(p) else f"{p:g}" for p in orders)
    return f"it speaks about balls of measures with p = {names}, not {problem.threat.key!r}"


def has_mask(problem: Problem) -> bool:
    """Whether the layer hides or weighs pairs of tokens by their places."""
    layer = problem.network
    return isinstance(layer, Attention) and (layer.causal or layer.mask is not None)
