"""What a search hands over to a proof: free parameters, of which every value is sound, and where to look first."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.all_tokens.majorant import LIMITS, SIGNED, Parameters

SCALES = (1e-4, 1.0)  # of the weights of an ellipsoid whose largest is 1
LARGEST_REFERENCE = 1e6  # of a parameter of either sign


@dataclass(frozen=True, eq=False)
class Choice:
    """Nothing about it is claimed.

    Args:
        parameters: Free parameters of the majorant.
        scale: Weights of the ellipsoid.
        moves: Near-maximisers in coordinates of the movable tokens, as ``Coordinates.kept`` has them, or None.
    """

    parameters: Parameters
    scale: Float[Tensor, "m _"]
    moves: Float[Tensor, "b *m"] | None = None

    @property
    def admissible(self) -> "Choice":
        """The same as positive float64 numbers, whatever they were: what the inequalities ask of them."""
        values = {field.name: getattr(self.parameters, field.name).double() for field in fields(self.parameters)}
        signed = {
            name: _number(value, 0.0).clamp(-LARGEST_REFERENCE, LARGEST_REFERENCE) for name, value in values.items()
        }
        kept = {name: signed[name] if name in SIGNED else _positive(value) for name, value in values.items()}
        scale = _number(self.scale.double(), 1.0)
        scale = (scale / scale.amax()).clamp(*SCALES) if bool(scale.amax() > 0.0) else torch.ones_like(scale)
        moves = None if self.moves is None else _number(self.moves.double(), 0.0)
        return Choice(Parameters(**kept), scale, moves)


def _positive(value: Tensor) -> Tensor:
    return _number(value, 1.0).clamp(*LIMITS)


def _number(value: Tensor, instead: float) -> Tensor:
    return torch.where(torch.isfinite(value), value, instead)
