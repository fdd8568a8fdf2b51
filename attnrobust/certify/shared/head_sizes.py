"""Sizes of one attention layer at one input: norms, diameters and key gradients per head, and how heads combine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnrobust.goals import ResolvedGoal
from attnrobust.layers.attention import Attention
from attnrobust.numerics.triangle import product_norm, triangle


@runtime_checkable
class Headed(Protocol):
    """What combining heads needs to know of a layer."""

    @property
    def heads(self) -> int:
        """Number of heads h."""

    @property
    def value_width(self) -> int:
        """Value width v of one head."""

    @property
    def w_o(self) -> Float[Tensor, "h v e"] | None:
        """Output projection, or None where the heads are concatenated."""


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """One sound way to measure what a change of the head averages does to the goal.

    Args:
        norms: Norm of the map from one head's inner vector to the measured output, (c, h).
        stack: None: heads add up. A number: they are orthogonal before a map of this norm.
    """

    norms: Float[Tensor, "c h"]
    stack: float | None

    def total(self, per_head: Float[Tensor, "c h"]) -> Float[Tensor, "c"]:
        """Combine bounds of single heads."""
        return per_head.sum(dim=-1) if self.stack is None else self.stack * torch.linalg.vector_norm(per_head, dim=-1)


@dataclass(frozen=True, eq=False)
class ValueView(HeadNorms):
    """``HeadNorms`` of the map from a token to its value, with the size of the visible tokens under that map.

    Args:
        norms: Norms of the maps, (c, h).
        stack: How heads combine.
        diameters: Largest distance of two visible tokens under the map, (c, h).
        spectral: Spectral norm of the centred images of the visible tokens, (c, h).
    """

    diameters: Float[Tensor, "c h"]
    spectral: Float[Tensor, "c h"]


@dataclass(frozen=True, eq=False)
class HeadSizes:
    """Per-head sizes of the scores; ``B = scale w_q w_k^T``, ``beta_i = x_i B + scale w_k b_q = d s_ij / d x_j``.

    Args:
        bilinear: ``||B||_2`` (h,).
        offset: ``|scale w_k b_q|`` (h,), zero without query bias.
        key_gradient: ``|beta_i|`` (h, n).
        key_gradient_norm: Spectral norm of the stacked ``beta_i`` (h,).
        query_diameter: Largest distance of two visible ``x_j B^T`` (h,); ``x_j B^T`` is the gradient in ``x_i``.
        query_spectral: Spectral norm of the centred visible ``x_j B^T`` (h,).
    """

    bilinear: Float[Tensor, "h"]
    offset: Float[Tensor, "h"]
    key_gradient: Float[Tensor, "h n"]
    key_gradient_norm: Float[Tensor, "h"]
    query_diameter: Float[Tensor, "h"]
    query_spectral: Float[Tensor, "h"]

    @classmethod
    def of(cls, layer: Attention, points: Float[Tensor, "n d"], visible: Bool[Tensor, "n"]) -> "HeadSizes":
        """Sizes at the clean tokens."""
        right_q, right_k = triangle(layer.w_q), triangle(layer.w_k)
        gradients = layer.factor * layer.queries(points) @ right_k.transpose(-1, -2)
        keys = torch.einsum("nd,hdk->hnk", points[visible], layer.w_k)
        images = layer.factor * keys @ right_q.transpose(-1, -2)
        return cls(
            bilinear=spectral_norm(layer.factor * right_q @ right_k.transpose(-1, -2)),
            offset=torch.linalg.vector_norm(layer.key_offset, dim=-1),
            key_gradient=torch.linalg.vector_norm(gradients, dim=-1),
            key_gradient_norm=spectral_norm(gradients),
            query_diameter=diameter(images),
            query_spectral=spectral_norm(images - images.mean(dim=-2, keepdim=True)),
        )


def value_views(
    layer: Attention, points: Float[Tensor, "n d"], visible: Bool[Tensor, "n"], goal: ResolvedGoal
) -> tuple[ValueView, ...]:
    """Every sound view of the values for the goal."""
    values = torch.einsum("nd,hdv->hnv", points[visible], layer.w_v)
    return tuple(_view(layer.w_v @ after, values @ after, stack) for after, stack in readouts(layer, goal))


def head_norms(layer: Headed, matrices: Float[Tensor, "h r v"], goal: ResolvedGoal) -> tuple[HeadNorms, ...]:
    """Every sound view of head averages that are an inner vector times ``matrices``."""
    return tuple(HeadNorms(spectral_norm(matrices @ after), stack) for after, stack in readouts(layer, goal))


def readouts(layer: Headed, goal: ResolvedGoal) -> Iterator[tuple[Float[Tensor, "c h v r"], float | None]]:
    """What follows a head average: functionals exactly; else heads added up, and heads stacked."""
    if goal.functionals is not None:
        yield _per_head(layer, goal.functionals)[..., None], None
        return
    like = goal.budgets
    eye = torch.eye(layer.value_width, dtype=like.dtype, device=like.device).expand(1, layer.heads, -1, -1)
    if layer.w_o is None:
        yield eye, 1.0
        return
    yield triangle(layer.w_o.transpose(-1, -2)).transpose(-1, -2)[None], None  # |y w_o| = |y R^T|
    yield eye, float(spectral_norm(layer.w_o.flatten(0, 1)))


def _view(maps: Float[Tensor, "c h d r"], images: Float[Tensor, "c h m r"], stack: float | None) -> ValueView:
    centred = images - images.mean(dim=-2, keepdim=True)
    return ValueView(spectral_norm(maps), stack, diameter(images), spectral_norm(centred))


def _per_head(layer: Headed, functionals: Float[Tensor, "c e"]) -> Float[Tensor, "c h v"]:
    if layer.w_o is None:
        return functionals.reshape(functionals.shape[0], layer.heads, layer.value_width)
    return torch.einsum("hve,ce->chv", layer.w_o, functionals)


def bilinear_norm(layer: Attention) -> Float[Tensor, "h"]:
    """``||B||_2`` of every head from its narrow factors: no d x d matrix."""
    return abs(layer.factor) * product_norm(layer.w_q, layer.w_k)


def output_norms(layer: Attention) -> Float[Tensor, "h"]:
    """``||w_v w_o||_2`` of every head from its narrow factors; ``||w_v||_2`` where the heads are concatenated."""
    return spectral_norm(layer.w_v) if layer.w_o is None else product_norm(layer.w_v, layer.w_o.mT)


def spectral_norm(matrices: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    """Spectral norms by full decompositions."""
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    return norms


def diameter(points: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    """Largest distance of two points; differences are taken first, so that near points keep their digits."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    largest: Tensor = distances.amax(dim=(-2, -1))
    return largest


def without_common_part(vectors: Float[Tensor, "h n v"]) -> Float[Tensor, "h n v"]:
    """The vectors minus the shortest one of their head.

    Every difference is accurate to the size of its own vector; a mean would carry the rounding of one huge token, that
    a row may not even see, into all of them.
    """
    shortest = torch.linalg.vector_norm(vectors, dim=-1).argmin(dim=1)
    return vectors - vectors[torch.arange(len(vectors), device=vectors.device), shortest][:, None]
