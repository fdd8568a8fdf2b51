"""Exact first order and a bound of the second derivative, for measures (derived)."""

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import slopes
from attnrobust.certify.closed_form.singla2020_curvature import SinglaCurvature
from attnrobust.certify.measures.method import MeasureMethod, attention_in, order_of, refuse_layer, refuse_order
from attnrobust.certify.measures.question import MeasureQuestion
from attnrobust.certify.method import PreparedBound
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.first_order import first_order
from attnrobust.certify.shared.head_sizes import head_norms
from attnrobust.certify.shared.reach import visible_tokens
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.linear_map import scale_tokens
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall


class MeasureCurvature(MeasureMethod):
    """Mean readouts under p = 2 or p = inf: ``change <= G eps + K eps^2 / 2``, exact to first order.

    To first order the mean of a split token's children moves it like a single token, so G is the gradient's norm over
    the masses: ``(sum_j |g_j|^2 / mass_j)^{1/2}`` for p = 2, ``sum_j |g_j|`` for p = inf. K bounds the second
    derivative along the straight path of the coupling; for p = 2 it carries the exponential of the ball.
    """

    name = "measure-curvature"
    reference = "derived (docs/measure-certificates.md, section 4)"
    region = "every token measure of the threat with support in the ball"

    def refuses(self, question: MeasureQuestion) -> str | None:
        reason = refuse_order(question, 2.0, float("inf")) or refuse_layer(question, masks=order_of(question) != 2)
        if reason is not None:
            return reason
        if question.whole or question.row is not None:
            return "its first order holds for the mean over all atoms only; read the mean (pool 'mean')"
        if order_of(question) != 2 and int(visible_tokens(attention_in(question), question.problem.clean.n).sum()) < 2:
            return "with one visible token its pairs of children are not covered; other certificates are"
        return None

    def prepare(self, question: MeasureQuestion, *, seed: int) -> PreparedBound:
        problem = question.problem
        if order_of(question) != 2:
            each = Problem(problem.network, problem.clean, PerTokenBall(), problem.goal)
            return SinglaCurvature().prepare(each, seed=seed)
        layer = attention_in(question)
        jacobian = AttentionJacobian(layer, problem.clean.points, problem.mass)
        together = Problem(problem.network, problem.clean, FrobeniusBall(), problem.goal)
        scaled = scale_tokens(jacobian.linear_map(), problem.clean.mass.rsqrt())
        first = first_order(together, scaled, seed=seed)
        views = head_norms(layer, layer.w_v, problem.resolved)
        heads = second_derivative(layer, question.radius(0.0))
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
