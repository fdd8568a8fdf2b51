"""Upper bounds of the norm of the derivative at given tokens: closed forms for attention, and the singular value."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.claims import PAGE, Asked, Claim, Quantity, input_of
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.token_map import TokenMap
from attnrobust.lipschitz.derivative_map import attention_jacobian, derivative_map, mass_weighted
from attnrobust.numerics.linear_map import largest_singular_value_upper
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.numerics.softmax import derivative_norm_upper
from attnrobust.numerics.triangle import product_norm, triangle

AT_X = "the input X alone"
CANCELLATION = 1e-14  # error of E[v k] - E[v] E[k] in units of the second moments: sums of up to 1e4 terms stay inside


def local_norm_upper(jacobian: AttentionJacobian, *, mass: Float[Tensor, "n"] | None = None) -> Upper:
    """Upper bound of ``||D_X f||_2`` (Frobenius norms on both sides) without any iteration.

    One head, with ``o_i`` its averages, ``q_i`` scaled queries, ``C_i = Cov_i(v, k)``:
    ``||P||_2 ||w_v|| + max_i ||C_i w_q^T|| + (max_j sum_i P_ij lambda_max(Cov_i(v)) ||w_k q_i||^2)^{1/2}``.
    Heads: the smaller of the sum with ``w_o`` inside each head, and ``||[w_o^1; ...; w_o^h]||`` times the root of the
    sum of squares. It says nothing about a ball around the tokens.

    Args:
        jacobian: The derivative at one input (n, d).
        mass: Measure the norm of ``D^{1/2} J D^{-1/2}``, D = diag(mass), instead (the W_2-local norm at these masses).

    Returns:
        A deterministic upper bound; it is attained on some inputs and typically 1.6 times the norm.

    Raises:
        InputError: The tokens are a batch.

    References:
        Derived; proof in docs/certificates-literature.md, "Local bound at the clean input".
    """
    return _combined(jacobian, lambda w_o: _head_bounds(jacobian, w_o, mass))


def softmax_norm_upper(jacobian: AttentionJacobian) -> Upper:
    """Upper bound of ``||D_X f||_2`` through the norm of each row's softmax derivative (Yudin type).

    One head: ``||P|| ||M|| + max_i g_1(P_i) ||X_c M|| (||X_c B^T|| + ||G||)`` with ``M = w_v w_o``, rows of ``G`` the
    key gradients ``x_i B + scale w_k b_q``, ``X_c`` the centred tokens and g_1 of ``numerics.softmax``. Usually larger
    than ``local_norm_upper``.

    Args:
        jacobian: The derivative at one input (n, d).

    Returns:
        A deterministic upper bound at the clean input; it says nothing about a ball.

    References:
        Derived (docs/certificates-literature.md, section 7), of the type of Yudin et al. 2025 (arXiv 2507.07814).
    """
    parts = _score_parts(jacobian)
    sharp = derivative_norm_upper(jacobian.weights).amax(dim=-1)
    values = jacobian.values - jacobian.values.mean(dim=-2, keepdim=True)
    scores = torch.linalg.matrix_norm(parts.queries, 2) + torch.linalg.matrix_norm(parts.keys, 2)

    def heads(w_o: Tensor | None) -> Tensor:
        moved = values if w_o is None else values @ w_o
        fixed = torch.linalg.matrix_norm(jacobian.weights, 2) * _value_norms(jacobian.attention.w_v, w_o)
        total: Tensor = fixed + sharp * torch.linalg.matrix_norm(moved, 2) * scores
        return total

    return _combined(jacobian, heads)


def diameter_norm_upper(jacobian: AttentionJacobian) -> Upper:
    """Upper bound of ``||D_X f||_2`` from the diameter of the tokens: a valid form of a published estimate.

    One head: ``sqrt(3/2) ||M|| ( max_i max(|x_i B^T|, |G_i|)^2 r^2 (n + 1) + n )^{1/2}``, r the largest distance of two
    tokens and ``G_i`` the key gradients. The published code of Castin et al. 2024 uses
    ``||M|| (max_i |G_i|^2 r^2 (n+1) + n)^{1/2}``, which is not a bound: for n = 2 it gives 1.41 at norm 100.01.

    Args:
        jacobian: The derivative at one input (n, d).

    Returns:
        A deterministic upper bound at the clean input; it says nothing about a ball.

    References:
        Derived, docs/certificates-literature.md, section 7.
    """
    parts, n = _score_parts(jacobian), jacobian.n
    lengths = [torch.linalg.vector_norm(part, dim=-1).amax(dim=-1) for part in (parts.uncentred, parts.keys)]
    distances = torch.cdist(jacobian.points, jacobian.points, compute_mode="donot_use_mm_for_euclid_dist")
    slope = (1.5 * (torch.maximum(*lengths).square() * distances.max().square() * (n + 1) + n)).sqrt()

    def heads(w_o: Tensor | None) -> Tensor:
        norms: Tensor = slope * _value_norms(jacobian.attention.w_v, w_o)
        return norms

    return _combined(jacobian, heads)


@dataclass(frozen=True, eq=False)
class _ScoreParts:
    queries: Tensor  # centred gradients of the scores in the query token, (h, n, d)
    uncentred: Tensor
    keys: Tensor  # gradients in the key token, (h, n, d)


def _value_norms(w_v: Float[Tensor, "h d v"], w_o: Float[Tensor, "h v e"] | None) -> Float[Tensor, "h"]:
    """``||w_v w_o||_2`` per head, or ``||w_v||_2``."""
    if w_o is not None:
        return product_norm(w_v, w_o.mT)
    norms: Tensor = torch.linalg.matrix_norm(w_v, 2)
    return norms


def _score_parts(jacobian: AttentionJacobian) -> _ScoreParts:
    layer = jacobian.attention
    queries = jacobian.keys @ layer.w_q.transpose(-1, -2)
    keys = jacobian.queries @ layer.w_k.transpose(-1, -2)
    return _ScoreParts(queries - queries.mean(dim=-2, keepdim=True), queries, keys)


def _combined(jacobian: AttentionJacobian, heads: Callable[[Tensor | None], Tensor]) -> Upper:
    """Heads added up with ``w_o`` inside, or stacked; the smaller."""
    if jacobian.points.ndim != 2:
        raise InputError("the local bound needs one input (n, d), not a batch")
    if jacobian.attention.rotary is not None:
        raise UnsupportedModelError("closed bounds do not cover rotary positions; use derivative_norm")
    plain = float(torch.linalg.vector_norm(heads(None)))
    w_o = jacobian.attention.w_o
    if w_o is None:  # concatenated heads write to orthogonal parts of the output
        return Upper(round_up(plain))
    stacked = float(torch.linalg.matrix_norm(w_o.flatten(0, 1), 2)) * plain
    return Upper(round_up(min(float(heads(w_o).sum()), stacked)))


def _head_bounds(jacobian: AttentionJacobian, w_o: Tensor | None, mass: Tensor | None) -> Tensor:
    """Each head's bound (h,), after its output projection if one is given."""
    layer, weights = jacobian.attention, jacobian.weights
    centred = jacobian.values - jacobian.averages.mean(dim=-2, keepdim=True)  # covariances do not see a common shift
    if mass is not None:
        weights_in = mass.sqrt()[:, None] * weights / mass.sqrt()
        columns = mass[:, None] * weights / mass
    else:
        weights_in, columns = weights, weights
    value = torch.linalg.matrix_norm(weights_in, 2) * _value_norms(layer.w_v, w_o)
    query = _query_blocks(jacobian, centred, w_o).amax(dim=-1)
    spread = _largest_variance(weights, centred, w_o)
    directions = jacobian.queries @ layer.w_k.transpose(-1, -2)
    key = torch.einsum("hij,hi->hj", columns, spread * directions.square().sum(dim=-1)).amax(dim=-1).sqrt()
    total: Tensor = value + query + key
    return total


