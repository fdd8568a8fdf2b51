"""The norm of a derivative by its products: no matrix, differentiable in the input."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.search.geometry import Geometry, SumBall
from attnrobust.errors import InputError
from attnrobust.numerics.linear_map import LinearMap, Product, largest_singular_value_lower
from attnrobust.numerics.sides import Lower, round_down
from attnrobust.problem import TokenMap
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall
from attnrobust.tokens import TokenMeasure

JacobianNorm = Literal["l2", "max-token", "linf"]
"""Norm of inputs and outputs behind the norm of the derivative."""
LAST = 40
"""Power iterations at the winner."""
LARGEST_SCAN = 4096
"""Output entries up to which every row of the derivative is looked at."""
INPUT_BALL: dict[str, Geometry] = {"l2": FrobeniusBall(), "max-token": PerTokenBall(), "linf": PerTokenBall("linf")}
"""Unit balls of inputs."""


def derivative_norm(
    network: TokenMap,
    tokens: TokenMeasure,
    *,
    norm: JacobianNorm = "l2",
    seed: int = 0,
    image: Float[Tensor, "n e"] | None = None,
) -> Lower:
    """Norm of the derivative at one input from below; see ``lipschitz_search`` for the norms.

    Args:
        network: The layer.
        tokens: The input.
        norm: "l2" by Lanczos; "linf" by all rows of small derivatives; else by power iterations, which may end at a
            smaller local maximum.
        seed: Seed of the first directions.
        image: A first output direction for the power iterations.

    Returns:
        A value that the derivative attains, rounded down.

    Raises:
        InputError: The derivative is not finite.
    """
    products = Products(network, tokens.points[None], None if tokens.uniform else tokens.mass.log()[None], norm)
    if norm == "l2":
        return largest_singular_value_lower(products.as_linear_map(), seed=seed)[0]
    if norm == "linf" and products.output.numel() <= LARGEST_SCAN:
        return Lower(round_down(float(products.row_sums().max())))
    trials = [random_directions(tokens.points[None], seed=seed + k, norm=norm) for k in range(8)]
    if image is not None:
        trials.append(INPUT_BALL[norm].steepest(products.pull(image[None])))
    best = 0.0
    for direction in trials:
        for _ in range(LAST):
            image = dual_direction(products.push(direction), norm)
            pulled = products.pull(image)
            value = float(INPUT_BALL[norm].dual_norm(pulled)[0])
            if not math.isfinite(value):
                raise InputError("the derivative is not finite at these tokens; the scores overflow")
            direction, improved, best = INPUT_BALL[norm].steepest(pulled), value > best, max(value, best)
            if not improved:
                break
    return Lower(round_down(best))


# ---- products ------------------------------------------------------------------------------------------------------


class Products:
    """Differentiable products with the (weighted) derivatives at a batch of inputs; no matrix is formed."""

    def __init__(
        self, network: TokenMap, points: Float[Tensor, "r n d"], log_mass: Float[Tensor, "r n"] | None, norm: str
    ) -> None:
        with torch.enable_grad():
            self.points = points if points.requires_grad else points.detach().clone().requires_grad_(True)
            mass = None if log_mass is None else log_mass.exp()
            self.output = network(self.points, mass)
            self._probe = torch.zeros_like(self.output).requires_grad_(True)
            # one row and one column per token: (D^{1/2} J D^{-1/2})^T u = D^{-1/2} J^T D^{1/2} u
            weighted = log_mass is not None and norm == "l2"
            self._root = (0.5 * log_mass).exp()[..., None] if weighted and log_mass is not None else None
            self._pulled = self.pull(self._probe, differentiable=True)

    def pull(self, image: Float[Tensor, "r n e"], *, differentiable: bool = False) -> Float[Tensor, "r n d"]:
        """``J^T u`` of every input."""
        image = image if self._root is None else image * self._root
        (pulled,) = torch.autograd.grad(
            self.output, self.points, image, retain_graph=True, create_graph=differentiable, materialize_grads=True
        )
        pulled = pulled if self._root is None else pulled / self._root
        return pulled if differentiable else pulled.detach()

    def push(self, direction: Float[Tensor, "r n d"]) -> Float[Tensor, "r n e"]:
        """``J v`` of every input: the derivative of ``u -> <J^T u, v>``."""
        (pushed,) = torch.autograd.grad(self._pulled, self._probe, direction, retain_graph=True, materialize_grads=True)
        return pushed.detach()

    def row_sums(self) -> Float[Tensor, "rows"]:
        """Absolute row sums of the flattened derivative at the first input; NaN raises."""
        units = torch.eye(self.output.numel(), dtype=self.output.dtype, device=self.output.device)
        sums = [self.pull(unit.reshape(self.output.shape)).abs().sum() for unit in units]
        if not bool(torch.isfinite(torch.stack(sums)).all()):
            raise InputError("the derivative is not finite at these tokens; the scores overflow")
        return torch.stack(sums)

    def as_linear_map(self) -> LinearMap:
        """The derivative at the first input."""
        return LinearMap(
            matvec=lambda v: _one_by_one(self.push, v),
            rmatvec=lambda u: _one_by_one(self.pull, u),
            in_shape=tuple(self.points.shape[1:]),
            out_shape=tuple(self.output.shape[1:]),
            device=self.points.device,
        )


def _one_by_one(product: Product, vectors: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n e"]:
    rows = [product(vector[None])[0] for vector in vectors.reshape(-1, *vectors.shape[-2:])]
    return torch.stack(rows).unflatten(0, vectors.shape[:-2]) if vectors.ndim > 2 else rows[0]


def dual_direction(output: Float[Tensor, "r n e"], norm: JacobianNorm) -> Float[Tensor, "r n e"]:
    """``u`` of dual norm 1 with ``<u, output> = ||output||``; zero where the output is zero."""
    if norm == "l2":
        return FrobeniusBall().steepest(output)
    if norm == "max-token":
        return SumBall().steepest(output)
    flat = output.flatten(1)
    largest = torch.nn.functional.one_hot(flat.abs().argmax(dim=1), flat.shape[1]).to(flat)
    return (largest * flat.sign()).reshape(output.shape)


def random_directions(like: Float[Tensor, "r n d"], *, seed: int, norm: JacobianNorm) -> Float[Tensor, "r n d"]:
    """Random inputs of unit norm in the primal ball of ``norm``; the same for one seed."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
    return INPUT_BALL[norm].steepest(drawn)
