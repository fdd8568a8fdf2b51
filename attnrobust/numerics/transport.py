"""Exact optimal transport between token measures, with both sides of its value."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attnrobust.errors import AttnRobustError, InputError
from attnrobust.numerics.sides import Lower, Upper, round_down, round_up
from attnrobust.tokens import TokenMeasure

Order = Literal[1, 2] | float
"""Order p of W_p: 1, 2 or infinity."""

MASS_ROUNDING = 1e-12
"""Share of a mass that may cross a distance without counting as transport in W_inf (of each atom's for the upper side,
of the whole for the lower one); sums of masses round at about 1e-16."""
STEEPEST = 1e6
"""Ratio of the prices of forbidden moves of light and heavy atoms; more would cost the simplex its accuracy."""
SIMPLEX_STEPS = 10_000_000


class TransportError(AttnRobustError):
    """The linear program of a transport problem was not solved to the end."""


@dataclass(frozen=True, eq=False)
class Transport:
    """The distance W_p between two measures.

    Args:
        order: p.
        lower: A value that no coupling goes below (feasible dual prices; both sides agree up to rounding).
        upper: The cost of ``plan``.
        plan: A coupling (n, m): its rows sum to the first masses, its columns to the second.
    """

    order: float
    lower: Lower
    upper: Upper
    plan: Float[Tensor, "n m"]


def wasserstein(first: TokenMeasure, second: TokenMeasure, *, order: Order = 2) -> Transport:
    r"""The exact Wasserstein distance between two token measures.

    ``W_p = (min_plan sum_ij plan_ij |x_i - y_j|^p)^(1/p)``; for p = infinity the smallest t such that some plan moves
    all mass by at most t. Equal masses of equal number are solved as an assignment, everything else by the network
    simplex (no entropic or sliced approximation).

    Args:
        first: Atoms x with masses.
        second: Atoms y with masses, of the same width.
        order: p, one of 1, 2, infinity.

    Returns:
        The distance from both sides and an optimal plan. A distance travelled by the adversary is to be read from
        ``upper``, a change of the output from ``lower``.

    Raises:
        InputError: Another order, or different widths.
        TransportError: The solver gave up.
    """
    if order not in (1, 2, math.inf):
        raise InputError(f"order {order} is not supported; use 1, 2 or infinity")
    if first.width != second.width:
        raise InputError(f"the measures have widths {first.width} and {second.width}; they must agree")
    # Differences, not inner products: distances of 1e-8 between tokens of norm 10 keep all their digits.
    distance = torch.cdist(first.points, second.points, compute_mode="donot_use_mm_for_euclid_dist")
    table = distance.cpu().numpy()
    if math.isinf(order):
        return _bottleneck(first, second, table)
    cost = table if order == 1 else table**2
    if first.n == second.n and first.uniform and second.uniform:
        return _assignment(first, cost, float(order))
    return _simplex(first, second, cost, float(order))


def coupling_cost(
    displacement: Float[Tensor, "*b m d"], mass: Float[Tensor, "*c m"], *, order: Order = 2
) -> Float[Tensor, "*b"]:
    """Cost of moving every atom by its displacement, ``(sum_j mass_j |h_j|^p)^(1/p)``: an upper bound of W_p.

    Args:
        displacement: How far each atom moves.
        mass: Its mass; atoms without mass do not count.
        order: p, one of 1, 2, infinity.
    """
    length: Tensor = torch.linalg.vector_norm(displacement, dim=-1)
    if order == math.inf:
        return length.masked_fill(mass <= 0, 0.0).amax(dim=-1)
    if order == 1:
        return (mass * length).sum(dim=-1)
    if order == 2:
        return (mass * length**2).sum(dim=-1).sqrt()
    raise InputError(f"order {order} is not supported; use 1, 2 or infinity")


def _assignment(first: TokenMeasure, cost: NDArray[np.float64], order: float) -> Transport:
    rows, columns = linear_sum_assignment(cost)
    value = float(cost[rows, columns].sum()) / first.n
    plan = np.zeros_like(cost)
    plan[rows, columns] = 1.0 / first.n
    root = value ** (1.0 / order)
    return Transport(order, Lower(round_down(root)), Upper(round_up(root)), torch.from_numpy(plan))


def _simplex(first: TokenMeasure, second: TokenMeasure, cost: NDArray[np.float64], order: float) -> Transport:
    plan, u, _ = _emd(first, second, cost)
    a, b = _masses(first, second)
    # Any u is feasible with v_j = min_i (cost_ij - u_i): weak duality bounds every coupling from below.
    v = (cost - u[:, None]).min(axis=0)
    below = float(a @ u + b @ v)
    above = float((plan * cost).sum())
    rounding = 8 * np.finfo(np.float64).eps * (float(np.abs(u).max()) + float(np.abs(v).max()))
    lower = max(below - rounding, 0.0) ** (1.0 / order)
    return Transport(
        order, Lower(round_down(lower)), Upper(round_up(max(above, 0.0) ** (1.0 / order))), torch.from_numpy(plan)
    )


def _bottleneck(first: TokenMeasure, second: TokenMeasure, table: NDArray[np.float64]) -> Transport:
    """Smallest distance t whose forbidden moves (longer than t) need no mass: a search over the distances."""
    levels = np.unique(table)
    high, plan = _search_levels(first, second, table, levels, len(levels) - 1, _forbidden_strictly)
    low = high
    if high > 0 and _forbidden_loosely(first, second, table > levels[high - 1])[0]:
        low, _ = _search_levels(first, second, table, levels, high - 1, _forbidden_loosely)
    if plan is None:
        plan = _emd(first, second, table)[0]
    return Transport(math.inf, Lower(float(levels[low])), Upper(float(levels[high])), torch.from_numpy(plan))


def _search_levels(
    first: TokenMeasure,
    second: TokenMeasure,
    table: NDArray[np.float64],
    levels: NDArray[np.float64],
    high: int,
    passes: Callable[[TokenMeasure, TokenMeasure, NDArray[np.bool_]], tuple[bool, NDArray[np.float64]]],
) -> tuple[int, NDArray[np.float64] | None]:
    """Index of the smallest level (at most ``high``) beyond which a plan needs no mass; the plan if one was made."""
    low, plan = 0, None
    while low < high:
        middle = (low + high) // 2
        enough, candidate = passes(first, second, table > levels[middle])
        if enough:
            high, plan = middle, candidate
        else:
            low = middle + 1
    return high, plan


def _forbidden_strictly(
    first: TokenMeasure, second: TokenMeasure, forbidden: NDArray[np.bool_]
) -> tuple[bool, NDArray[np.float64]]:
    """Whether every atom, however light, gets all but its own rounding from allowed moves: for upper sides.

    A mass of 1e-13 may take all the attention, so a tolerance of the whole mass would let it travel for nothing.
    """
    a, b = _masses(first, second)
    lightest = np.minimum.outer(a, b)
    price = np.minimum(lightest.max() / lightest, STEEPEST)  # rounding is left to the heavy atoms
    plan = _emd(first, second, forbidden * price)[0]
    crossing = forbidden * plan
    kept = (crossing.sum(axis=1) <= MASS_ROUNDING * a).all() and (crossing.sum(axis=0) <= MASS_ROUNDING * b).all()
    return bool(kept), plan


def _forbidden_loosely(
    first: TokenMeasure, second: TokenMeasure, forbidden: NDArray[np.bool_]
) -> tuple[bool, NDArray[np.float64]]:
    """Whether forbidden moves need no more than the rounding of the whole mass: for lower sides."""
    plan, _, crossing = _emd(first, second, forbidden.astype(np.float64))
    return crossing <= MASS_ROUNDING, plan


def _masses(first: TokenMeasure, second: TokenMeasure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = first.mass.cpu().numpy(), second.mass.cpu().numpy()
    return a / a.sum(), b / b.sum()  # both sums to the last place, as the solver demands


def _emd(
    first: TokenMeasure, second: TokenMeasure, cost: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    import ot

    a, b = _masses(first, second)
    plan, log = ot.emd(a, b, np.ascontiguousarray(cost), numItermax=SIMPLEX_STEPS, log=True)
    if log["warning"] is not None:
        raise TransportError(f"exact transport of {first.n} to {second.n} atoms failed: {log['warning']}")
    return plan, log["u"], float((plan * cost).sum())
