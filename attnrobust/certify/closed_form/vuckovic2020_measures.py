"""Attention as an integral operator of a kernel: W_p on a compact set, and inputs that are not what was specified.

After Vuckovic, Baratin and Tachet des Combes, whose constants we have not read; these are derived, with the proofs in
docs/certificates-literature.md, section 9.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import hoelder_factor, slopes
from attnrobust.certify.closed_form.claims import MEASURES_REGION, PAGE, Asked, Claim, Quantity
from attnrobust.certify.shared.head_sizes import spectral_norm
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.numerics.transport import Order, wasserstein
from attnrobust.tokens import TokenMeasure, as_positive

REFERENCE = f"derived ({PAGE}, section 9), after Vuckovic et al. 2020 (arXiv 2007.02876)"
REGION = MEASURES_REGION + "; of kernel attention: on the set E of its constants"


@dataclass(frozen=True, eq=False)
class _Kernel:
    """What each head's kernel ``exp(s(x, y))`` does on the set, for tokens as the head's averages see them."""

    maps: Float[Tensor, "h"]  # norm from an average to the output, times that from tokens to what is averaged
    query: Float[Tensor, "h"]  # norm of Cov(y, ds/dx)
    key: Float[Tensor, "h"]  # half the diameter times the Lipschitz constant of s in y
    oscillation: Float[Tensor, "h"]  # of s in y


def general_kernel_constant(layer: TokenMap, radius: float, *, order: float = 1.0) -> Upper:
    """Lipschitz constant in W_p of attention with any known kernel, on the token measures of a ball.

    One head with tokens of diameter D, oscillation omega of ``s(x, .)`` and slopes l_q, l_k in query and key:
    ``||M|| [ (D/2) l_q + e^{omega/p} (1 + kappa_p (D/2) l_k) ]``, ``kappa_p = max(1, 2^{2/p - 1})``. Dot products have
    ``(D/2) l_q = a``, ``(D/2) l_k = a_c`` and omega ``2 a_c``; L2 attention, with ``rho = sqrt(scale) ||w_q|| R``, has
    ``2 rho^2``, ``4 rho^2`` and ``4 rho^2``. It covers moves, splits, copies, merges and every change of masses.

    Args:
        layer: Dot-product or L2 attention without mask, or kernel attention (on the set of its constants).
        radius: R > 0 of the ball around 0; kernel attention does not use it.
        order: p in [1, inf].

    Returns:
        An upper bound; heads add up.

    Raises:
        UnsupportedModelError: Another layer, or a mask.
        InputError: A kernel without constants, a radius that is not positive, an order below 1.

    References:
        Derived, docs/certificates-literature.md, section 9; in place of the W_1 theorem of Vuckovic et al. 2020.

    Examples:
        >>> one = torch.ones(1, 1, 1)
        >>> layer = L2Attention(w_q=one, w_v=one, scale=1.0)
        >>> round(general_kernel_constant(layer, 0.5).value, 3)  # 1/2 + e (1 + 2)
        8.655
    """
    kernel = _kernel(layer, radius)
    return _upper(kernel.maps * (kernel.query + _context(kernel, order)))


def context_constant(layer: TokenMap, radius: float, *, order: float = 1.0) -> Upper:
    """How far the output at one fixed query moves per unit of W_p by which its context changes.

    ``||M|| e^{omega/p} (1 + kappa_p (D/2) l_k)`` in the notation of ``general_kernel_constant``, without the
    query's own term.

    Args:
        layer: As there.
        radius: R > 0; the query and both contexts lie in the ball.
        order: p in [1, inf].

    Returns:
        An upper bound.

    Raises:
        UnsupportedModelError: Another layer, or a mask.
        InputError: As in ``general_kernel_constant``.

    References:
        Derived, docs/certificates-literature.md, section 9.
    """
    kernel = _kernel(layer, radius)
    return _upper(kernel.maps * _context(kernel, order))


@dataclass(frozen=True)
class MisspecifiedInput:
    """What is proved about the output when another input is given than the one that was meant.

    Args:
        order: p of W_p.
        radius: R of the ball that holds both inputs.
        distance: W_p between the inputs, from above.
        outputs: W_p between the measures of the outputs, from above.
        row: Change of the output at any query of the ball, from above.
    """

    order: float
    radius: float
    distance: Upper
    outputs: Upper
    row: Upper


def misspecified_input(
    layer: TokenMap, meant: TokenMeasure, given: TokenMeasure, *, radius: float | None = None, order: Order = 1
) -> MisspecifiedInput:
    """Bound what a wrong input does: tokens replaced, moved, dropped, copied or weighed otherwise.

    ``W_p(F(mu), F(nu)) <= L W_p(mu, nu)`` with L the ``general_kernel_constant``, and at one query the
    ``context_constant`` in its place; the distance of the inputs is exact transport.

    Args:
        layer: As in ``general_kernel_constant``.
        meant: The input that was meant.
        given: The input that is given; any number of tokens and any masses.
        radius: R; None means the largest token norm of both.
        order: p, one of 1, 2, infinity.

    Returns:
        The bounds.

    Raises:
        UnsupportedModelError: Another layer, or a mask.
        InputError: Tokens outside of the ball, or as in ``general_kernel_constant``.

    References:
        Application of Vuckovic et al. 2020; constants derived, docs/certificates-literature.md, section 9.
    """
    largest = max(float(torch.linalg.vector_norm(one.points, dim=-1).max()) for one in (meant, given))
    radius = largest if radius is None else as_positive("radius", radius)
    if largest > radius:
        raise InputError(f"a token has norm {largest:.6g}, outside of the ball of radius {radius:.6g}")
    distance = wasserstein(meant, given, order=order).upper
    outputs, row = (
        Upper(round_up(constant(layer, radius, order=float(order)).value * distance.value))
        for constant in (general_kernel_constant, context_constant)
    )
    return MisspecifiedInput(float(order), radius, distance, outputs, row)


# ---- the kernels ---------------------------------------------------------------------------------------------------


def _kernel(layer: TokenMap, radius: float) -> _Kernel:
    if getattr(layer, "causal", False) or getattr(layer, "mask", None) is not None:
        raise UnsupportedModelError("a masked layer is no map of token measures; leave the mask out")
    if type(layer) is Attention:
        query, key = slopes(layer, as_positive("radius", radius))
        return _Kernel(spectral_norm(layer.value_output), query, key, 2.0 * key)
    if type(layer) is L2Attention:
        return _l2(layer, as_positive("radius", radius))
    if type(layer) is KernelAttention:
        return _stated(layer)
    raise UnsupportedModelError(f"no kernel with known constants is behind {type(layer).__name__}")


def _l2(layer: L2Attention, radius: float) -> _Kernel:
    """``y = sqrt(scale) x w_q`` has norm at most rho; ``s = -|y_i - y_j|^2``, whose part in the query alone cancels."""
    root = math.sqrt(layer.factor)
    inner = root * spectral_norm(layer.w_q)
    square = (inner * radius).square()
    after = root * layer.w_q.transpose(-1, -2) @ layer.w_v
    outer = spectral_norm(after if layer.w_o is None else after @ layer.w_o)
    return _Kernel(outer * inner, 2.0 * square, 4.0 * square, 4.0 * square)


def _stated(layer: KernelAttention) -> _Kernel:
    known = layer.constants
    if known is None:
        raise InputError("the kernel's constants are not known; give KernelConstants to the layer")
    half = 0.5 * known.diameter
    numbers = (half * known.query_slope, half * known.key_slope, known.oscillation)
    query, key, oscillation = (torch.tensor([value], dtype=torch.float64) for value in numbers)
    return _Kernel(spectral_norm(layer.w_v)[None].cpu(), query, key, oscillation)


def _context(kernel: _Kernel, order: float) -> Float[Tensor, "h"]:
    if not order >= 1.0:
        raise InputError(f"order {order} is not in [1, inf]")
    return (kernel.oscillation / order).exp() * (1.0 + hoelder_factor(order) * kernel.key)  # infinity says "no bound"


def _upper(heads: Float[Tensor, "h"]) -> Upper:
    return Upper(round_up(float(heads.sum()), relative=FORMULA))


# ---- claims --------------------------------------------------------------------------------------------------------


def _kernel_claim(quantity: Quantity, order: float) -> Claim:
    def value(layer: TokenMap, asked: Asked) -> Upper:
        if type(layer) is Attention and quantity is not Quantity.W1:
            raise InputError("for dot products it is castin2024-measures-derived")
        return general_kernel_constant(layer, asked.radius, order=order)

    return Claim(
        name="vuckovic2020-kernel", quantity=quantity, layer=None, region=REGION, reference=REFERENCE, value=value,
        conditions="dot-product, L2 and kernel attention without mask; any masses",
    )  # fmt: skip


def _context_claim(layer: TokenMap, asked: Asked) -> Upper:
    return context_constant(layer, asked.radius)


CLAIMS = (
    _kernel_claim(Quantity.W1, 1.0),
    _kernel_claim(Quantity.W2, 2.0),
    _kernel_claim(Quantity.W_INF, math.inf),
    Claim(
        name="vuckovic2020-misspecified", quantity=Quantity.CONTEXT, layer=None, region=REGION, reference=REFERENCE,
        conditions="one fixed query; its context is another measure; no mask", value=_context_claim,
    ),
)  # fmt: skip
