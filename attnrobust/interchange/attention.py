"""Dot-product attention in ONNX operators, masks without infinities."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.interchange.program import Program, Value
from attnrobust.layers.attention import Attention

UNDERFLOW = 800.0
"""``exp(-800)`` is below every positive float64."""
LARGEST_SCORE = 1e30
"""Beyond it a mask would leave the range of float32."""


def write_attention(program: Program, layer: Attention, x: Value, mass: Float[Tensor, "n"] | None) -> Value:
    """Append ``softmax(scale q k^T + bias) v w_o + b_o``, all heads at once as (1, h, n, .).

    Rotary positions multiply queries and keys by cosines, and the same with their columns exchanged by sines, so that
    nothing is gathered.

    Raises:
        UnsupportedModelError: Hidden keys with scores that have no bound in the range of float32.
    """
    n, h, v = x.rows, layer.heads, layer.value_width
    queries = program.apply("Mul", _heads(program, x, layer, layer.w_q, layer.b_q), layer.factor)
    queries = program.apply("Transpose", queries, perm=(0, 2, 1, 3))
    keys = program.apply("Transpose", _heads(program, x, layer, layer.w_k, layer.b_k), perm=(0, 2, 3, 1))
    scores = program.apply("MatMul", queries, keys)
    bias = finite_bias(layer, n, mass, x.reach)
    if bias is not None:
        scores = program.apply("Add", scores, bias)
    values = program.apply("Transpose", _split(program, x, layer.w_v, layer.b_v), perm=(0, 2, 1, 3))
    averages = program.apply("MatMul", program.apply("Softmax", scores, axis=-1), values)
    rows = program.apply("Reshape", program.apply("Transpose", averages, perm=(0, 2, 1, 3)), (1, n, h * v))
    return _combined(program, layer, Value(rows, n, h * v, _head_reach(layer, x.reach)))


def _split(program: Program, x: Value, weight: Float[Tensor, "h d k"], bias: Float[Tensor, "h k"] | None) -> str:
    """Tokens times the weights of every head, (1, n, h, k)."""
    h, d, k = weight.shape
    name = program.apply("MatMul", x.name, weight.permute(1, 0, 2).reshape(d, h * k))
    if bias is not None:
        name = program.apply("Add", name, bias.reshape(h * k))
    return program.apply("Reshape", name, (1, x.rows, int(h), int(k)))


def _heads(program: Program, x: Value, layer: Attention, weight: Tensor, bias: Tensor | None) -> str:
    """Queries or keys of every head, turned by their positions, (1, n, h, k)."""
    plain = _split(program, x, weight, bias)
    if layer.rotary is None:
        return plain
    cosine, sine, partners = layer.rotary.factors(x.rows, layer.key_width)
    exchanged = _split(program, x, weight[..., partners], None if bias is None else bias[..., partners])
    parts = (program.apply("Mul", plain, cosine[:, None, :]), program.apply("Mul", exchanged, sine[:, None, :]))
    return program.apply("Add", *parts)


def _combined(program: Program, layer: Attention, heads: Value) -> Value:
    name, reach, width = heads.name, heads.reach, heads.width
    if layer.w_o is not None:
        matrix = layer.w_o.reshape(heads.width, layer.out_width)
        name, width = program.apply("MatMul", name, matrix), layer.out_width
        reach *= float(torch.linalg.vector_norm(matrix))
    if layer.b_o is not None:
        name = program.apply("Add", name, layer.b_o)
        reach += float(torch.linalg.vector_norm(layer.b_o))
    return Value(name, heads.rows, width, reach)


def _head_reach(layer: Attention, reach: float) -> float:
    """Averages of values are no longer than the longest of them; all heads side by side."""
    lengths = _longest(layer.w_v, layer.b_v, reach)
    return float(torch.linalg.vector_norm(lengths))


def _longest(weight: Tensor, bias: Tensor | None, reach: float) -> Float[Tensor, "h"]:
    """Upper bound of the length of a query, key or value of every head."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=(-2, -1)) * reach
    return lengths if bias is None else lengths + torch.linalg.vector_norm(bias, dim=-1)


# ---- masks -----------------------------------------------------------------------------------------------------------


def finite_bias(layer: Attention, n: int, mass: Float[Tensor, "n"] | None, reach: float) -> Float[Tensor, "..."] | None:
    """What is added to the scores, with a finite number in place of every -inf.

    Verifiers compute with bounds, where infinities end as NaN. At tokens no longer than ``reach`` a score differs from
    another one by at most ``2 S``, ``S = scale max_h |q| |k| + max |bias|``, so with -C, ``C >= 2 S + 800``, a hidden
    key has less than ``exp(-800)`` times the weight of every visible one: 0 in float64, at every point of the box.

    Raises:
        UnsupportedModelError: No such C in the range of float32.
    """
    bias = layer.score_bias(n, mass)
    if bias is None:
        return None
    hidden = torch.isneginf(bias)
    if not bool(hidden.any()):
        return bias
    product = _longest(layer.w_q, layer.b_q, reach) * _longest(layer.w_k, layer.b_k, reach)
    spread = abs(layer.factor) * float(product.max()) + float(bias.masked_fill(hidden, 0.0).abs().max())
    if not spread <= LARGEST_SCORE:
        raise UnsupportedModelError(
            f"hidden keys are not exported: the bound of the scores, {spread:.3g}, is beyond the range of a finite mask"
        )
    return bias.masked_fill(hidden, -(2.0 ** math.ceil(math.log2(2.0 * spread * (1.0 + 1e-9) + UNDERFLOW))))