def _query_blocks(jacobian: AttentionJacobian, centred: Tensor, w_o: Tensor | None) -> Tensor:
    """``||w_o^T Cov_i(v, k) w_q^T||_2`` for every head and query, (h, n)."""
    layer, weights = jacobian.attention, jacobian.weights
    keys = jacobian.keys - (weights @ jacobian.keys).mean(dim=-2, keepdim=True)
    cross, slack = _covariance(weights, centred, keys)
    right = triangle(layer.w_q)  # ||C w_q^T|| = ||C R^T||
    cross, slack = cross @ right.transpose(-1, -2)[:, None], slack * _norms(right)
    if w_o is not None:
        left = triangle(w_o.transpose(-1, -2))
        cross, slack = left[:, None] @ cross, slack * _norms(left)
    norms: Tensor = torch.linalg.matrix_norm(cross, 2)
    return norms + slack


def _largest_variance(weights: Tensor, centred: Tensor, w_o: Tensor | None) -> Tensor:
    """``lambda_max(w_o^T Cov_i(v) w_o)`` for every head and query, (h, n)."""
    covariance, slack = _covariance(weights, centred, centred)
    if w_o is not None:
        left = triangle(w_o.transpose(-1, -2))
        covariance, slack = left[:, None] @ covariance @ left.transpose(-1, -2)[:, None], slack * _norms(left) ** 2
    largest: Tensor = torch.linalg.eigvalsh(covariance)[..., -1]
    return largest.clamp_min(0.0) + slack


