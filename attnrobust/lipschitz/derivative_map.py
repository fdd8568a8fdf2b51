"""The derivative of a layer at an input as a linear map, and norms of such maps from below."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.token_map import TokenMap
from attnrobust.numerics.linear_map import LinearMap, scale_rows, scale_tokens
from attnrobust.numerics.sides import Lower, round_down
from attnrobust.tokens import TokenMeasure

LARGEST_MATRIX = 1 << 24
CHUNK = 64  # rows of a derivative that are pulled back together
ALTERNATIONS = 8
"""Steps of the search for the most sensitive row; every step gives a lower bound."""
ROWS = 64
"""Most output rows that this search looks at."""
ENTRIES = 256
"""Output entries whose derivatives are added up for the largest-entry norm."""
TINY = 1e-300


def attention_jacobian(layer: Attention, tokens: TokenMeasure) -> AttentionJacobian:
    """The derivative of dot-product attention at an input; equal masses cancel."""
    return AttentionJacobian(layer, tokens.points, None if tokens.uniform else tokens.mass)


def derivative_map(network: TokenMap, tokens: TokenMeasure) -> LinearMap:
    """The derivative of a layer at an input: exact products for dot-product attention, else its matrix.

    Raises:
        InputError: A matrix of more than ``LARGEST_MATRIX`` entries.
    """
    mass = None if tokens.uniform else tokens.mass
    if isinstance(network, Attention):
        return attention_jacobian(network, tokens).linear_map()
    shape_in, shape_out = (tokens.n, network.width), (tokens.n, network.out_width)
    rows, columns = math.prod(shape_out), math.prod(shape_in)
    if rows * columns > LARGEST_MATRIX:
        raise InputError(f"the derivative of this layer is a {rows} x {columns} matrix; give fewer or narrower tokens")
    pull = torch.func.vjp(lambda x: network(x, mass), tokens.points)[1]
    unit = torch.eye(rows, dtype=torch.float64, device=tokens.points.device).reshape(-1, *shape_out)
    matrix = torch.func.vmap(pull, chunk_size=CHUNK)(unit)[0].flatten(1).detach()

    def times(matrix: Tensor, vectors: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (vectors.flatten(-2) @ matrix.T).reshape(*vectors.shape[:-2], *shape)

    return LinearMap(
        matvec=lambda v: times(matrix, v, shape_out),
        rmatvec=lambda u: times(matrix.T, u, shape_in),
        in_shape=shape_in,
        out_shape=shape_out,
        device=tokens.points.device,
    )


def mass_weighted(linear: LinearMap, mass: Float[Tensor, "n"]) -> LinearMap:
    """``D^{1/2} J D^{-1/2}``, D = diag(mass): its norm is the rate in W_2 at which atoms of these masses move."""
    root = mass.sqrt()
    return scale_rows(scale_tokens(linear, 1.0 / root), root)


def largest_row_lower(linear: LinearMap) -> Lower:
    """Largest change of one output row per unit of the largest token move, from below.

    For an output row i and a unit u, moving every token by the unit vector along its block of ``J^T (e_i u)`` changes
    ``u . f_i`` by the sum of their norms; then u is turned towards the change that this move makes.
    """
    n, e = linear.out_shape
    chosen = torch.linspace(0, n - 1, min(n, ROWS), device=linear.device).long()
    place = torch.nn.functional.one_hot(chosen, n).to(torch.float64)[:, :, None]  # (rows, n, 1)
    u = torch.ones(len(chosen), e, dtype=torch.float64, device=linear.device) / math.sqrt(e)
    best = 0.0
    for _ in range(ALTERNATIONS):
        blocks = linear.rmatvec(place * u[:, None, :])  # J^T (e_i u_i) of every chosen row, (rows, n, d)
        lengths = torch.linalg.vector_norm(blocks, dim=-1, keepdim=True)
        changed = (linear.matvec(blocks / lengths.clamp_min(TINY)) * place).sum(dim=-2)  # row i by its own move
        size = torch.linalg.vector_norm(changed, dim=-1, keepdim=True)
        best = max(best, float(size.max()))
        u = changed / size.clamp_min(TINY)
    return Lower(round_down(best))


def largest_entry_lower(linear: LinearMap) -> Lower:
    """Largest sum of absolute derivatives of one output entry, over the first ``ENTRIES`` entries."""
    count = min(linear.out_size, ENTRIES)
    best = 0.0
    for part in torch.arange(count).split(32):
        unit = torch.zeros(len(part), linear.out_size, dtype=torch.float64, device=linear.device)
        unit[torch.arange(len(part)), part] = 1.0
        rows = linear.rmatvec(unit.reshape(-1, *linear.out_shape))
        best = max(best, float(rows.abs().sum(dim=(-2, -1)).max()))
    return Lower(round_down(best))
