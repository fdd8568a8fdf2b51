"""From exact records (layers, networks, graphs of nodes) to ONNX operators; what has no entry here is refused by name.

Every writer also bounds the length of the tokens that it gives (``Value.reach``): masks need it, see ``attention``.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.interchange.activations import write_activation
from attnrobust.interchange.attention import write_attention
from attnrobust.interchange.program import Program, Value
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import (
    Activate,
    AddPositions,
    Affine,
    Attend,
    ConcatTokens,
    NetworkGraph,
    Normalise,
    PoolMean,
    PoolRow,
    Product,
    Scale,
    Sum,
)
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.pre_norm import PreNormAttention

Mass = Float[Tensor, "n"] | None
Writer = Callable[[Program, Any, tuple[Value, ...], Mass], Value]


def write_map(program: Program, layer: object, *inputs: Value, mass: Mass = None) -> Value:
    """Append the operators of a layer, a network or a node.

    Args:
        program: Where they go.
        layer: The record.
        inputs: What it reads, one value an edge.
        mass: Masses of the rows of the first input; None means equal ones.

    Returns:
        Its output.

    Raises:
        UnsupportedModelError: A record, or a field of one, that is not translated.
    """
    kind = type(layer)
    if kind not in WRITERS:
        stated = (Attention, PreNormAttention, LayerNorm, RMSNorm, Mlp, Network, NetworkGraph)
        names = ", ".join(sorted(one.__name__ for one in stated))
        raise UnsupportedModelError(f"{kind.__name__} is not exported to ONNX; what is: {names} and the nodes of one")
    writer, known = WRITERS[kind]
    for field in fields(cast(Any, layer)):
        if field.name not in known:
            raise UnsupportedModelError(f"{kind.__name__}.{field.name} is not exported to ONNX")
    return writer(program, layer, inputs, mass)


# ---- affine ----------------------------------------------------------------------------------------------------------


def affine(program: Program, x: Value, weight: Tensor, bias: Tensor | None) -> Value:
    """``x weight + bias``, token by token."""
    name = program.apply("MatMul", x.name, weight)
    reach = x.reach * norm(weight)
    if bias is not None:
        name, reach = program.apply("Add", name, bias), reach + norm(bias)
    return Value(name, x.rows, int(weight.shape[1]), reach)


def norm(value: Tensor) -> float:
    """Frobenius norm, an upper bound of the spectral one."""
    return float(torch.linalg.vector_norm(value))


def _affine(program: Program, node: Affine, inputs: tuple[Value, ...], _: Mass) -> Value:
    return affine(program, inputs[0], node.weight, node.bias)


def _scale(program: Program, node: Scale, inputs: tuple[Value, ...], _: Mass) -> Value:
    (x,), factor = inputs, cast(Tensor, node.factor)
    return Value(program.apply("Mul", x.name, factor), x.rows, x.width, x.reach * float(factor.abs().max()))


def _sum(program: Program, _node: Sum, inputs: tuple[Value, ...], _: Mass) -> Value:
    x, y = inputs
    return Value(program.apply("Add", x.name, y.name), x.rows, x.width, x.reach + y.reach)


def _product(program: Program, _node: Product, inputs: tuple[Value, ...], _: Mass) -> Value:
    x, y = inputs
    return Value(program.apply("Mul", x.name, y.name), x.rows, x.width, x.reach * y.reach)


# ---- token by token --------------------------------------------------------------------------------------------------


def _mlp(program: Program, mlp: Mlp, inputs: tuple[Value, ...], _: Mass) -> Value:
    hidden = write_activation(program, mlp.activation, affine(program, inputs[0], mlp.w_1, mlp.b_1))
    return affine(program, hidden, mlp.w_2, mlp.b_2)


def _activate(program: Program, node: Activate, inputs: tuple[Value, ...], _: Mass) -> Value:
    return write_activation(program, node.function, inputs[0])


def _layer_norm(program: Program, layer: LayerNorm, inputs: tuple[Value, ...], _: Mass) -> Value:
    (x,) = inputs
    mean = program.apply("ReduceMean", x.name, axes=(-1,), keepdims=1)
    return _divided(program, layer, x, program.apply("Sub", x.name, mean))


def _rms_norm(program: Program, layer: RMSNorm, inputs: tuple[Value, ...], _: Mass) -> Value:
    return _divided(program, layer, inputs[0], inputs[0].name)


def _divided(program: Program, layer: LayerNorm | RMSNorm, x: Value, centred: str) -> Value:
    """``weight * u / sqrt(mean(u^2) + eps) + bias``."""
    square = program.apply("ReduceMean", program.apply("Pow", centred, 2.0), axes=(-1,), keepdims=1)
    size = program.apply("Sqrt", program.apply("Add", square, layer.eps))
    name = program.apply("Mul", program.apply("Div", centred, size), layer.weight)
    if layer.bias is not None:
        name = program.apply("Add", name, layer.bias)
    return Value(name, x.rows, x.width, layer.output_radius.value)


# ---- rows ------------------------------------------------------------------------------------------------------------


def weighted_rows(program: Program, x: Value, weights: Float[Tensor, "n"]) -> Value:
    """``sum_i weights_i x_i`` as one row; a single row of weight 1 is cut out."""
    chosen = weights.nonzero().flatten().tolist()
    if len(chosen) == 1 and float(weights[chosen[0]]) == 1.0:
        return row(program, x, chosen[0])
    summed = program.apply("Mul", x.name, weights[:, None])
    reach = x.reach * float(weights.abs().sum())
    return Value(program.apply("ReduceSum", summed, (1,), keepdims=1), 1, x.width, reach)


def row(program: Program, x: Value, index: int) -> Value:
    """One row."""
    if x.rows == 1:
        return x
    return Value(program.apply("Slice", x.name, (index,), (index + 1,), (1,)), 1, x.width, x.reach)


def mean_row(program: Program, x: Value) -> Value:
    """The mean of the rows, equal masses."""
    return Value(program.apply("ReduceMean", x.name, axes=(1,), keepdims=1), 1, x.width, x.reach)


def _pool_row(program: Program, node: PoolRow, inputs: tuple[Value, ...], _: Mass) -> Value:
    return row(program, inputs[0], node.row % inputs[0].rows)


def _pool_mean(program: Program, _node: PoolMean, inputs: tuple[Value, ...], mass: Mass) -> Value:
    return mean_row(program, inputs[0]) if mass is None else weighted_rows(program, inputs[0], mass / mass.sum())


def _concat(program: Program, node: ConcatTokens, inputs: tuple[Value, ...], _: Mass) -> Value:
    (x,) = inputs
    name = program.apply("Concat", node.tokens[None], x.name, axis=1)
    return Value(name, x.rows + int(node.tokens.shape[0]), x.width, max(x.reach, longest(node.tokens)))


def _positions(program: Program, node: AddPositions, inputs: tuple[Value, ...], _: Mass) -> Value:
    (x,) = inputs
    table = node.table[: x.rows]
    return Value(program.apply("Add", x.name, table), x.rows, x.width, x.reach + longest(table))


def longest(tokens: Float[Tensor, "n d"]) -> float:
    """The largest l2 norm of a token."""
    return float(torch.linalg.vector_norm(tokens, dim=-1).max())


# ---- compositions ----------------------------------------------------------------------------------------------------


def _attention(program: Program, layer: Attention, inputs: tuple[Value, ...], mass: Mass) -> Value:
    return write_attention(program, layer, inputs[0], mass)


def _attend(program: Program, node: Attend, inputs: tuple[Value, ...], mass: Mass) -> Value:
    return write_map(program, node.attention, *inputs, mass=mass)


def _normalise(program: Program, node: Normalise, inputs: tuple[Value, ...], mass: Mass) -> Value:
    return write_map(program, node.norm, *inputs, mass=mass)


def _network(program: Program, network: Network, inputs: tuple[Value, ...], mass: Mass) -> Value:
    (x,) = inputs
    for layer in network.layers:
        x = write_map(program, layer, x, mass=mass)
    return x


def _residual(program: Program, residual: Residual, inputs: tuple[Value, ...], mass: Mass) -> Value:
    (x,) = inputs
    inner = write_map(program, residual.inner, x, mass=mass)
    return _sum(program, Sum(), (x, inner), mass)


def _pre_norm(program: Program, layer: PreNormAttention, inputs: tuple[Value, ...], mass: Mass) -> Value:
    (x,) = inputs
    inner = write_map(program, layer.attention, write_map(program, layer.norm, x, mass=mass), mass=mass)
    return _sum(program, Sum(), (x, inner), mass) if layer.residual else inner


def _graph(program: Program, graph: NetworkGraph, inputs: tuple[Value, ...], mass: Mass) -> Value:
    values = {graph.source: inputs[0]}
    masses = graph.masses(mass, inputs[0].rows)
    for step in graph.steps:
        read = tuple(values[name] for name in step.reads)
        values[step.name] = write_map(program, step.node, *read, mass=masses[step.reads[0]])
    return values[graph.output]


_ATTENTION = [
    *("w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "w_o", "b_o", "scale", "mask", "causal", "rotary", "head_bias"),
    *("window_left", "window_right", "kv_heads"),
]

WRITERS: Mapping[type, tuple[Writer, frozenset[str]]] = {
    kind: (writer, frozenset(names))
    for kind, writer, names in (
        (Attention, _attention, _ATTENTION),
        (Mlp, _mlp, ["w_1", "w_2", "b_1", "b_2", "activation"]),
        (LayerNorm, _layer_norm, ["weight", "bias", "eps"]),
        (RMSNorm, _rms_norm, ["weight", "bias", "eps"]),
        (Network, _network, ["layers"]),
        (Residual, _residual, ["inner"]),
        (PreNormAttention, _pre_norm, ["norm", "attention", "residual"]),
        (NetworkGraph, _graph, ["width", "steps", "depth_names", "source"]),
        (Affine, _affine, ["weight", "bias"]),
        (Scale, _scale, ["factor"]),
        (Sum, _sum, []),
        (Product, _product, []),
        (Activate, _activate, ["function"]),
        (Attend, _attend, ["attention"]),
        (Normalise, _normalise, ["norm"]),
        (PoolRow, _pool_row, ["row"]),
        (PoolMean, _pool_mean, []),
        (ConcatTokens, _concat, ["tokens", "mass"]),
        (AddPositions, _positions, ["table"]),
    )
}
"""The writer of every record that is translated, and the fields that it knows."""
