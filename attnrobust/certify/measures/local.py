"""Measures near a given one, p = 1 and 2: the exponential knows the clean input's own scores (derived)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import hoelder_factor, slopes
from attnrobust.certify.measures.questions import (
    OUTWARD_MASS,
    ball_radius,
    clean_radius,
    order_of,
    reads_all_rows,
    refuse_ball,
    refuse_order,
)
from attnrobust.certify.method import ATTENTION_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import head_norms
from attnrobust.certify.shared.reach import attention_of
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall, WassersteinBall


@dataclass(frozen=True, eq=False)
class CleanQueries:
    """Clean tokens as queries: how much weight mass anywhere in the ball could get from them.

    Args:
        order: p, 1 or 2.
        radius: R.
        mass: Masses (n,).
        slope: ``|beta_i|`` (h, n), the gradient of row i's scores in the key token.
        room: ``log max_{|y| <= R} e^{beta_i . y} / Z_i`` (h, n), ``Z_i = sum_j mass_j e^{beta_i . x_j}``.
        weight: ``rho_i``: the largest ``sum_j P_ij |h_j|`` per unit of the coupling cost (h, n).
        spread: ``sigma_i = (sum_j (P_ij |x_j - m_i|)^2 / mass_j)^{1/2}`` (h, n).
        reach: Largest distance of an average of clean tokens to an average of tokens in the ball.
    """

    order: float
    radius: float
    mass: Float[Tensor, "n"]
    slope: Float[Tensor, "h n"]
    room: Float[Tensor, "h n"]
    weight: Float[Tensor, "h n"]
    spread: Float[Tensor, "h n"]
    reach: float

    @classmethod
    def of(cls, problem: Problem, layer: Attention) -> "CleanQueries":
        """Evaluate the clean input."""
        clean, order, radius = problem.clean, order_of(problem), ball_radius(problem, 0.0)
        points, mass = clean.points, clean.mass
        beta = layer.factor * layer.queries(points) @ layer.w_k.transpose(-1, -2)  # (h, n, d)
        slope = torch.linalg.vector_norm(beta, dim=-1)
        scores = beta @ points.T
        normaliser = torch.logsumexp(scores + mass.log(), dim=-1)
        density = (scores - normaliser[..., None]).exp()  # P_ij / mass_j
        means = (density * mass) @ points
        away = torch.cdist(means, points.expand(means.shape[0], -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
        weight = density.amax(dim=-1) if order == 1 else (density.square() @ mass).sqrt()
        return cls(
            order=order,
            radius=radius,
            mass=mass,
            slope=slope,
            room=slope * radius - normaliser,
            weight=weight,
            spread=((density * away).square() @ mass).sqrt(),
            reach=radius + clean_radius(problem),
        )

    def change(self, size: float) -> Float[Tensor, "h n"]:
        """Bound of ``|Gamma_nu(x_i) - Gamma_mu(x_i)|`` at the clean queries, for values of Lipschitz constant 1."""
        root = (self.room / self.order).exp()
        ball = self.slope * self.radius
        anywhere = (1.0 + 2.0 * ball) * root * size
        drift = self.slope * self.weight * size
        along = (1.0 + hoelder_factor(self.order) * ball) * root * _mean_exponential(drift / self.order) * size
        bounds = [anywhere, along, torch.full_like(anywhere, self.reach)]
        if self.order == 2:
            first = (self.weight + self.slope * self.spread) * size
            second = self.room.exp() * self.slope * (1.0 + ball) * size**2
            bounds.append(drift.exp() * (first + second))
        return torch.stack([bound.nan_to_num(nan=math.inf, posinf=math.inf) for bound in bounds]).amin(dim=0)


class MeasureLocal(CertificateMethod):
    """Sharper than ``measure-ball`` for one input, p = 1, 2: only clean queries meet the exponential.

    ``Gamma_nu(x') - Gamma_mu(x_i)`` splits at ``Gamma_nu(x_i)``: the query part is at most
    ``||M|| ||B|| R^2 |x' - x_i|``, the rest ``||M|| (1 + 2 R |beta_i|) (e^{|beta_i| R} / Z_i)^{1/p} eps`` with the
    scores that the clean input really has; for p = 2 also an exact first order there with a remainder in ``eps^2``.
    """

    name = "measure-local"
    reference = "derived (docs/measure-certificates.md, section 3)"
    region = "every token measure of the threat with support in the ball"

    layers = (Attention,)
    features = ATTENTION_FEATURES - {"mask", "causal"}
    threats = (CouplingBall, WassersteinBall)
    outward = OUTWARD_MASS

    def refuses_more(self, problem: Problem) -> str | None:
        return refuse_ball(problem) or refuse_order(problem, 1.0, 2.0)

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer = attention_of(problem)
        views = head_norms(layer, layer.w_v, problem.resolved)
        query = slopes(layer, ball_radius(problem, 0.0))[0]
        heads = _pooled(CleanQueries.of(problem, layer), query)
        if reads_all_rows(problem):
            heads = _whole(CleanQueries.of(problem, layer), query, problem.clean.n)

        def change(size: float) -> Tensor:
            return smallest([view.total(view.norms * heads(size)) for view in views])

        return ChangeBound(problem, change)


Heads = Callable[[float], Float[Tensor, "h"]]


def _pooled(queries: CleanQueries, slope: Float[Tensor, "h"]) -> Heads:
    """Mean of the changes: ``E|x' - x| <= eps`` for every p."""
    return lambda size: slope * size + queries.change(size) @ queries.mass


def _whole(queries: CleanQueries, slope: Float[Tensor, "h"], n: int) -> Heads:
    """``sqrt(n)`` times the L^2 norm of the changes; under W_1, ``E|x' - x|^2 <= (R + R_0) E|x' - x|``."""

    def heads(size: float) -> Tensor:
        moved = math.sqrt(queries.reach * size) if queries.order == 1 else size
        changed: Tensor = (queries.change(size).square() @ queries.mass).sqrt()
        total: Tensor = float(n) ** 0.5 * (slope * moved + changed)
        return total

    return heads


def _mean_exponential(exponent: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """``int_0^1 e^{t z} dt``."""
    mean: Tensor = torch.where(exponent > 0, exponent.expm1() / exponent.clamp_min(1e-300), 1.0)
    return mean
