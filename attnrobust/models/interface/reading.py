"""An attention layer from what it hands to the interface: weights by rows of the identity, positions by angles."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.rotary import Layout, Rotary
from attnrobust.models.adapters import refuse
from attnrobust.models.interface.looking import Looker, Seen
from attnrobust.models.interface.positions import Source, layer_type

AFFINE = 1e-11  # relative to the terms of the sums; float64 products of width 8192 agree to about 1e-13
HARMLESS = frozenset(
    {"dropout", "deterministic", "output_attentions", "output_hidden_states", "use_cache", "position_ids", "is_causal"}
)
"""Arguments of the interface that change nothing, or are read."""

NAMED: Mapping[str, str] = {
    "softcap": "a soft-cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "chunk_size": "chunked attention",
}
"""What arguments that are not modelled mean."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Maps of the tokens before positions.

    Args:
        w_q: Query weights (h, d, k), and so on.
    """

    w_q: Float[Tensor, "h d k"]
    w_k: Float[Tensor, "g d k"]
    w_v: Float[Tensor, "g d v"]
    b_q: Float[Tensor, "h k"]
    b_k: Float[Tensor, "g k"]
    b_v: Float[Tensor, "g v"]


class Reader:
    """Reads one module.

    Args:
        module: The attention module.
        part: The submodule whose output counts.
        width: Token width d.
        source: Where its rotary tables come from; None without.
        arguments: Further arguments of a forward call.
    """

    def __init__(
        self, module: nn.Module, *, part: str, width: int, source: Source | None, arguments: Mapping[str, Any]
    ) -> None:
        self._module, self._width, self._source, self._arguments = module, width, source, arguments
        self._looker = Looker(module, part)
        self._like = next(module.parameters()).new_zeros((), dtype=torch.float64)

    def attention(self, *, causal: bool) -> Attention:
        """The layer, its positions and windows.

        Raises:
            UnsupportedModelError: Something is not what a specification can say; names it.
        """
        zero = self._look(self._like.new_zeros(1, self._width))
        self._refuse_extra(zero)
        parts = self._parts(zero)
        rotary, parts = self._rotary(parts)
        self._check_affine(parts, rotary)
        heads, groups = parts.w_q.shape[0], parts.w_k.shape[0]
        if heads % groups:
            raise refuse(self._module, f"{heads} query heads do not divide into {groups} groups of keys")
        w_o, b_o = self._output(heads, parts.w_v.shape[2], zero)
        w_k, w_v, b_k, b_v = (
            value.repeat_interleave(heads // groups, 0) for value in (parts.w_k, parts.w_v, parts.b_k, parts.b_v)
        )
        left, right = self._window(zero, causal=causal)
        return Attention(
            w_q=parts.w_q, w_k=w_k, w_v=w_v, b_q=_or_none(parts.b_q), b_k=_or_none(b_k), b_v=_or_none(b_v),
            w_o=w_o, b_o=b_o, scale=zero.scale, causal=causal, rotary=rotary, window_left=left, window_right=right,
            head_bias=None if zero.mask is None else HeadBias(explicit=zero.mask.expand(heads, -1, -1).contiguous()),
            kv_heads=groups if groups < heads else None,
        )  # fmt: skip

    # ---- looks -----------------------------------------------------------------------------------------------------

    def _look(self, tokens: Tensor, *, turned: bool = False, **options: Any) -> Seen:
        """A call with every angle 0, or with the model's own angles."""
        arguments = dict(self._arguments)
        if self._source is not None:
            tables = self._source.tables if turned else self._source.unturned
            arguments["position_embeddings"] = tables(tokens.shape[0])
        return self._looker.look(tokens, arguments, **options)

    def _parts(self, zero: Seen) -> Parts:
        rows = self._look(torch.eye(self._width).to(self._like), without_biases=True)
        weights = {f"w_{n[0]}": getattr(rows, n).transpose(0, 1) for n in ("query", "key", "value")}
        biases = {f"b_{n[0]}": getattr(zero, n)[:, 0] for n in ("query", "key", "value")}
        return Parts(**{n: w.transpose(0, 1).contiguous() for n, w in weights.items()}, **biases)

    def _output(self, heads: int, v: int, zero: Seen) -> tuple[Tensor | None, Tensor | None]:
        payload = torch.eye(heads * v).to(self._like).reshape(heads * v, heads, v)
        rows = self._look(self._like.new_zeros(heads * v, self._width), payload=payload, without_biases=True).output
        bias = _or_none(zero.output[0])
        if rows.shape[1] == heads * v and torch.equal(rows, torch.eye(heads * v).to(rows)) and bias is None:
            return None, None  # the heads are concatenated
        return rows.reshape(heads, v, -1).contiguous(), bias

    def _window(self, seen: Seen, *, causal: bool) -> tuple[int | None, int | None]:
        """A sliding window of w, left and right: the w last keys of a causal layer, |i - j| < w without.

        The mask itself is made by the model: the layer and its configuration only say it, and must say the same.
        """
        size = seen.extra.get("sliding_window", getattr(self._module, "sliding_window", None))
        kind = layer_type(self._module)
        if kind is not None and (kind == "sliding_attention") != (size is not None):
            raise refuse(self._module, f"its configuration calls it {kind}, its window is {size}; not modelled")
        left = None if size is None else int(size) - 1
        return left, None if causal else left

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _refuse_extra(self, seen: Seen) -> None:
        unknown = sorted(seen.extra.keys() - HARMLESS - {"sliding_window"} - self._arguments.keys())
        named = [f"{NAMED[name]} ({name})" if name in NAMED else f"the argument {name!r}" for name in unknown]
        if float(seen.extra.get("dropout", 0.0)) > 0:
            named.append(f"train mode with dropout {seen.extra['dropout']:g}; call model.eval()")
        if named:
            raise refuse(self._module, f"{', '.join(named)} at the attention interface, not modelled")

    def _rotary(self, parts: Parts) -> tuple[Rotary | None, Parts]:
        """How the model's tables turn queries and keys; the tables' factor goes into the weights."""
        if self._source is None:
            return None, parts
        tokens = self._tokens(7)
        plain, turned = self._look(tokens), self._look(tokens, turned=True)
        if torch.equal(plain.query, turned.query) and torch.equal(plain.key, turned.key):
            return None, parts
        for layout in _LAYOUTS:
            rotary = self._source.rotary(layout)
            factor = _factor(rotary, plain.query.shape[-1], self._source.factor)
            if all(
                _close(rotary.turn(factor * getattr(plain, name)), getattr(turned, name)) for name in ("query", "key")
            ):
                scaled = {name: getattr(parts, name) * factor for name in ("w_q", "w_k", "b_q", "b_k")}
                return rotary, replace(parts, **scaled)
        raise refuse(self._module, "its positions are no turns of planes by the model's frequencies; not modelled")

    def _check_affine(self, parts: Parts, rotary: Rotary | None) -> None:
        for scale in (1.0, 1e3):
            tokens = scale * self._tokens(5)
            seen = self._look(tokens, turned=True)
            for name in ("query", "key", "value"):
                weight, bias = getattr(parts, f"w_{name[0]}"), getattr(parts, f"b_{name[0]}")
                expected = torch.einsum("nd,hdk->hnk", tokens, weight) + bias[:, None]
                if rotary is not None and name != "value":
                    expected = rotary.turn(expected)
                allowed = torch.einsum("nd,hdk->hnk", tokens.abs(), weight.abs()).amax(-1, keepdim=True)
                allowed = allowed + bias.abs().amax(-1)[:, None, None]
                if not bool(((getattr(seen, name) - expected).abs() <= AFFINE * allowed).all()):
                    raise refuse(self._module, f"its {name} vectors are not affine in the token; not modelled")

    def _tokens(self, n: int) -> Tensor:
        n = n if self._source is None or self._source.length is None else self._source.length
        generator = torch.Generator().manual_seed(n)
        return torch.randn(n, self._width, generator=generator, dtype=torch.float64).to(self._like)


_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")


def _factor(rotary: Rotary, k: int, factor: float) -> Tensor:
    """A diagonal: the tables' factor on the turned coordinates."""
    diagonal = rotary.angle_table(1 if rotary.length is None else rotary.length).new_ones(k)
    diagonal[: 2 * rotary.planes] = factor
    return diagonal


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= AFFINE * expected.abs().max())


def _or_none(bias: Tensor) -> Tensor | None:
    """A bias that is there; all zeros say the same as none."""
    return bias.contiguous() if bool(bias.any()) else None
