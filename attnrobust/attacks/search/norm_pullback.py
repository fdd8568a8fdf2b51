"""Forward, pullback and pushforward of attention behind its normalisation, from those of the attention."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.search.pullback import AttentionTape, PreparedAttention
from attnrobust.attacks.search.row_pullback import PreparedRows, RowTape
from attnrobust.layers.pre_norm import PreNormAttention


class PreparedPreNorm:
    """One layer, for p inputs.

    Args:
        layer: The layer.
        attention: Its attention, prepared.
        at: The rows that are evaluated; None means all.
    """

    def __init__(
        self, layer: PreNormAttention, attention: PreparedAttention | PreparedRows, at: Int[Tensor, "q"] | None
    ) -> None:
        self.layer, self.attention, self.at = layer, attention, at

    def forward(self, x: Float[Tensor, "p r n d"]) -> "PreNormTape":
        """Evaluate and keep what the derivatives need."""
        tape = self.attention.forward(self.layer.norm(x))
        output = tape.output + self._own(x) if self.layer.residual else tape.output
        centred, length = self.layer.centred(x), self.layer.length(x)[..., None]
        return PreNormTape(self, tape, centred / length, length, output)

    def _own(self, x: Tensor) -> Tensor:
        return x if self.at is None else x[..., self.at, :]

    def pushed(self, image: Tensor, tangent: Tensor) -> Tensor:
        """The image with the tokens' own move, where they are added."""
        return image + self._own(tangent) if self.layer.residual else image

    def pulled(self, gradient: Float[Tensor, "p r n d"], cotangent: Tensor) -> Tensor:
        """The gradient with the cotangent of the tokens themselves, where they are added."""
        if not self.layer.residual:
            return gradient
        return gradient + cotangent if self.at is None else gradient.index_add(-2, self.at, cotangent)


@dataclass(frozen=True, eq=False)
class PreNormTape:
    """The intermediate values of one evaluation, with the two derivative products.

    The norm is ``weight sqrt(d) u + bias`` with ``u = z / |(z, sqrt(d eps))|`` of derivative ``(1 - u u^T) / length``.
    """

    layer: PreparedPreNorm
    tape: AttentionTape | RowTape
    unit: Float[Tensor, "p r n d"]
    length: Float[Tensor, "p r n 1"]
    output: Tensor

    def pullback(self, cotangent: Tensor) -> Float[Tensor, "p r n d"]:
        """``J^T u`` for every stacked input."""
        own, size = self.layer.layer, self.layer.layer.width**0.5
        back = self._tangential(self.tape.pullback(cotangent) * own.norm.weight)
        return self.layer.pulled(own.centred(back) * size, cotangent)

    def pushforward(self, tangent: Float[Tensor, "p r n d"]) -> Tensor:
        """``J v`` for every stacked input."""
        own, size = self.layer.layer, self.layer.layer.width**0.5
        moved = self._tangential(own.centred(tangent)) * own.norm.weight * size
        return self.layer.pushed(self.tape.pushforward(moved), tangent)

    def _tangential(self, vectors: Tensor) -> Tensor:
        """``(v - u (u.v)) / length``, symmetric."""
        along = torch.linalg.vecdot(self.unit, vectors)[..., None]
        moved: Tensor = (vectors - self.unit * along) / self.length
        return moved
