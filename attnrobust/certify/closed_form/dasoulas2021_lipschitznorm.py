"""LipschitzNorm attention is Lipschitz on all of space (Dasoulas, Scaman, Virmaux 2021; sharper constant derived)."""

import math

import torch

from attnrobust.certify.closed_form.claims import PAGE, SPACE_REGION, Claim, Quantity, slope_claims, whole_output
from attnrobust.certify.method import HEAD_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import head_norms, spectral_norm
from attnrobust.certify.shared.reach import Reach
from attnrobust.errors import InputError
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem


class LipschitzNormGlobal(CertificateMethod):
    """Lipschitz bound of attention with normalised scores, without any bound on the tokens.

    One head, ``e_n = min(e, sqrt(n))``: in Frobenius norms ``Lip <= ||w_o|| (e_n ||w_v|| + ||w_q|| + ||w_k|| + s)``, s
    the sum of the two largest of ``||w_q||, ||w_k||, ||w_v||``. Other threats and pooled outputs through their
    Frobenius norms.
    """

    name = "dasoulas2021-lipschitznorm"
    reference = (
        "derived (docs/certificates-literature.md, section 15), after Dasoulas, Scaman, Virmaux, Lipschitz "
        "normalization for self-attention layers, ICML 2021"
    )
    region = "all of space"
    layers = (LipschitzNormAttention,)
    features = HEAD_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer = problem.network
        assert isinstance(layer, LipschitzNormAttention)  # noqa: S101 - declared; narrows the type
        eye = torch.eye(layer.value_width, dtype=torch.float64, device=layer.device).expand(layer.heads, -1, -1)
        norms = torch.stack([spectral_norm(w) for w in (layer.w_q, layer.w_k, layer.w_v)])
        heads = min(math.e, math.sqrt(problem.clean.n)) * norms[2] + norms[0] + norms[1]
        heads = heads + norms.sum(dim=0) - norms.amin(dim=0)
        weights = problem.resolved.weights
        pooled = 1.0 if weights is None else float(torch.linalg.vector_norm(weights))
        slope = pooled * Reach.of(problem).frobenius
        views = head_norms(layer, eye, problem.resolved)
        slopes = smallest([slope * view.total(view.norms * heads) for view in views])
        return ChangeBound(problem, lambda size: slopes * size)


def joint_constant(n: int, *, form: str = "derived") -> Upper:
    """Frobenius Lipschitz constant of one head in (Q, K, V) jointly, n queries and keys.

    "derived": ``max over pairs`` of the section's coefficients, at most ``sqrt(5 + (1 + min(e, sqrt(n)))^2) <= 4.34``;
    "reported": ``e^{sqrt(3)} + 2 sqrt(6) = 10.55``.

    Args:
        n: Token count, >= 1.
        form: "derived" or "reported".

    Raises:
        InputError: Another form, or no tokens.

    References:
        Dasoulas, Scaman, Virmaux 2021 (form reported from the paper); docs/certificates-literature.md, section 15.
    """
    if form not in ("derived", "reported") or n < 1:
        raise InputError("give n >= 1 tokens and form 'derived' or 'reported'")
    if form == "reported":
        return Upper(round_up(math.exp(math.sqrt(3.0)) + 2.0 * math.sqrt(6.0), relative=FORMULA))
    values = min(math.e, math.sqrt(n))
    pairs = ((2.0, 2.0, values), (2.0, 1.0, values + 1.0))
    return Upper(round_up(max(math.hypot(*pair) for pair in pairs), relative=FORMULA))


def constant_through_joint(attention: LipschitzNormAttention, n: int, *, form: str = "derived") -> Upper:
    """Frobenius Lipschitz constant in X through the joint one: ``joint ||[w_q w_k w_v]||`` per head.

    Args:
        attention: The layer; heads add up or are stacked.
        n: Token count, >= 1.
        form: As in ``joint_constant``.

    Returns:
        An upper bound on all of space.

    Raises:
        InputError: Another form, or no tokens.

    References:
        As in ``joint_constant``; ``|(dQ, dK, dV)|_F = |H [w_q w_k w_v]|_F``.
    """
    side_by_side = torch.cat([attention.w_q, attention.w_k, attention.w_v], dim=-1)
    heads = joint_constant(n, form=form).value * spectral_norm(side_by_side)
    eye = torch.eye(attention.value_width, dtype=torch.float64, device=attention.device)
    views = head_norms(attention, eye.expand(attention.heads, -1, -1), whole_output(attention.device))
    value = float(smallest([view.total(view.norms * heads) for view in views]).amax())
    return Upper(round_up(value, relative=FORMULA))


def _through_joint(form: str, reference: str) -> Claim:
    return Claim(
        name=f"dasoulas2021-joint-{form}",
        quantity=Quantity.BALL,
        layer=LipschitzNormAttention,
        region=SPACE_REGION,
        conditions="LipschitzNorm attention; equal masses; through the constant in (Q, K, V)",
        reference=reference,
        value=lambda layer, asked: constant_through_joint(layer, asked.n, form=form),
    )


PUBLISHED_CLAIMS = (
    _through_joint("reported", "Dasoulas, Scaman, Virmaux, ICML 2021; form reported from the paper"),
    _through_joint("derived", f"derived ({PAGE}, section 15)"),
)
CLAIMS = slope_claims(LipschitzNormGlobal(), LipschitzNormAttention)
