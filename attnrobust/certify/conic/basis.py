"""Directions of each token that matter to one softmax row."""

from typing import Literal

import numpy as np
from jaxtyping import Float

from attnrobust.certify.conic.row import Row
from attnrobust.numerics.rounding import ENTRY, outward

Array = Float[np.ndarray, "..."]
Bases = Literal["plain", "aligned", "full"]

RANK = 1e-14  # directions closer to the span of the others than this are dropped; far inside the charged rounding


def bases_of(
    row: Row, gradient: Float[np.ndarray, "m d"], *, bases: Bases
) -> tuple[Float[np.ndarray, "d _"] | None, ...]:
    """Orthonormal basis per moving token, None for tokens that the row does not see.

    A key matters through beta and gamma, the query through every alpha_j too; the bilinear part sees all directions, of
    which the aligned ones carry the first-order move; with full bases nothing is left outside.

    Args:
        row: The row.
        gradient: Gradient of the drop per moving token.
        bases: "plain", "aligned" (with the gradient at the query and its image at the keys), or "full" (every direction
            wherever the row has a bilinear part).
    """
    chosen: list[Float[np.ndarray, "d _"] | None] = []
    keys = set(row.key[row.key_moves].tolist())
    for token in range(row.moving):
        vectors = [row.beta, row.value] if token in keys else []
        if token == row.query:
            vectors += [*row.alpha] + ([gradient[token]] if bases == "aligned" else [])
        elif token in keys and row.query_moves and bases == "aligned":
            vectors.append(row.bilinear.T @ gradient[row.query])
        seen = token in keys or token == row.query
        full = bases == "full" and row.query_moves
        basis = np.eye(len(row.beta)) if full else orthonormal(np.array(vectors)) if seen else None
        chosen.append(basis if seen else None)
    return tuple(chosen)


def orthonormal(vectors: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "d s"]:
    """Orthonormal basis of the span; the unit vectors where it is everything."""
    lengths = np.linalg.norm(vectors, axis=1)
    kept = vectors[lengths > 0.0] / lengths[lengths > 0.0, None]
    d = vectors.shape[1]
    if len(kept) == 0:
        return np.eye(d)[:, :1]
    left, values, _ = np.linalg.svd(kept.T, full_matrices=False)
    basis = left[:, values > RANK * values[0]]
    return np.eye(d) if basis.shape[1] == d else basis


def away_from(basis: Float[np.ndarray, "d r"]) -> Float[np.ndarray, "d d"]:
    """Projector onto what the basis does not span; exactly 0 where it spans everything."""
    d, rank = basis.shape
    return np.zeros((d, d)) if rank == d else np.eye(d) - basis @ basis.T


def norm_upper(matrix: Array) -> float:
    """Upper bound of a spectral norm; exactly 0 for the zero matrix."""
    return outward(float(np.linalg.norm(matrix, 2)), ENTRY) if matrix.any() else 0.0
