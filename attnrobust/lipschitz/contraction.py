"""Contractions of token measures: layers whose Lipschitz constant on a ball is proved to be below 1."""

import math
from dataclasses import dataclass

import torch

from attnrobust.certify.closed_form.castin2024_mean_field import mean_field_constant
from attnrobust.certify.closed_form.claims import whole_output
from attnrobust.certify.closed_form.sigmoid_ball import mean_field_constant as sigmoid_constant
from attnrobust.certify.shared.change import smallest
from attnrobust.certify.shared.head_sizes import head_norms
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.numerics.transport import Order
from attnrobust.tokens import as_number, as_positive


@dataclass(frozen=True)
class Contraction:
    """What is proved about one layer on the token measures of a ball.

    Args:
        order: p of W_p.
        radius: R of the ball.
        rate: Lipschitz constant q of the layer in W_p on the measures in the ball.
        image_radius: Radius of a ball that holds every output.
    """

    order: float
    radius: float
    rate: Upper
    image_radius: Upper

    @property
    def proved(self) -> bool:
        """Whether Banach's theorem applies: the ball is mapped into itself, and q < 1."""
        return self.rate.value < 1.0 and self.image_radius.value <= self.radius

    def iterations(self, tolerance: float) -> int:
        """Layers after which every two inputs in the ball are within a tolerance in W_p: ``q^k 2R <= tolerance``.

        Raises:
            InputError: A contraction that is not proved, or a tolerance that is not positive.
        """
        self.require()
        return iterations_needed(self.rate.value, 2.0 * self.radius, tolerance)

    def require(self) -> None:
        """Refuse what is not proved."""
        if not self.proved:
            raise InputError(
                f"no contraction is proved on the ball of radius {self.radius:g}: the rate in W_{self.order:g} is at "
                f"most {self.rate.value:.6g} and outputs have norm at most {self.image_radius.value:.6g}; "
                "scale the value weights down, or choose another radius"
            )


def contraction(layer: TokenMap, *, radius: float, order: Order = 2) -> Contraction:
    """Whether a weight-shared stack of one layer forgets its input: its rate in W_p on measures in a ball.

    ``rate`` is the mean-field constant of the layer on the ball, ``image_radius = ||M|| R + |bias|``.

    Args:
        layer: Attention without any mask, or sigmoid attention; its output is as wide as its tokens.
        radius: R > 0.
        order: p, one of 1, 2, infinity.

    Returns:
        The constants; ``proved`` says whether they are a contraction.

    Raises:
        UnsupportedModelError: Another layer, a mask, or an output of another width.
        InputError: A radius that is not positive, another order.

    References:
        Banach's theorem on the complete metric space of W_p; docs/infinite-depth.md.
    """
    if not isinstance(layer, Attention | SigmoidAttention):
        raise UnsupportedModelError(f"no constant in W_p is known for {type(layer).__name__}; use Attention")
    if isinstance(layer, Attention) and (layer.causal or layer.mask is not None or layer.placed):
        raise UnsupportedModelError("a masked layer is no map of token measures; leave the mask out")
    if layer.out_width != layer.width:
        raise UnsupportedModelError(f"the layer maps width {layer.width} to {layer.out_width}; they must agree")
    radius = as_positive("radius", radius)
    if as_number("order", order) not in (1, 2, math.inf):
        raise InputError(f"order {order} is not supported; give 1, 2 or infinity")
    rate = (
        mean_field_constant(layer, radius, order=float(order))
        if isinstance(layer, Attention)
        else sigmoid_constant(layer, radius)
    )
    views = head_norms(layer, layer.w_v, whole_output(layer.device))
    largest = radius * float(smallest([view.total(view.norms) for view in views]).amax())
    image = Upper(round_up(largest + _bias_norm(layer), relative=FORMULA))
    return Contraction(float(order), radius, rate, image)


def iterations_needed(rate: float, start: float, tolerance: float) -> int:
    """Smallest k with ``rate^k start <= tolerance``.

    Raises:
        InputError: A tolerance that is not positive.
    """
    if not as_number("the tolerance", tolerance) > 0:
        raise InputError(f"the tolerance must be > 0; got {tolerance}")
    if start <= tolerance:
        return 0
    if rate <= 0.0:
        return 1
    return math.ceil(math.log(tolerance / start) / math.log(rate))


def _bias_norm(layer: Attention | SigmoidAttention) -> float:
    """Norm of what the layer adds to every output."""
    total = torch.zeros(layer.out_width, dtype=torch.float64, device=layer.w_v.device)
    if isinstance(layer, Attention) and layer.b_v is not None:
        total = total + layer.combine(layer.b_v[:, None, :])[0]
    return float(torch.linalg.vector_norm(total if layer.b_o is None else total + layer.b_o))
