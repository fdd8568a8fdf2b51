"""L2 attention is Lipschitz on all of space: its constants (Kim, Papamakarios, Mnih 2021, repaired and sharpened)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import lambertw
from torch import Tensor

from attnrobust.certify.closed_form.claims import (
    PAGE,
    SPACE_REGION,
    Asked,
    Claim,
    Quantity,
    refuted,
    slope_claims,
    whole_output,
)
from attnrobust.certify.method import HEAD_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import HeadNorms, diameter, head_norms, spectral_norm
from attnrobust.certify.shared.reach import Reach, RowSums
from attnrobust.errors import InputError
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem

REFERENCE = "Kim, Papamakarios, Mnih, The Lipschitz constant of self-attention, ICML 2021 (arXiv 2006.04710)"
SATURATED = 1e3
"""Size, in units at which the spread reaches its limit on all of space, that stands for all of space."""


def spread_bound(odds: float) -> float:
    """Largest ``sum_j P_ij t_j`` for ``P_ij ~ mass_j e^{-t_j}``, ``t_i = 0``: the c with ``c e^{c+1} = odds``.

    Args:
        odds: Mass of the other tokens over the own mass, ``n - 1`` for equal masses; >= 0.
    """
    if not odds >= 0:
        raise InputError(f"odds must be >= 0; got {odds}")
    return round_up(float(lambertw(odds / math.e).real))


@dataclass(frozen=True, eq=False)
class _Global:
    inner: Float[Tensor, "h"]  # Lipschitz constant of x -> y = sqrt(scale) x w_q
    diameters: Float[Tensor, "h"]  # of the clean y
    views: tuple[HeadNorms, ...]
    rows: RowSums
    limit: float

    def change(self, size: float) -> Float[Tensor, "c"]:
        reach = self.rows.reach
        spread = torch.clamp((self.diameters + self.inner * reach.pair * size) ** 2, max=self.limit)
        each = spread.new_ones(reach.movable.shape[0])
        moved = self.rows.steady(each) * (1.0 + 2.0 * spread) * reach.token + 2.0 * spread * self.rows.moved(each)
        return smallest([size * view.total(view.norms * self.inner * moved) for view in self.views])


class KimL2(CertificateMethod):
    """Lipschitz bound of L2 attention, without any bound on the tokens.

    One head, ``c e^{c+1} = n - 1`` and ``y = sqrt(scale) x w_q``:
    ``Lip <= sqrt(scale) ||w_q|| ||sqrt(scale) w_q^T w_v w_o|| [ sqrt(n) (1 + 2c) + 2c ]`` in Frobenius norms, and
    ``(1 + 4c)`` in place of the bracket for the largest token move, one row and the mean. On the threat's set c is also
    at most the squared diameter of the y. Unequal masses enter through the smallest one. A causal mask changes nothing:
    every row is a softmax over fewer tokens, its own among them.
    """

    name = "kim2021-l2"
    reference = f"derived (docs/certificates-literature.md, section 12), after {REFERENCE}"
    region = "the threat's set; the constant itself holds on all of space"
    layers = (L2Attention,)
    features = HEAD_FEATURES | {"causal"}

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer = problem.network
        assert isinstance(layer, L2Attention)  # noqa: S101 - declared; narrows the type
        root = layer.factor**0.5
        points = root * torch.einsum("nd,hdk->hnk", problem.clean.points, layer.w_q)
        bound = _Global(
            inner=root * spectral_norm(layer.w_q),
            diameters=diameter(points),
            views=head_norms(layer, root * layer.w_q.transpose(-1, -2) @ layer.w_v, problem.resolved),
            rows=RowSums(problem.resolved.weights, Reach.of(problem)),
            limit=spread_bound(1.0 / float(problem.clean.mass.min()) - 1.0),
        )
        return ChangeBound(problem, bound.change)


def derived_constant(attention: L2Attention, n: int) -> Upper:
    """Frobenius Lipschitz constant of L2 attention on at most n tokens of equal mass, on all of space.

    One head, ``c e^{c+1} = n - 1``: ``scale ||w_q|| ||w_q^T w_v w_o|| [ sqrt(n) (1 + 2c) + 2c ]``.

    Args:
        attention: The attention.
        n: Largest number of tokens, >= 1.

    Returns:
        An upper bound on all of space.

    Raises:
        InputError: No tokens.

    References:
        Derived, docs/certificates-literature.md, section 12, after Kim, Papamakarios and Mnih, ICML 2021.
    """
    if n < 1:
        raise InputError(f"n must be >= 1; got {n}")
    c, root = spread_bound(n - 1.0), attention.factor**0.5
    views = head_norms(
        attention, root * attention.w_q.transpose(-1, -2) @ attention.w_v, whole_output(attention.device)
    )
    inner = root * spectral_norm(attention.w_q) * (n**0.5 * (1.0 + 2.0 * c) + 2.0 * c)
    value = float(smallest([view.total(view.norms * inner) for view in views]).amax())
    return Upper(round_up(value, relative=FORMULA))


def reported_constant(attention: L2Attention, n: int, *, norm: str = "l2") -> Upper:
    """The constants of the paper in their reported form, with the l2 exponent repaired; equal masses.

    With ``c e^{c+1} = n - 1``: l2 (Frobenius):
    ``sqrt(n) scale (4c + 1) (sum_h ||w_q||^4 ||w_v||^2)^{1/2} ||w_o||``; the second power of ``||w_q||`` in its place
    is wrong (width 1, n = 4, weight 100: 682.8 where the norm is 10^4). linf (largest entry of all tokens):
    ``scale (4c sqrt(k) + 1) ||w_o^T||_inf max_h ||w_q||_inf ||w_q^T||_inf max_h ||w_v^T||_inf`` with largest row sums.

    Args:
        attention: The layer.
        n: Token count, >= 1.
        norm: "l2" or "linf".

    Returns:
        An upper bound on all of space.

    Raises:
        InputError: Another norm or no tokens.

    References:
        Kim, Papamakarios, Mnih 2021 (form reported from the paper, which has scale = 1/sqrt(k)); proofs in
        docs/certificates-literature.md, section 12.
    """
    if norm not in ("l2", "linf") or n < 1:
        raise InputError("give n >= 1 tokens and norm 'l2' or 'linf'")
    c = spread_bound(n - 1.0)
    eye = torch.eye(attention.out_width, dtype=torch.float64, device=attention.device)
    w_o = eye if attention.w_o is None else attention.w_o.flatten(0, 1)
    if norm == "l2":
        heads = (spectral_norm(attention.w_q) ** 4 * spectral_norm(attention.w_v) ** 2).sum().sqrt()
        value = n**0.5 * attention.factor * (4.0 * c + 1.0) * float(heads * spectral_norm(w_o))
    else:
        queries = (_row_sums(attention.w_q) * _row_sums(attention.w_q.transpose(-1, -2))).amax()
        weights = float(_row_sums(w_o.T) * queries * _row_sums(attention.w_v.transpose(-1, -2)).amax())
        value = attention.factor * (4.0 * c * attention.key_width**0.5 + 1.0) * weights
    return Upper(round_up(value, relative=FORMULA))


def _row_sums(matrices: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    """Largest absolute row sum: the norm of a matrix between largest entries."""
    sums: Tensor = matrices.abs().sum(dim=-1).amax(dim=-1)
    return sums


def _everywhere(layer: L2Attention, asked: Asked) -> tuple[Tensor, float]:
    """Moves so large that the spread is at its limit on all of space."""
    slopes = layer.factor**0.5 * torch.linalg.matrix_norm(layer.w_q, 2)
    spread = max(spread_bound(asked.n - 1.0), 1.0)
    size = SATURATED * math.sqrt(spread) / float(slopes[slopes > 0].min()) if bool((slopes > 0).any()) else 1.0
    return torch.ones(asked.n, layer.width, dtype=torch.float64, device=asked.device), size


def _reported(quantity: Quantity, norm: str, repaired: str) -> Claim:
    return Claim(
        name="kim2021-l2-reported",
        quantity=quantity,
        layer=L2Attention,
        region=SPACE_REGION,
        conditions=f"L2 attention; equal masses{repaired}",
        reference=f"{REFERENCE}; form reported from the paper",
        value=lambda layer, asked: reported_constant(layer, asked.n, norm=norm),
    )


CLAIMS = slope_claims(KimL2(), L2Attention, around=_everywhere)
PUBLISHED_CLAIMS = (
    _reported(Quantity.BALL, "l2", "; exponent repaired"),
    _reported(Quantity.ENTRY, "linf", ""),
    refuted(
        "kim2021-l2-printed-exponent",
        Quantity.BALL,
        L2Attention,
        f"not a bound: it gives 682.8 where the norm is 10^4 ({PAGE}, section 11)",
    ),
)
