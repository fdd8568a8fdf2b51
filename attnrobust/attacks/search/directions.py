"""Starting directions: top right singular vectors of the Jacobian, gradients of the margins, random directions."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnrobust.attacks.search.evaluate import Evaluator

LANCZOS_STEPS = 16
TINY = 1e-300


def singular_directions(
    evaluator: Evaluator,
    start: Float[Tensor, "p r n d"],
    allowed: Bool[Tensor, "p r n"],
    *,
    count: int,
    steps: int = LANCZOS_STEPS,
) -> tuple[Float[Tensor, "p r c n d"], Float[Tensor, "p r c"]]:
    """Leading right singular vectors of the pooled Jacobian restricted to the allowed tokens, by Lanczos on ``J^T J``.

    An iteration from below: the values say where to search, they bound nothing.

    Args:
        evaluator: The stacked problems.
        start: Start vectors, one Krylov space per (p, r).
        allowed: Tokens that may move.
        count: Vectors wanted; fewer dimensions give zero vectors.
        steps: Krylov dimension.

    Returns:
        Unit vectors and the singular values in units of 1/budget, largest first.
    """
    keep = allowed[..., None].to(start.dtype)
    vectors, values = top_eigenvectors(lambda v: evaluator.normal_product(v) * keep, start * keep, count, steps)
    return vectors, values.clamp_min(0.0).sqrt()


def top_eigenvectors(
    operator: Callable[[Tensor], Tensor], start: Float[Tensor, "p r n d"], count: int, steps: int
) -> tuple[Float[Tensor, "p r c n d"], Float[Tensor, "p r c"]]:
    """Ritz vectors of the largest eigenvalues of symmetric operators, one per (p, r), by Lanczos from one vector.

    Args:
        operator: Maps (p, r, n, d) to the same shape, each (p, r) by its own symmetric matrix.
        start: Start vectors.
        count: Vectors wanted.
        steps: Krylov dimension.

    Returns:
        Unit vectors and Ritz values, largest first.
    """
    steps = min(steps, start.shape[-1] * start.shape[-2])
    if steps == 0:  # nothing may be evaluated: nothing is known
        zero = torch.zeros_like(start)[:, :, None].expand(-1, -1, count, -1, -1)
        return zero, zero[..., 0, 0]
    basis: list[Tensor] = [_unit(start)]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for step in range(steps):
        image = operator(basis[-1])
        diagonal.append(_dot(basis[-1], image))
        stacked = torch.stack(basis, dim=2)
        for _ in range(2):  # full reorthogonalisation, twice is enough
            overlap = (stacked * image[:, :, None]).sum(dim=(-2, -1))
            image = image - (stacked * overlap[..., None, None]).sum(dim=2)
        norm = torch.linalg.vector_norm(image, dim=(-2, -1))
        # An exhausted space (n d < steps, rank deficiency) continues with zero vectors.
        small = norm <= 1e-12 * torch.stack(diagonal).abs().amax(dim=0)
        off.append(norm.masked_fill(small, 0.0))
        image = image.masked_fill(small[..., None, None], 0.0)
        if step + 1 < steps:
            basis.append(_unit(image))
    return _ritz(torch.stack(basis, dim=2), torch.stack(diagonal, -1), off[:-1], count)


def _ritz(basis: Tensor, diagonal: Tensor, off: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    tridiagonal = torch.diag_embed(diagonal)
    if off:
        beside = torch.stack(off, dim=-1)
        tridiagonal = tridiagonal + torch.diag_embed(beside, offset=1) + torch.diag_embed(beside, offset=-1)
    values, vectors = torch.linalg.eigh(tridiagonal.nan_to_num(0.0, 0.0, 0.0))  # NaN ends in NaN vectors below
    take = min(count, values.shape[-1])
    top = vectors[..., -take:].flip(-1)
    found = torch.einsum("prknd,prkc->prcnd", basis, top)
    return found, values[..., -take:].flip(-1)


def margin_gradients(evaluator: Evaluator, classes: Int[Tensor, "p c"]) -> Float[Tensor, "p c n d"]:
    """Gradients of the used shares of the given margins at the clean inputs (one evaluation each)."""
    zero = evaluator.points.new_zeros(classes.shape[0], classes.shape[1], *evaluator.points.shape[1:])
    return evaluator.shares_and_gradient(zero, classes)[1]


def random_directions(
    generators: list[torch.Generator], count: int, shape: Sequence[int], like: Tensor
) -> Float[Tensor, "p c ..."]:
    """Gaussian directions, each problem from its own stream."""
    drawn = [torch.randn(count, *shape, generator=g, dtype=torch.float64) for g in generators]
    directions: Tensor = torch.stack(drawn).to(like)
    return directions


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / length.clamp_min(TINY)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=(-2, -1))
