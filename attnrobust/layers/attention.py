"""Multi-head dot-product self-attention as a frozen, exact specification in float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.features import PLAIN, used_features
from attnrobust.layers.heads import ScaledHeadSpecification, combine, log_mass, project
from attnrobust.tokens import as_tensor, tensor_digest


@dataclass(frozen=True, eq=False)
class Attention(ScaledHeadSpecification):
    """Dot-product attention ``f(X)_i = sum_h (sum_j P^h_ij v^h_j) w_o^h + b_o``.

    ``q = x w_q + b_q``, ``k = x w_k + b_k``, ``v = x w_v + b_v`` per head, scores
    ``s_ij = scale <q_i, k_j> + mask_ij + log(mass_j)`` and ``P = softmax_j(s)``. Equal masses cancel in the softmax.
    Without ``w_o`` the heads are concatenated (output width h v) and ``b_o`` is added if given.

    Args:
        w_q: Query weights (h, d, k).
        w_k: Key weights (h, d, k).
        w_v: Value weights (h, d, v).
        b_q: Query bias (h, k) or None.
        b_k: Key bias (h, k) or None; it cancels in the softmax only up to a row constant, so it is kept.
        b_v: Value bias (h, v) or None.
        w_o: Output projection (h, v, e) or None.
        b_o: Output bias (e,) or None.
        scale: Factor on the scores; None means 1/sqrt(k).
        mask: Additive score mask (n, n), finite or -inf, or None; it fixes n.
        causal: Query i sees keys j <= i only (any n).

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights, a mask row that hides every key.
    """

    w_q: Float[Tensor, "h d k"]
    w_k: Float[Tensor, "h d k"]
    w_v: Float[Tensor, "h d v"]
    b_q: Float[Tensor, "h k"] | None = None
    b_k: Float[Tensor, "h k"] | None = None
    b_v: Float[Tensor, "h v"] | None = None
    w_o: Float[Tensor, "h v e"] | None = None
    b_o: Float[Tensor, "e"] | None = None
    scale: float | None = None
    mask: Float[Tensor, "n n"] | None = None
    causal: bool = False

    feature_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("w_q", "w_k", "w_v"), PLAIN),
        **dict.fromkeys(("b_q", "b_k", "b_v", "b_o"), "bias"),
        "w_o": "out_projection",
        "scale": "scale",
        "mask": "mask",
        "causal": "causal",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is not None:
            object.__setattr__(self, "mask", _checked_mask(self.mask, causal=self.causal).to(self.w_q.device))

    @property
    def features(self) -> frozenset[str]:
        """The optional parts in use: bias, out_projection, scale (another than 1/sqrt(k)), mask, causal."""
        used = used_features(self, self.feature_names)
        return used - {"scale"} if self.factor == 1.0 / math.sqrt(self.key_width) else used

    # ---- derived weights -------------------------------------------------------------------------------------------

    @cached_property
    def bilinear(self) -> Float[Tensor, "h d d"]:
        """``B_h = scale w_q w_k^T``: score s_ij = x_i B x_j^T + key_offset . x_j + (terms of i alone)."""
        return self.factor * self.w_q @ self.w_k.transpose(-1, -2)

    @cached_property
    def key_offset(self) -> Float[Tensor, "h d"]:
        """``c_h = scale w_k b_q``: the part of the score that is linear in the key token alone."""
        if self.b_q is None:
            return self.w_k.new_zeros(self.heads, self.width)
        return self.factor * torch.einsum("hdk,hk->hd", self.w_k, self.b_q)

    @cached_property
    def value_output(self) -> Float[Tensor, "h d e"]:
        """Token to output of one head: ``w_v w_o``, or ``w_v`` in its own block of the concatenation."""
        if self.w_o is not None:
            return self.w_v @ self.w_o
        out = self.w_v.new_zeros(self.heads, self.width, self.out_width)
        v = self.value_width
        for h in range(self.heads):  # once per layer, on weights only
            out[h, :, h * v : (h + 1) * v] = self.w_v[h]
        return out

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def queries(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b h n k"]:
        """Query vectors of every head."""
        return project(x, self.w_q, self.b_q)

    def keys(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b h n k"]:
        """Key vectors of every head."""
        return project(x, self.w_k, self.b_k)

    def values(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b h n v"]:
        """Value vectors of every head, bias included."""
        return project(x, self.w_v, self.b_v)

    def score_bias(self, n: int, mass: Float[Tensor, "*m n"] | None = None) -> Float[Tensor, "..."] | None:
        """What is added to the scores: mask, causal mask and log-mass.

        None if nothing is added, else broadcastable to (*b, h, n, n).
        """
        bias: Tensor | None = None
        if self.mask is not None:
            if self.mask.shape[0] != n:
                raise InputError(f"the layer's mask is for {self.mask.shape[0]} tokens, the input has {n}")
            bias = self.mask
        if self.causal:
            hidden = torch.ones(n, n, dtype=torch.bool, device=self.device).triu(1)
            zero = self.w_q.new_zeros(n, n) if bias is None else bias
            bias = zero.masked_fill(hidden, -math.inf)
        if mass is not None:
            bias = log_mass(mass) if bias is None else bias + log_mass(mass)
        return bias

    def scores(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b h n n"]:
        """Softmax arguments, mask and log-mass included."""
        s = self.factor * self.queries(x) @ self.keys(x).transpose(-1, -2)
        bias = self.score_bias(x.shape[-2], mass)
        return s if bias is None else s + bias

    def weights(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b h n n"]:
        """Attention weights P."""
        return torch.softmax(self.scores(x, mass), dim=-1)

    def combine(self, heads: Float[Tensor, "*b h n v"]) -> Float[Tensor, "*b n e"]:
        """Per-head averages to the layer's output, WITHOUT the output bias (so it is linear)."""
        return combine(heads, self.w_o, None)

    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n e"]:
        """Evaluate the layer; leading batch dimensions are allowed.

        Args:
            x: Tokens, (n, d) or batched.
            mass: Token masses, (n,) or any shape that broadcasts over the batch; None means equal masses.
        """
        out = self.combine(self.weights(x, mass) @ self.values(x))
        return out if self.b_o is None else out + self.b_o

    # ---- identity --------------------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that defines the layer."""
        return tensor_digest(
            self.w_q, self.w_k, self.w_v, self.b_q, self.b_k, self.b_v, self.w_o, self.b_o, self.mask,
            extra=f"attention;{self.factor!r};{self.causal}",
        )  # fmt: skip


def _checked_mask(mask: Tensor, *, causal: bool) -> Tensor:
    mask = as_tensor("mask", mask)
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        raise InputError(f"mask must have shape (n, n); got {tuple(mask.shape)}")
    if not mask.is_floating_point():
        raise InputError(f"mask has dtype {mask.dtype}; give additive scores (0 = visible, -inf = hidden)")
    mask = mask.detach().to(torch.float64, copy=True)
    if bool(torch.isnan(mask).any()) or bool((mask == math.inf).any()):
        raise InputError("mask holds NaN or +inf; only finite numbers and -inf are allowed")
    visible = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -math.inf) if causal else mask
    empty = torch.isneginf(visible).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"mask hides every key from query rows {empty[:8]}; each row must see at least one token")
    return mask
