"""Where the ascent on the derivative's norm starts: random inputs, and those of the closed-form lower bounds."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.method import input_seed
from attnrobust.attacks.search.geometry import Geometry
from attnrobust.layers.attention import Attention
from attnrobust.lipschitz.eigenvector_inputs import finite_lower, mean_field_lower
from attnrobust.problem import TokenMap
from attnrobust.tokens import tensor_digest

NAME = "lipschitz-search"
Masses = Literal["equal", "free"]
ATOM_SPREAD = 0.05
"""Tokens of one atom start apart by this share of the atoms' distance; equal tokens would never part."""

LIGHTEST = -700.0
"""Log-mass of the lightest atom of a start: its mass and the mass's square root are still positive in float64."""


def ascent_starts(
    network: TokenMap,
    center: Float[Tensor, "n d"],
    epsilon: float,
    geometry: Geometry,
    masses: Masses,
    planted: bool,
    restarts: int,
    seed: int,
) -> tuple[list[str], Float[Tensor, "r n d"], Float[Tensor, "r n"]]:
    """Names, moves and log-masses of all starts."""
    generator = torch.Generator().manual_seed(input_seed(seed, tensor_digest(center, extra=network.digest), NAME))
    drawn = torch.randn(restarts, *center.shape, generator=generator, dtype=torch.float64).to(center)
    reach = torch.rand(restarts, generator=generator, dtype=torch.float64).to(center)
    # every second start has two atoms with random shares of the tokens: large derivatives sit at few atoms
    share = torch.rand(restarts, 1, generator=generator, dtype=torch.float64)
    second = torch.rand(restarts, center.shape[0], generator=generator, dtype=torch.float64) < share**2
    atoms = torch.where(second.to(center.device)[..., None], drawn[:, -1:], drawn[:, :1])
    drawn[1::2] = atoms[1::2] + ATOM_SPREAD * drawn[1::2]
    drawn = geometry.project(drawn, float(drawn.abs().max()))  # what may not move stays
    size = geometry.distance(drawn).clamp_min(1e-300)
    moves = geometry.project(drawn / size[:, None, None] * (epsilon * reach)[:, None, None], epsilon)
    logits = center.new_zeros(restarts, center.shape[0])
    names = ["random"] * restarts
    if planted and isinstance(network, Attention) and network.mask is None and not network.placed:
        for points, log_mass in eigenvector_inputs(network, center.shape[0], epsilon, masses):
            moves = torch.cat([moves, geometry.project(points - center, epsilon)[None]])
            logits = torch.cat([logits, log_mass[None]])
            names.append("eigenvector")
    return names, moves, logits


def eigenvector_inputs(layer: Attention, n: int, radius: float, masses: Masses) -> list[tuple[Tensor, Tensor]]:
    """The closed-form inputs around 0, as n atoms with log-masses."""
    points = finite_lower(layer, n, radius).tokens.points
    found = [(points, points.new_zeros(n))]
    if masses == "free" and n > 1 and not layer.causal:
        few = mean_field_lower(layer, radius).tokens  # one or two atoms; the last one is shared out
        atoms = torch.cat([few.points[:1], few.points[-1:].expand(n - 1, -1)])
        last = few.mass[-1] if few.n > 1 else few.mass[-1] * (n - 1) / n
        shared = torch.cat([1.0 - last[None], last[None].expand(n - 1) / (n - 1)])
        found.append((atoms, shared.log().clamp_min(LIGHTEST)))
    return found
