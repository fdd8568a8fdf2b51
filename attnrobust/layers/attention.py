"""Multi-head dot-product self-attention as a frozen, exact specification in float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.features import PLAIN, used_features
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.heads import ScaledHeadSpecification, combine, log_mass, project
from attnrobust.layers.masks import checked_mask, hidden_keys
from attnrobust.layers.rotary import Rotary
from attnrobust.tokens import as_count, tensor_digest


@dataclass(frozen=True, eq=False)
class Attention(ScaledHeadSpecification):
    """Dot-product attention ``f(X)_i = sum_h (sum_j P^h_ij v^h_j) w_o^h + b_o``.

    ``q = x w_q + b_q``, ``k = x w_k + b_k``, ``v = x w_v + b_v`` per head, scores
    ``s_ij = scale <q_i, k_j> + mask_ij + log(mass_j)`` and ``P = softmax_j(s)``. Equal masses cancel in the softmax.
    Without ``w_o`` the heads are concatenated (output width h v) and ``b_o`` is added if given. Rotary positions turn
    q_i and k_j before their product; position biases are added to the scores. Where groups of heads share keys and
    values, their weights are given once a head.

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
        rotary: Rotary positions of queries and keys, or None.
        head_bias: Position biases of every head, or None.
        window_left: Query i sees keys j >= i - window_left only; None: any. A sliding window of w keys is w - 1.
        window_right: Query i sees keys j <= i + window_right only; None: any.
        kv_heads: How many different key and value heads there are: h / kv_heads heads one after the other share one,
            whose weights stand here once for each. For lists only; None: h.

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
    rotary: Rotary | None = None
    head_bias: HeadBias | None = None
    window_left: int | None = None
    window_right: int | None = None
    kv_heads: int | None = None

    feature_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("w_q", "w_k", "w_v"), PLAIN),
        **dict.fromkeys(("b_q", "b_k", "b_v", "b_o"), "bias"),
        "w_o": "out_projection",
        "scale": "scale",
        "mask": "mask",
        "causal": "causal",
        "rotary": "rotary",
        "head_bias": "head_bias",
        **dict.fromkeys(("window_left", "window_right"), "window"),
        "kv_heads": PLAIN,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window_left", "window_right"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_count(name, getattr(self, name), least=0))
        self._adopt_positions()
        if self.mask is not None:
            object.__setattr__(self, "mask", self._checked_mask(self.mask).to(self.w_q.device))
        lengths = {"mask": None if self.mask is None else self.mask.shape[0]}
        lengths |= {name: getattr(getattr(self, name), "length", None) for name in ("rotary", "head_bias")}
        require_one_length(lengths)
        if self.kv_heads is not None:
            object.__setattr__(self, "kv_heads", _checked_groups(self))

    def _adopt_positions(self) -> None:
        """Check the position records, and put them where the weights live."""
        for name, kind in (("rotary", Rotary), ("head_bias", HeadBias)):
            value = getattr(self, name)
            if value is not None and type(value) is not kind:
                raise InputError(f"{name} is a {type(value).__name__}; give a {kind.__name__} or None")
        if self.rotary is not None:
            if 2 * self.rotary.planes > self.key_width:
                raise InputError(f"rotary turns {2 * self.rotary.planes} coordinates; keys have {self.key_width}")
            object.__setattr__(self, "rotary", self.rotary.to(self.device))
        if self.head_bias is not None:
            if self.head_bias.heads != self.heads:
                raise InputError(f"the head bias is for {self.head_bias.heads} heads; the layer has {self.heads}")
            object.__setattr__(self, "head_bias", self.head_bias.to(self.device))

    def _checked_mask(self, mask: Tensor) -> Tensor:
        mask = checked_mask(mask)
        hidden = self._hidden(mask.shape[0])
        visible = mask if hidden is None else mask.masked_fill(hidden.to(mask.device), -math.inf)
        empty = torch.isneginf(visible).all(dim=1).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"mask hides every key from query rows {empty[:8]}; each row must see at least one token")
        return mask

    def _hidden(self, n: int) -> Bool[Tensor, "n n"] | None:
        """Keys that causality and the window hide from each query; None where they hide none of any input."""
        left, right = self.window_left, self.window_right
        return hidden_keys(n, causal=self.causal, left=left, right=right, device=self.device)

    @property
    def features(self) -> frozenset[str]:
        """The optional parts in use: bias, out_projection, scale (another than 1/sqrt(k)), mask, causal, rotary, ..."""
        used = used_features(self, self.feature_names)
        return used - {"scale"} if self.factor == 1.0 / math.sqrt(self.key_width) else used

    @property
    def placed(self) -> frozenset[str]:
        """The features by which scores depend on the tokens' places, beside masks: such a layer maps no measures."""
        return self.features & {"rotary", "head_bias", "window"}

    # ---- derived weights -------------------------------------------------------------------------------------------

    @cached_property
    def bilinear(self) -> Float[Tensor, "h d d"]:
        """``B_h = scale w_q w_k^T``: score s_ij = x_i B x_j^T + key_offset . x_j + (terms of i alone).

        Raises:
            UnsupportedModelError: Rotary positions: there is one such form a pair of positions.
        """
        self._require_common_form()
        return self.factor * self.w_q @ self.w_k.transpose(-1, -2)

    @cached_property
    def key_offset(self) -> Float[Tensor, "h d"]:
        """``c_h = scale w_k b_q``: the part of the score that is linear in the key token alone.

        Raises:
            UnsupportedModelError: Rotary positions: it differs from query to query.
        """
        self._require_common_form()
        if self.b_q is None:
            return self.w_k.new_zeros(self.heads, self.width)
        return self.factor * torch.einsum("hdk,hk->hd", self.w_k, self.b_q)

    def _require_common_form(self) -> None:
        if self.rotary is not None:
            raise UnsupportedModelError("with rotary positions every pair of positions has a bilinear form of its own")

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

    def queries(self, x: Float[Tensor, "*b n d"], *, at: Int[Tensor, "q"] | None = None) -> Float[Tensor, "*b h q k"]:
        """Query vectors of every head, turned by their positions; of the tokens ``at`` only, where they are given."""
        return self.turned(project(x if at is None else x[..., at, :], self.w_q, self.b_q), at)

    def keys(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b h n k"]:
        """Key vectors of every head, turned by their positions."""
        return self.turned(project(x, self.w_k, self.b_k))

    def turned(self, heads: Float[Tensor, "*b n k"], at: Int[Tensor, "n"] | None = None) -> Float[Tensor, "*b n k"]:
        """Vectors of queries or keys of all tokens, or of the tokens ``at``, turned by rotary positions, if any."""
        return heads if self.rotary is None else self.rotary.turn(heads, at)

    def turned_back(
        self, heads: Float[Tensor, "*b n k"], at: Int[Tensor, "n"] | None = None
    ) -> Float[Tensor, "*b n k"]:
        """The adjoint and inverse of ``turned``."""
        return heads if self.rotary is None else self.rotary.turn_back(heads, at)

    def values(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b h n v"]:
        """Value vectors of every head, bias included."""
        return project(x, self.w_v, self.b_v)

    def score_bias(
        self, n: int, mass: Float[Tensor, "*m n"] | None = None, *, at: Int[Tensor, "q"] | None = None
    ) -> Float[Tensor, "..."] | None:
        """What is added to the scores: mask, head bias, causal mask, window and log-mass.

        None if nothing is added, else broadcastable to (*b, h, n, n), or to (*b, h, q, n) for the queries ``at``.
        """
        bias: Tensor | None = None
        if self.mask is not None:
            if self.mask.shape[0] != n:
                raise InputError(f"the layer's mask is for {self.mask.shape[0]} tokens, the input has {n}")
            bias = self.mask if at is None else self.mask[at]
        if self.head_bias is not None:
            added = self.head_bias.matrix(n, at)
            bias = added if bias is None else bias + added
        hidden = self._hidden(n)
        if hidden is not None:
            hidden = hidden if at is None else hidden[at]
            zero = self.w_q.new_zeros(hidden.shape) if bias is None else bias
            bias = zero.masked_fill(hidden, -math.inf)
        if mass is not None:
            bias = log_mass(mass) if bias is None else bias + log_mass(mass)
        return bias

    def scores(
        self,
        x: Float[Tensor, "*b n d"],
        mass: Float[Tensor, "*m n"] | None = None,
        *,
        at: Int[Tensor, "q"] | None = None,
    ) -> Float[Tensor, "*b h q n"]:
        """Softmax arguments, mask and log-mass included; of the queries ``at`` only, where they are given."""
        s = self.factor * self.queries(x, at=at) @ self.keys(x).transpose(-1, -2)
        bias = self.score_bias(x.shape[-2], mass, at=at)
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

    def rows(
        self, x: Float[Tensor, "*b n d"], at: Int[Tensor, "q"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b q e"]:
        """The rows ``at`` of the output alone: h q n scores instead of h n^2.

        The turns and biases are those of the whole layer's tables, whose float64 numbers are the layer's.
        """
        scores = self.factor * self.queries(x)[..., at, :] @ self.keys(x).transpose(-1, -2)
        bias = self.score_bias(x.shape[-2], mass)
        if bias is not None:
            scores = scores + (bias[..., at, :] if bias.shape[-2] > 1 else bias)
        out = self.combine(torch.softmax(scores, dim=-1) @ self.values(x))
        return out if self.b_o is None else out + self.b_o

    # ---- identity --------------------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that defines the layer."""
        return tensor_digest(
            self.w_q, self.w_k, self.w_v, self.b_q, self.b_k, self.b_v, self.w_o, self.b_o, self.mask,
            extra=f"attention;{self.factor!r};{self.causal}{self._positions_digest}",
        )  # fmt: skip

    @property
    def _positions_digest(self) -> str:
        """The parts that most layers do not have: nothing where there are none."""
        parts = {
            "rotary": None if self.rotary is None else self.rotary.digest,
            "head_bias": None if self.head_bias is None else self.head_bias.digest,
            "window_left": self.window_left,
            "window_right": self.window_right,
        }
        return "".join(f";{name}={value}" for name, value in parts.items() if value is not None)


def require_one_length(lengths: Mapping[str, int | None]) -> None:
    """Refuse parts of a layer that fix different numbers of tokens."""
    fixed = {name: n for name, n in lengths.items() if n is not None}
    if len(set(fixed.values())) > 1:
        each = ", ".join(f"{name} {n}" for name, n in fixed.items())
        raise InputError(f"parts of the layer are for different numbers of tokens: {each}")


def _checked_groups(layer: Attention) -> int:
    """The number of key and value heads, whose repeated weights must be equal."""
    groups = as_count("kv_heads", layer.kv_heads)
    if layer.heads % groups:
        raise InputError(f"kv_heads is {groups}; it must divide the {layer.heads} heads")
    for name in ("w_k", "w_v", "b_k", "b_v"):
        value = getattr(layer, name)
        if value is not None:
            grouped = value.unflatten(0, (groups, layer.heads // groups))
            if not bool((grouped == grouped[:, :1]).all()):
                raise InputError(f"kv_heads is {groups}, but {name} differs within a group of heads; repeat its rows")
    return groups
