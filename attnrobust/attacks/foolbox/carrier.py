"""Token measures as tensors of one shape: (B, slots, d + 1), the last channel is the mass, 0 marks an empty slot.

Masses in a carrier are multiplicities: 1 is an ordinary token, 3 a token with two copies, 0.5 half of a split token.
The layer adds ``log(mass)`` to the scores, so only their proportions count.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.problem import TokenMap
from attnrobust.tokens import TokenMeasure, require_finite

EMPTY = 1e-300
"""Mass that stands for 0 inside the layer: far below rounding in every sum, with the right derivative at 0."""


def to_carrier(
    inputs: Sequence[TokenMeasure | Float[Tensor, "_ _"]], *, slots: int | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "b slots channels"]:
    """Inputs of any lengths as one tensor; equal masses become 1, others n times the mass.

    Args:
        inputs: Token vectors, with or without masses, all of one width.
        slots: Slots of each input; more than its tokens leave room for copies and for children of split tokens. None
            means the longest input.
        dtype: Of the result; None means float64, which small shares of a token's mass need.

    Raises:
        InputError: No inputs, different widths, fewer slots than tokens, tokens that are not finite.
    """
    measures = [x if isinstance(x, TokenMeasure) else TokenMeasure(x) for x in inputs]
    if not measures:
        raise InputError("there are no inputs; give at least one")
    longest = max(m.n for m in measures)
    slots = longest if slots is None else slots
    if slots < longest:
        raise InputError(f"an input has {longest} tokens, more than {slots} slots; give more slots")
    widths = {m.width for m in measures}
    if len(widths) > 1:
        raise InputError(f"the inputs have the widths {sorted(widths)}; they must agree")
    carrier = measures[0].points.new_zeros(len(measures), slots, widths.pop() + 1)
    for row, measure in zip(carrier, measures, strict=True):
        row[: measure.n, :-1] = measure.points
        row[: measure.n, -1] = 1.0 if measure.uniform else measure.n * measure.mass
    return carrier if dtype is None else carrier.to(dtype)


def from_carrier(row: Float[Tensor, "slots channels"]) -> TokenMeasure:
    """The tokens of one input, with masses that sum to 1.

    Raises:
        InputError: No tokens, negative masses, NaN or infinity.
    """
    mass = row[:, -1].detach().to(torch.float64)
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()):
        raise InputError("the masses of a carrier must be finite and >= 0")
    used = mass > 0
    if not bool(used.any()):
        raise InputError("the carrier holds no token; the last channel is the mass, 0 marks an empty slot")
    return TokenMeasure(row[used, :-1], mass[used] / mass[used].sum())


def used_slots(carrier: Float[Tensor, "b slots channels"]) -> list[int]:
    """Number of tokens of each input.

    Raises:
        InputError: An empty slot in front of a token.
    """
    used = carrier[..., -1] > 0
    counts = used.sum(dim=1)
    expected = torch.arange(carrier.shape[1], device=carrier.device) < counts[:, None]
    if not torch.equal(used, expected):
        raise InputError("the empty slots of a carrier (mass 0) must come after its tokens")
    found: list[int] = counts.tolist()
    return found


class CarrierModel(torch.nn.Module):
    """A layer with a linear readout of its pooled output, from carriers to logits.

    Wrapped as ``foolbox.PyTorchModel(model.eval(), bounds=(-math.inf, math.inf))`` it can be attacked by foolbox.

    Args:
        layer: An attention layer without masks.
        weight: Readout (classes, e).
        bias: Readout biases (classes,) or None.
        pool: "mean" (weighted by mass) or the index of a slot.

    Raises:
        UnsupportedModelError: A layer with a mask; a carrier does not say between which tokens a copy stands.
        InputError: A readout that does not fit.
    """

    def __init__(
        self,
        layer: TokenMap,
        weight: Float[Tensor, "c e"],
        bias: Float[Tensor, "c"] | None = None,
        *,
        pool: Literal["mean"] | int = "mean",
    ) -> None:
        super().__init__()
        if getattr(layer, "causal", False) or getattr(layer, "mask", None) is not None:
            raise UnsupportedModelError(
                "a carrier does not say where a copy stands among the tokens, so the layer must have no mask"
            )
        if weight.ndim != 2 or weight.shape[1] != layer.out_width:
            raise InputError(f"the readout has shape {tuple(weight.shape)}, the layer gives width {layer.out_width}")
        self.layer, self.pool = layer, pool
        self.weight = require_finite("readout weight", weight)
        self.bias = None if bias is None else require_finite("readout bias", bias)

    def forward(self, carrier: Float[Tensor, "b slots channels"]) -> Float[Tensor, "b c"]:
        """Logits of every input, in the dtype of the carrier; computed in float64."""
        exact = carrier.to(torch.float64)
        points, mass = exact[..., :-1], exact[..., -1]
        output = self.layer(points, torch.where(mass > 0, mass, mass + EMPTY))
        if self.pool == "mean":
            share = mass / mass.sum(dim=1, keepdim=True)
            pooled = (share[:, None, :] @ output).squeeze(1)
        else:
            pooled = output[:, self.pool]
        logits = pooled @ self.weight.T
        return (logits if self.bias is None else logits + self.bias).to(carrier.dtype)
