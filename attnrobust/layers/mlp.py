"""The feed-forward part of a transformer block, token by token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import UnknownNameError
from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import Specification, adopt_weights, require_shapes

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "identity"]

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


@dataclass(frozen=True, eq=False)
class Mlp(Specification):
    """``f(X)_i = activation(x_i w_1 + b_1) w_2 + b_2``, the same for every token.

    Args:
        w_1: First weights (d, m).
        w_2: Second weights (m, e).
        b_1: First biases (m,) or None.
        b_2: Second biases (e,) or None.
        activation: "relu", "gelu" (exact), "gelu_tanh" (its tanh form, as GPT-2 has it), "silu", "tanh", "sigmoid" or
            "identity".

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights.
        UnknownNameError: An activation that is not modelled.
    """

    w_1: Float[Tensor, "d m"]
    w_2: Float[Tensor, "m e"]
    b_1: Float[Tensor, "m"] | None = None
    b_2: Float[Tensor, "e"] | None = None
    activation: Activation = "gelu"

    feature_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("w_1", "w_2"), PLAIN),
        **dict.fromkeys(("b_1", "b_2"), "bias"),
        "activation": "activation",
    }

    def __post_init__(self) -> None:
        adopt_weights(self, w_1=2, w_2=2, b_1=1, b_2=1)
        inner = int(self.w_1.shape[1])
        require_shapes(self, {"w_2": (inner, self.out_width), "b_1": (inner,), "b_2": (self.out_width,)})
        if self.activation not in _FUNCTIONS:
            raise UnknownNameError("activation", str(self.activation), get_args(Activation))

    @property
    def width(self) -> int:
        return int(self.w_1.shape[0])

    @property
    def out_width(self) -> int:
        return int(self.w_2.shape[1])

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        hidden = x @ self.w_1
        hidden = _FUNCTIONS[self.activation](hidden if self.b_1 is None else hidden + self.b_1)
        out = hidden @ self.w_2
        return out if self.b_2 is None else out + self.b_2
