"""Sigmoid attention on tokens in a ball: Lipschitz in every W_p without an exponential (derived)."""

import torch

from attnrobust.certify.closed_form.claims import (
    BALL_REGION,
    MEASURES_REGION,
    PAGE,
    Asked,
    Claim,
    Quantity,
    slope_claims,
)
from attnrobust.certify.method import HEAD_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import head_norms, spectral_norm
from attnrobust.certify.shared.reach import Reach, RowSums
from attnrobust.errors import InputError
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem


class SigmoidBall(CertificateMethod):
    """Lipschitz bound of sigmoid attention on tokens in a ball.

    One head, ``a = ||B|| R^2``, b the shift: ``Lip <= ||M|| [ sqrt(n) ||mass||_2 (sigma(a + b) + a/4) + a/4 ]`` in
    Frobenius norms (``sqrt(n) ||mass||_2 = 1`` for equal masses); ``sigma(a + b) + a/2`` in the bracket for one row,
    the mean, and moves measured by the largest token move.
    """

    name = "sigmoid-ball"
    reference = "derived (docs/certificates-literature.md, section 14)"
    region = "all tokens in the centred ball of the clean radius plus the threat's reach"
    layers = (SigmoidAttention,)
    features = HEAD_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer = problem.network
        assert isinstance(layer, SigmoidAttention)  # noqa: S101 - declared; narrows the type
        views = head_norms(layer, layer.w_v, problem.resolved)
        rows = RowSums(problem.resolved.weights, Reach.of(problem))
        reach, clean = rows.reach, problem.clean
        each = torch.ones(clean.n, dtype=torch.float64, device=layer.device)
        movers = clean.mass * reach.movable
        average = min(reach.frobenius * float(torch.linalg.vector_norm(movers)), reach.token * float(movers.sum()))
        bilinear = spectral_norm(layer.factor * layer.w_q @ layer.w_k.transpose(-1, -2))
        radius0 = float(torch.linalg.vector_norm(clean.points, dim=-1).max())

        def change(size: float) -> torch.Tensor:
            a = bilinear * (radius0 + reach.token * size) ** 2
            steady = (torch.sigmoid(a + layer.shift) + 0.25 * a) * average * rows.steady(each)
            heads = steady + 0.25 * a * rows.moved(each)
            return smallest([size * view.total(view.norms * heads) for view in views])

        return ChangeBound(problem, change)


def mean_field_constant(attention: SigmoidAttention, radius: float) -> Upper:
    """Lipschitz constant in every W_p, 1 <= p <= inf, on token measures in the ball: ``||M|| (sigma(a + b) + a/2)``.

    Args:
        attention: The layer; heads add up. b is its shift, ``a = ||B|| R^2``.
        radius: R >= 0.

    Raises:
        InputError: A negative radius.

    References:
        Derived, docs/certificates-literature.md, section 14.
    """
    if not radius >= 0:
        raise InputError(f"the radius must be >= 0; got {radius}")
    a = spectral_norm(attention.factor * attention.w_q @ attention.w_k.transpose(-1, -2)) * radius**2
    maps = attention.w_v if attention.w_o is None else attention.w_v @ attention.w_o
    heads = spectral_norm(maps) * (torch.sigmoid(a + attention.shift) + 0.5 * a)
    return Upper(round_up(float(heads.sum()), relative=FORMULA))


def _centred_ball(layer: SigmoidAttention, asked: Asked) -> tuple[torch.Tensor, float]:
    return torch.zeros(asked.n, layer.width, dtype=torch.float64, device=asked.device), asked.radius


CLAIMS = slope_claims(SigmoidBall(), SigmoidAttention, region=BALL_REGION, around=_centred_ball)
MEASURE_CLAIMS = tuple(
    Claim(
        name="sigmoid-measures",
        quantity=quantity,
        layer=SigmoidAttention,
        region=MEASURES_REGION,
        conditions="sigmoid attention; any masses; no exponential",
        reference=f"derived ({PAGE}, section 14)",
        value=lambda layer, asked: mean_field_constant(layer, asked.radius),
    )
    for quantity in (Quantity.W1, Quantity.W2, Quantity.W_INF)
)
