"""Exact first order and a bound of the second derivative, for measures (derived)."""

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import slopes
from attnrobust.certify.closed_form.singla2020_curvature import SinglaCurvature
from attnrobust.certify.measures.questions import (
    OUTWARD_MASS,
    ball_radius,
    order_of,
    reads_all_rows,
    refuse_ball,
    refuse_masks,
    refuse_order,
    row_of,
)
from attnrobust.certify.method import ATTENTION_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.first_order import first_order
from attnrobust.certify.shared.head_sizes import head_norms
from attnrobust.certify.shared.reach import attention_of, visible_tokens
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.linear_map import scale_tokens
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall


class MeasureCurvature(CertificateMethod):
    """Mean readouts under p = 2 or p = inf: ``change <= G eps + K eps^2 / 2``, exact to first order.

    To first order the mean of a split token's children moves it like a single token, so G is the gradient's norm over
    the masses: ``(sum_j |g_j|^2 / mass_j)^{1/2}`` for p = 2, ``sum_j |g_j|`` for p = inf. K bounds the second
    derivative along the straight path of the coupling; for p = 2 it carries the exponential of the ball.
    """

    name = "measure-curvature"
    reference = "derived (docs/measure-certificates.md, section 4)"
    region = "every token measure of the threat with support in the ball"

    layers = (Attention,)
    features = ATTENTION_FEATURES
    threats = (CouplingBall, WassersteinBall)
    outward = OUTWARD_MASS

    def refuses_more(self, problem: Problem) -> str | None:
        reason = refuse_ball(problem) or refuse_order(problem, 2.0, float("inf"))
        if reason is not None:
            return reason
        if reads_all_rows(problem) or row_of(problem) is not None:
            return "its first order holds for the mean over all atoms only; read the mean (pool 'mean')"
        if order_of(problem) == 2:
            return refuse_masks(problem)
        if int(visible_tokens(attention_of(problem), problem.clean.n).sum()) < 2:
            return "with one visible token its pairs of children are not covered; other certificates are"
        return None

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        if order_of(problem) != 2:
            each = Problem(problem.network, problem.clean, PerTokenBall(), problem.goal)
            return SinglaCurvature().prepare(each, seed=seed)
        layer = attention_of(problem)
        jacobian = AttentionJacobian(layer, problem.clean.points, problem.mass)
        together = Problem(problem.network, problem.clean, FrobeniusBall(), problem.goal)
        scaled = scale_tokens(jacobian.linear_map(), problem.clean.mass.rsqrt())
        first = first_order(together, scaled, seed=seed)
        views = head_norms(layer, layer.w_v, problem.resolved)
        heads = second_derivative(layer, ball_radius(problem, 0.0))
        second = smallest([view.total(view.norms * heads) for view in views])

        def change(size: float) -> Tensor:
            return first.slopes * size + 0.5 * second * size**2

        return ChangeBound(problem, change, failure_probability=first.failure_probability)


def second_derivative(layer: Attention, radius: float) -> Float[Tensor, "h"]:
    """Bound of ``E |d^2/dt^2 Gamma_{mu_t}(x_t)| / W_2^2`` on measures in the ball, for values of Lipschitz constant 1.

    ``4 b R k + 2 beta k^2 + 2 R (b R + beta k)^2`` with ``b = ||B||``, ``beta = b R + |scale w_k b_q|``,
    ``k = e^{beta R}``.
    """
    query, key = slopes(layer, radius)  # b R^2 and beta R
    density = key.exp()
    if radius == 0.0:
        offset: Tensor = torch.linalg.vector_norm(layer.key_offset, dim=-1)
        return 2.0 * offset
    curved: Tensor = (4.0 * query * density + 2.0 * key * density**2 + 2.0 * (query + key * density) ** 2) / radius
    return curved
