"""How far a layer's computed output may be from the exact one."""

import sys

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.token_map import TokenMap
from attnrobust.numerics.running_error import NotTrackedError, error_of, tracked, tracking

ESTIMATE = 2.0**9 * sys.float_info.epsilon
"""Rounding of an output row relative to its length where no bound is proved: 512 units in the last place."""

FEWER = 256
"""Rows are followed by themselves from so many times more tokens on: before, all of them take no time."""


def output_rounding(
    network: TokenMap,
    points: Float[Tensor, "n d"],
    mass: Float[Tensor, "n"] | None,
    output: Float[Tensor, "rows e"],
    *,
    asked: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "rows e"]:
    """Upper bound of ``|computed f(X) - exact f(X)|``, entry by entry, by running error analysis.

    Proved for every layer of this package (docs/rounding.md). Two kinds of maps get an estimate instead, 512 units in
    the last place of each row's length: maps that use an operation without a rule, and layers one after the other,
    whose worst case (all roundings aligned through every layer) says nothing about a deep network.

    Args:
        network: The layer.
        points: Tokens.
        mass: What the layer is given as masses.
        output: The computed output.
        asked: Weights of the rows; those of an attention layer with weight 0 get the estimate, where they are many.

    Returns:
        One bound per entry of the output; infinity where nothing can be said.
    """
    estimate: Tensor = ESTIMATE * torch.linalg.vector_norm(output, dim=-1, keepdim=True).expand_as(output)
    if type(points) is not Tensor:  # a subclass cannot be followed
        return estimate
    if type(network) is Attention and asked is not None and int((asked != 0).sum()) * FEWER <= len(points):
        return _of_rows(network, points, mass, output, asked.nonzero().flatten(), estimate)
    tokens, masses = tracked(points), None if mass is None else tracked(mass)
    try:
        with torch.no_grad(), tracking():
            followed = network(tokens, masses)
    except NotTrackedError:
        return estimate
    bound = error_of(followed)
    return torch.minimum(bound, estimate) if isinstance(network, Network | Residual | NetworkGraph) else bound


def _of_rows(
    layer: Attention, points: Tensor, mass: Tensor | None, output: Tensor, at: Int[Tensor, "q"], estimate: Tensor
) -> Tensor:
    """Bounds of the rows ``at``: these rows are computed again, so their distance from ``output`` is added."""
    try:
        with torch.no_grad(), tracking():
            followed = layer.rows(tracked(points), at, None if mass is None else tracked(mass))
    except NotTrackedError:
        return estimate
    value = followed.as_subclass(Tensor)
    apart = (output[at] - value).abs() * (1.0 + sys.float_info.epsilon)
    return estimate.index_copy(0, at, error_of(followed) + apart)
