"""Lipschitz constants of attention as a map of token measures in a ball, in the Wasserstein distances W_p."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_smooth import REFERENCE
from attnrobust.certify.closed_form.claims import MEASURES_REGION, PAGE, Claim, Quantity
from attnrobust.certify.method import ATTENTION_FEATURES
from attnrobust.certify.shared.head_sizes import bilinear_norm, output_norms, spectral_norm
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.features import features_of
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up

EXPONENTS = 400  # grid of Hoelder exponents of the masked bound; every one gives a valid bound


def mean_field_constant(attention: Attention, radius: float, *, order: float = 2.0, form: str = "derived") -> Upper:
    """Lipschitz constant in W_p of ``mu -> (Gamma_mu)_# mu`` on all token measures in the ball of a radius.

    One head, ``a = ||B|| R^2``, ``a_c = R (||B|| R + |scale w_k b_q|)``: the derived form is
    ``||M|| [ a + e^{2 a_c / p} (1 + kappa_p a_c) ]``, ``kappa_p = max(1, 2^{2/p - 1})``; the reported form, for all p,
    ``||M|| (1 + 3 a_c) e^{2 a_c}``. It covers moving, duplicating, splitting and merging tokens, and all changes of
    masses.

    Args:
        attention: The layer, without any mask.
        radius: R >= 0, the ball's radius around 0.
        order: p in [1, inf].
        form: "derived" or "reported".

    Returns:
        An upper bound (infinity where the exponential leaves float64).

    Raises:
        InputError: A mask, a negative radius, an order below 1, or a form that does not exist.

    References:
        Castin, Ablin, Peyre, ICML 2024 (form reported from the paper); derived form: docs/certificates-literature.md,
        section 9.
    """
    _check(attention, radius, order, form)
    if attention.causal:
        raise InputError("a token measure has no order; use masked_constant for a causal layer")
    if form == "reported":
        key = slopes(attention, radius)[1]
        heads = (1.0 + 3.0 * key) * _exp(2.0 * key)
    else:
        heads = mean_field_heads(attention, radius, order)
    return _over_heads(attention, heads, order)


def mean_field_heads(attention: Attention, radius: float, order: float) -> Float[Tensor, "h"]:
    """The derived constant of each head for values of Lipschitz constant 1, without the outward rounding."""
    query, key = slopes(attention, radius)
    return query + _exp(2.0 * key / order) * (1.0 + hoelder_factor(order) * key)


def masked_constant(attention: Attention, radius: float) -> Upper:
    """Lipschitz constant of causal attention in d_2, for measures on positions and tokens with equal positions.

    ``d_2(mu, nu)^2 = int W_2(mu(.|s), nu(.|s))^2 dtheta(s)``. One head:
    ``||M|| [ a + min_{1 <= r < 2} e^{2 a_c / r} (2/(2-r))^{1/r} (1 + 2^{2/r - 1} a_c) ]``; 2/(2-r) is Hardy's factor.
    The constant of attention without mask does not hold here.

    Args:
        attention: A causal layer without additive mask.
        radius: R >= 0.

    Returns:
        An upper bound for every position marginal theta; n tokens of equal mass in order are one case, where d_2 is
        the Frobenius norm over sqrt(n).

    Raises:
        InputError: A layer that is not causal, an additive mask, a negative radius.

    References:
        Derived, docs/certificates-literature.md, section 10.
    """
    _check(attention, radius, 2.0, "derived")
    if not attention.causal:
        raise InputError("the layer is not causal; use mean_field_constant")
    return _over_heads(attention, masked_heads(attention, radius), 2.0)


def masked_heads(attention: Attention, radius: float) -> Float[Tensor, "h"]:
    """The causal constant in d_2 of each head for values of Lipschitz constant 1, without the outward rounding."""
    query, key = slopes(attention, radius)
    best = torch.full_like(key, math.inf)
    for r in _hoelder_exponents():
        hardy = (2.0 / (2.0 - r)) ** (1.0 / r)
        best = torch.minimum(best, _exp(2.0 * key / r) * hardy * (1.0 + 2.0 ** (2.0 / r - 1.0) * key))
    return query + best


def kernel_constant(attention: KernelAttention, *, order: float = 1.0) -> Upper:
    """Lipschitz constant in W_p of attention with a general kernel on the compact convex set of its stated constants.

    ``||w_v|| [ (D/2) l_q + e^{omega / p} (1 + kappa_p (D/2) l_k) ]`` with the diameter D, the oscillation omega and the
    slopes l_q, l_k of the kernel's logarithm.

    Args:
        attention: The layer; its ``constants`` must be given.
        order: p in [1, inf].

    Returns:
        An upper bound, as good as the constants that the user stated.

    Raises:
        InputError: No constants, or an order below 1.

    References:
        Derived (docs/certificates-literature.md, section 9), in place of the W_1 theorem of Vuckovic, Baratin and
        Tachet des Combes 2020 (arXiv 2007.02876), whose constant we have not read.
    """
    known = attention.constants
    if known is None:
        raise InputError("the kernel's constants are not known; give KernelConstants to the layer")
    if not order >= 1.0:
        raise InputError(f"order {order} is not in [1, inf]")
    half = 0.5 * known.diameter
    oscillation = torch.tensor(known.oscillation / order, dtype=torch.float64)
    inner = half * known.query_slope + float(_exp(oscillation)) * (1.0 + hoelder_factor(order) * half * known.key_slope)
    return Upper(round_up(float(spectral_norm(attention.w_v)) * inner, relative=FORMULA))


def slopes(attention: Attention, radius: float) -> tuple[Float[Tensor, "h"], Float[Tensor, "h"]]:
    """``a = ||B|| R^2`` and ``a_c = R (||B|| R + |scale w_k b_q|)`` of every head.

    Raises:
        UnsupportedModelError: Scores that depend on the tokens' places otherwise than by a mask.
    """
    placed = features_of(attention) - ATTENTION_FEATURES
    if placed:
        raise UnsupportedModelError(f"a layer with {', '.join(sorted(placed))} is no map of token measures")
    bilinear = bilinear_norm(attention) * radius
    return bilinear * radius, radius * (bilinear + torch.linalg.vector_norm(attention.key_offset, dim=-1))


def _over_heads(attention: Attention, heads: Float[Tensor, "h"], order: float) -> Upper:
    """Heads added up; for p >= 2 also stacked (Minkowski in L^{p/2} needs p >= 2)."""
    plain = spectral_norm(attention.w_v) * heads
    added = float((output_norms(attention) * heads).sum())
    if order < 2.0:
        return Upper(round_up(added, relative=FORMULA))
    stack = 1.0 if attention.w_o is None else float(spectral_norm(attention.w_o.flatten(0, 1)))
    return Upper(round_up(min(added, stack * float(torch.linalg.vector_norm(plain))), relative=FORMULA))


def hoelder_factor(order: float) -> float:
    """``kappa_p``: R times it bounds the L^q norm of what is centred in the ball, 1/p + 1/q = 1."""
    return max(1.0, math.pow(2.0, 2.0 / order - 1.0))


def _exp(exponent: Tensor) -> Tensor:
    return exponent.exp()  # overflow gives infinity, which says "no bound"


def _hoelder_exponents() -> Iterator[float]:
    return (1.0 + k / EXPONENTS for k in range(EXPONENTS))


def _check(attention: Attention, radius: float, order: float, form: str) -> None:
    if attention.mask is not None:
        raise InputError("an additive mask is for one sequence of tokens; measures have no rows to mask")
    if not radius >= 0 or not order >= 1.0 or form not in ("derived", "reported"):
        raise InputError("give a radius >= 0, an order p >= 1, and form 'derived' or 'reported'")


ORDERS = ((Quantity.W1, 1.0), (Quantity.W2, 2.0), (Quantity.W_INF, math.inf))


def _measures(quantity: Quantity, order: float, form: str, reference: str) -> Claim:
    return Claim(
        name=f"castin2024-measures-{form}",
        quantity=quantity,
        layer=Attention,
        region=MEASURES_REGION,
        conditions="dot-product attention without mask; moving, splitting, duplication, any masses",
        reference=reference,
        value=lambda layer, asked: mean_field_constant(layer, asked.radius, order=order, form=form),
    )


CLAIMS = tuple(
    _measures(quantity, order, form, reference)
    for quantity, order in ORDERS
    for form, reference in (
        ("reported", f"{REFERENCE}; form reported from the paper"),
        ("derived", f"derived ({PAGE}, section 9)"),
    )
)
CAUSAL_CLAIMS = (
    Claim(
        name="castin2024-measures-causal",
        quantity=Quantity.D2,
        layer=Attention,
        region=MEASURES_REGION + ", equal position marginals",
        conditions="causal dot-product attention without additive mask",
        reference=f"derived ({PAGE}, section 10)",
        value=lambda layer, asked: masked_constant(layer, asked.radius),
    ),
)
