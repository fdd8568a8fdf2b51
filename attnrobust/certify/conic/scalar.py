"""Scalar bounds of the exponential remainder ``psi(u) = e^u - 1 - u`` over an interval, in log space.

``phi(u) = 2 psi(u) / u^2`` increases from 0 through phi(0) = 1. At saturated rows a weight w may be far below the
smallest float while ``w psi(U)`` is not: everything stays a logarithm until the end, and nothing is clamped.
"""

import math

import numpy as np
from jaxtyping import Float

Array = Float[np.ndarray, "..."]

CELLS = 256  # cells of [0, U], of relative width at most log(1 + U) / 256
SERIES = 1e-3  # below, the series replaces differences that cancel
SWITCH = 30.0  # above, log psi(u) = u + log(1 - (1 + u) e^-u) loses nothing
OUTWARD = 1.0 + 1e-11


def psi(u: Array) -> Array:
    """``e^u - 1 - u``, accurate near 0."""
    series = u * u * (0.5 + u * (1.0 / 6.0 + u * (1.0 / 24.0 + u / 120.0)))
    with np.errstate(over="ignore"):
        return np.asarray(np.where(np.abs(u) < SERIES, series, np.expm1(u) - u))


def second_difference(u: Array) -> Array:
    """``phi(u) = 2 psi(u) / u^2``."""
    safe = np.where(np.abs(u) < SERIES, 1.0, u)
    series = 1.0 + u * (1.0 / 3.0 + u * (1.0 / 12.0 + u / 60.0))
    return np.where(np.abs(u) < SERIES, series, 2.0 * psi(safe) / safe**2)


def log_psi(u: Array) -> Array:
    """``log psi(u)`` for u >= 0; -inf at 0."""
    with np.errstate(divide="ignore"):
        small = np.log(psi(np.minimum(u, SWITCH)))
    large = np.maximum(u, SWITCH)
    return np.asarray(np.where(u > SWITCH, large + np.log1p(-(1.0 + large) * np.exp(-large)), small))


def log_phi(u: Array) -> Array:
    """``log phi(u)`` for u >= 0."""
    safe = np.maximum(u, SERIES)
    near = np.log(second_difference(np.minimum(u, SERIES)))
    return np.asarray(np.where(u < SERIES, near, log_psi(safe) + np.log(2.0 / safe**2)))


def saturation(log_weight: Float[np.ndarray, "n"], limit: Float[np.ndarray, "n"]) -> tuple[Array, Array]:
    """Upper bounds of two suprema over 0 < u <= limit, with ``w = e^log_weight``.

    * ``f = sup 2 w psi(u) / (u^2 (1 + w psi(u)))``,
    * ``k = sup w (psi(u) / u) (1 - w u)_+ / (1 + w psi(u))``.

    On a cell [a, b] phi, psi/u and ``w psi / (1 + w psi)`` increase, so numerators are taken at b and the rest at a:
    ``f <= min{w phi(b) / (1 + w psi(a)), 2 w psi(b) / (a^2 (1 + w psi(b)))}``, and k alike.
    """
    cells = np.expm1(np.log1p(limit)[:, None] * (np.arange(CELLS + 1) / CELLS))
    cells[:, -1] = limit
    left, right = cells[:, :-1], cells[:, 1:]
    log_w = log_weight[:, None]
    reached = np.logaddexp(0.0, log_w + log_psi(left))
    share = log_w + log_psi(right)
    share = share - np.logaddexp(0.0, share)
    with np.errstate(divide="ignore"):
        log_left = np.log(left)  # -inf in the first cell, where the second bound is void
    first = np.minimum(log_w + log_phi(right) - reached, share + math.log(2.0) - 2.0 * log_left)
    slope = np.minimum(log_w + log_phi(right) + np.log(0.5 * right) - reached, share - log_left)
    cut = np.maximum(1.0 - np.exp(log_w) * left, 0.0)
    return np.exp(first).max(axis=1) * OUTWARD, (np.exp(slope) * cut).max(axis=1) * OUTWARD
