"""A differentiable upper bound of the certified Lipschitz constant, to be made small in training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.certify.closed_form.kim2021_l2 import spread_bound
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.trainable import TrainableAttention
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.tokens import as_count, as_positive

ROUNDINGS = 4.0
"""Outward roundings of a certificate's constant, which this one shall not be below."""


def regulariser(module: nn.Module, *, tokens: int, radius: float | None = None) -> Float[Tensor, ""]:
    """The Frobenius Lipschitz constants of a module's attention layers, from above and differentiable: their sum.

    For one layer it is the constant behind its certificate: of L2, cosine and LipschitzNorm attention on all of space
    (``kim2021-l2``, ``cosine-lipschitz``, ``dasoulas2021-lipschitznorm``), of sigmoid attention on tokens in a ball
    (``sigmoid-ball``). So ``loss + strength * regulariser(model, tokens=n)`` trains for larger certified radii. Other
    parts of the module are not in it.

    Args:
        module: A trainable layer, or a module that holds some.
        tokens: Largest number of tokens n, of equal mass.
        radius: R of the ball that holds the tokens; needed by sigmoid attention, and ignored by the others.

    Returns:
        A float64 scalar; its gradient reaches every parameter that the bound depends on.

    Raises:
        InputError: No trainable attention layer, or sigmoid attention without a radius.
        UnsupportedModelError: A trainable layer of a kind that no bound is known for.

    References:
        Derived; docs/certificates-literature.md, sections 12 to 15. Tests compare it with the certificates.

    Examples:
        >>> from attnrobust.layers.trainable import TrainableL2Attention
        >>> layer = TrainableL2Attention(4, 2)
        >>> bound = regulariser(layer, tokens=3)
        >>> bound.backward()
        >>> layer.w_q.grad.shape
        torch.Size([2, 4, 2])
    """
    tokens = as_count("tokens", tokens)
    layers = [part for part in module.modules() if isinstance(part, TrainableAttention)]
    if not layers:
        raise InputError("the module holds no trainable attention layer; see attnrobust.layers.trainable")
    return torch.stack([layer_upper(layer, tokens=tokens, radius=radius) for layer in layers]).sum()


def layer_upper(layer: TrainableAttention[Any], *, tokens: int, radius: float | None = None) -> Float[Tensor, ""]:
    """The bound of one layer; see ``regulariser``."""
    head_parts = _HEADS.get(layer.kind)
    if head_parts is None:
        raise UnsupportedModelError(f"no Lipschitz bound is known for {type(layer).__name__}")
    parts = head_parts(_doubles(layer), layer, tokens, radius)
    return _over_heads(parts) * (1.0 + ROUNDINGS * FORMULA)


@dataclass(frozen=True, eq=False)
class _Heads:
    """A head's output is an inner vector times ``inner`` and ``w_o``; the vector's rate is ``slopes``."""

    slopes: Float[Tensor, "h"]
    inner: Float[Tensor, "h r v"]
    w_o: Float[Tensor, "h v e"] | None


def _over_heads(heads: _Heads) -> Float[Tensor, ""]:
    """Heads added up, or stacked: the smaller; without projection they are orthogonal."""
    stacked: Tensor = torch.linalg.vector_norm(heads.slopes * _norm(heads.inner))
    if heads.w_o is None:
        return stacked
    added = (heads.slopes * _norm(heads.inner @ heads.w_o)).sum()
    smaller: Tensor = torch.minimum(added, stacked * _norm(heads.w_o.flatten(0, 1)))
    return smaller


def _norm(matrices: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    return norms


def _doubles(layer: TrainableAttention[Any]) -> dict[str, Tensor | None]:
    """The weights in float64, in the graph of the parameters."""
    names = (*layer.weights, "w_o")
    return {name: None if (weight := getattr(layer, name)) is None else weight.double() for name in names}


def _l2(weights: dict[str, Any], layer: Any, tokens: int, _: float | None) -> _Heads:
    c, root = spread_bound(tokens - 1.0), math.sqrt(layer.scale)
    slopes = root * _norm(weights["w_q"]) * (math.sqrt(tokens) * (1.0 + 2.0 * c) + 2.0 * c)
    return _Heads(slopes, root * weights["w_q"].transpose(-1, -2) @ weights["w_v"], weights["w_o"])


def _cosine(weights: dict[str, Any], layer: Any, tokens: int, _: float | None) -> _Heads:
    keys = _norm(weights["w_v"]) + layer.tau * _norm(weights["w_k"])
    slopes = layer.nu * layer.eps**-0.5 * (math.sqrt(tokens) * keys + layer.tau * _norm(weights["w_q"]))
    return _Heads(slopes, _eye(weights), weights["w_o"])


def _sigmoid(weights: dict[str, Any], layer: Any, _: int, radius: float | None) -> _Heads:
    if radius is None:
        raise InputError("sigmoid attention is Lipschitz on a ball only; give its radius")
    a = layer.scale * _norm(weights["w_q"] @ weights["w_k"].transpose(-1, -2)) * as_positive("radius", radius) ** 2
    return _Heads(torch.sigmoid(a + layer.shift) + 0.5 * a, weights["w_v"], weights["w_o"])


def _lipschitznorm(weights: dict[str, Any], _: Any, tokens: int, __: float | None) -> _Heads:
    norms = torch.stack([_norm(weights[name]) for name in ("w_q", "w_k", "w_v")])
    two_largest = norms.sum(dim=0) - norms.amin(dim=0)
    slopes = min(math.e, math.sqrt(tokens)) * norms[2] + norms[0] + norms[1] + two_largest
    return _Heads(slopes, _eye(weights), weights["w_o"])


def _eye(weights: dict[str, Any]) -> Float[Tensor, "h v v"]:
    heads, _, width = weights["w_v"].shape
    eye: Tensor = torch.eye(width, dtype=torch.float64, device=weights["w_v"].device)
    return eye.expand(heads, -1, -1)


_HEADS: dict[type, Callable[[dict[str, Any], Any, int, float | None], _Heads]] = {
    L2Attention: _l2,
    CosineAttention: _cosine,
    SigmoidAttention: _sigmoid,
    LipschitzNormAttention: _lipschitznorm,
}
