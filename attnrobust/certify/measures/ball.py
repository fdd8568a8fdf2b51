"""Measures in a ball of tokens: Lipschitz constants in W_p of the whole layer (mean field)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import masked_heads, mean_field_heads, slopes
from attnrobust.certify.measures.questions import OUTWARD_MASS, ball_radius, order_of, reads_all_rows, refuse_ball
from attnrobust.certify.method import ATTENTION_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import HeadNorms, head_norms, spectral_norm
from attnrobust.layers.attention import Attention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.threats.measures import CouplingBall, WassersteinBall


class MeasureBall(CertificateMethod):
    """Global Lipschitz constant in W_p on all measures in the threat's ball of radius R.

    One head, p = 1, 2: ``||M|| [ a + e^{2 a_c / p} (1 + kappa_p a_c) ]``; p = inf: ``||M|| (1 + a + a_c)``; sigmoid
    attention: ``||M|| (sigma(a + b) + a/2)`` for every p; causal attention with p = 2: the constant in d_2. A
    displacement of all rows under W_1 goes through ``W_2^2 <= diameter W_1``.
    """

    name = "measure-ball"
    reference = "derived (docs/measure-certificates.md, section 2), after Castin, Ablin, Peyre, ICML 2024"
    region = "every token measure of the threat with support in the ball"

    layers = (Attention, SigmoidAttention)
    features = ATTENTION_FEATURES
    threats = (CouplingBall, WassersteinBall)
    outward = OUTWARD_MASS

    def refuses_more(self, problem: Problem) -> str | None:
        layer, reason = problem.network, refuse_ball(problem)
        if reason is not None or math.isinf(order_of(problem)) or not isinstance(layer, Attention):
            return reason
        if layer.mask is not None:
            return "an additive mask has no constant for finite p; use coupling:inf"
        if layer.causal and order_of(problem) == 1:
            return "causal attention has no constant in d_1 (Hardy's inequality fails); use coupling:2 or coupling:inf"
        return None

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer = problem.network
        assert isinstance(layer, Attention | SigmoidAttention)  # noqa: S101 - declared; narrows the type
        views = head_norms(layer, layer.w_v, problem.resolved)
        order, whole = order_of(problem), reads_all_rows(problem)
        scale = problem.clean.n**0.5 if whole else 1.0

        def change(size: float) -> Tensor:
            radius = ball_radius(problem, size)
            if whole and order == 1:
                return scale * _from_first_order(layer, views, radius, size)
            return scale * size * _lipschitz(views, brackets(layer, radius, order))

        return ChangeBound(problem, change)


def brackets(layer: Attention | SigmoidAttention, radius: float, order: float) -> Float[Tensor, "h"]:
    """Constant of each head in W_p (d_p for a causal layer), for values of Lipschitz constant 1."""
    if isinstance(layer, SigmoidAttention):
        a = spectral_norm(layer.factor * layer.w_q @ layer.w_k.transpose(-1, -2)) * radius**2
        return torch.sigmoid(a + layer.shift) + 0.5 * a
    if math.isinf(order):  # masks change the weights only, and any weights have this constant
        query, key = slopes(layer, radius)
        return 1.0 + query + key
    return masked_heads(layer, radius) if layer.causal else mean_field_heads(layer, radius, order)


def _lipschitz(views: tuple[HeadNorms, ...], heads: Float[Tensor, "h"]) -> Float[Tensor, "c"]:
    return smallest([view.total(view.norms * heads) for view in views])


def _from_first_order(
    layer: Attention | SigmoidAttention, views: tuple[HeadNorms, ...], radius: float, size: float
) -> Float[Tensor, "c"]:
    """W_2 between outputs under a W_1 budget: ``W_2^2 <= D W_1``, in the outputs or already in the tokens."""
    tokens = math.sqrt(2.0 * radius * size) * _lipschitz(views, brackets(layer, radius, 2.0))
    diameter = smallest([view.total(2.0 * radius * view.norms) for view in views])
    added = tuple(view for view in views if view.stack is None)  # heads stack in L^p for p >= 2 only
    if not added:
        added = tuple(HeadNorms(view.norms, None) for view in views)
    outputs = (diameter * size * _lipschitz(added, brackets(layer, radius, 1.0))).sqrt()
    return torch.minimum(tokens, outputs)