def _norms(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices, 2)
    return norms[:, None]


def _covariance(weights: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cross covariances (h, n, v, k) under each row of weights, and what the subtraction of the means may have lost."""
    outer = (first[..., :, None] * second[..., None, :]).flatten(-2)
    joint = (weights @ outer).reshape(*first.shape, second.shape[-1])
    mean = (weights @ first)[..., :, None] * (weights @ second)[..., None, :]
    sizes = (weights @ first.square().sum(-1, keepdim=True)) * (weights @ second.square().sum(-1, keepdim=True))
    return joint - mean, CANCELLATION * sizes.squeeze(-1).sqrt()


# ---- claims --------------------------------------------------------------------------------------------------------


def _singular_value(network: TokenMap, asked: Asked) -> Upper:
    return largest_singular_value_upper(derivative_map(network, input_of(asked)), seed=asked.seed)


def _weighted_singular_value(network: TokenMap, asked: Asked) -> Upper:
    clean = input_of(asked)
    return largest_singular_value_upper(mass_weighted(derivative_map(network, clean), clean.mass), seed=asked.seed)


def _weighted_covariances(layer: Attention, asked: Asked) -> Upper:
    clean = input_of(asked)
    return local_norm_upper(attention_jacobian(layer, clean), mass=clean.mass)


def _exact(quantity: Quantity, value: Callable[[TokenMap, Asked], Upper]) -> Claim:
    return Claim(
        name="singular-value",
        quantity=quantity,
        layer=None,
        region=AT_X,
        conditions="every differentiable layer",
        reference="decomposition or Lanczos bound (docs/spectral-norms.md)",
        value=value,
    )


def _closed_form(
    name: str, section: int, value: Callable[[Attention, Asked], Upper], quantity: Quantity, masses: str
) -> Claim:
    return Claim(
        name=f"local-{name}",
        quantity=quantity,
        layer=Attention,
        region=AT_X,
        conditions=f"dot-product attention; every mask{masses}",
        reference=f"derived ({PAGE}, section {section})",
        value=value,
    )


def _at_input(name: str, section: int, bound: Callable[[AttentionJacobian], Upper]) -> Claim:
    def value(layer: Attention, asked: Asked) -> Upper:
        return bound(attention_jacobian(layer, input_of(asked)))

    return _closed_form(name, section, value, Quantity.LOCAL, ", all masses")


CLAIMS = (
    _exact(Quantity.LOCAL, _singular_value),
    _at_input("covariances", 6, local_norm_upper),
    _at_input("softmax-norm", 7, softmax_norm_upper),
    _at_input("diameter", 7, diameter_norm_upper),
)
MASS_CLAIMS = (
    _exact(Quantity.LOCAL_MASS, _weighted_singular_value),
    _closed_form("covariances", 6, _weighted_covariances, Quantity.LOCAL_MASS, ""),
)
"""Where the masses differ."""
