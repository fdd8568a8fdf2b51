"""How far a layer's computed output may be from the exact one."""

import sys

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.token_map import TokenMap
from attnrobust.numerics.running_error import NotTrackedError, error_of, tracked, tracking

ESTIMATE = 2.0**9 * sys.float_info.epsilon
"""Rounding of an output row relative to its length where no bound is proved: 512 units in the last place."""


def output_rounding(
    network: TokenMap, points: Float[Tensor, "n d"], mass: Float[Tensor, "n"] | None, output: Float[Tensor, "rows e"]
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

    Returns:
        One bound per entry of the output; infinity where nothing can be said.
    """
    estimate: Tensor = ESTIMATE * torch.linalg.vector_norm(output, dim=-1, keepdim=True).expand_as(output)
    if type(points) is not Tensor:  # a subclass cannot be followed
        return estimate
    tokens, masses = tracked(points), None if mass is None else tracked(mass)
    try:
        with torch.no_grad(), tracking():
            followed = network(tokens, masses)
    except NotTrackedError:
        return estimate
    bound = error_of(followed)
    return torch.minimum(bound, estimate) if isinstance(network, Network | Residual | NetworkGraph) else bound
