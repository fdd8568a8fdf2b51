"""The interface of everything that can be attacked or certified."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError


@runtime_checkable
class TokenMap(Protocol):
    """Anything that maps tokens to tokens, batched, in float64, with a content digest."""

    @property
    def width(self) -> int:
        """Input token width d."""

    @property
    def out_width(self) -> int:
        """Output token width e."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that defines the map."""

    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n e"]:
        """Evaluate; ``mass`` broadcasts over the batch, None means equal masses."""


def require_layer(layer: object) -> None:
    """Refuse what is no layer of this package, and layers that were not made yet (classes).

    Raises:
        InputError: With the ways to make one.
    """
    made = not isinstance(layer, type) and callable(layer)
    if not made or not hasattr(layer, "width"):
        kind = f"the class {layer.__name__}" if isinstance(layer, type) else f"a {type(layer).__name__}"
        raise InputError(f"the layer is {kind}; give attnrobust.Attention(...) or attnrobust.from_torch(module)")
