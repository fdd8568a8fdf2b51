"""Infinite depth and invertibility: contractions proved by Lipschitz bounds, iterated to their fixed points."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_mean_field import mean_field_constant
from attnrobust.certify.closed_form.kim2021_l2 import spread_bound
from attnrobust.certify.closed_form.sigmoid_ball import mean_field_constant as sigmoid_constant
from attnrobust.certify.shared.change import smallest
from attnrobust.certify.shared.head_sizes import head_norms, spectral_norm
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.goals import ResolvedGoal
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Lower, Upper, round_up
from attnrobust.numerics.transport import Order, coupling_cost
from attnrobust.tokens import TokenMeasure, tensor_digest

MOST_ITERATIONS = 100_000
STALLED = 8.0 * torch.finfo(torch.float64).eps
"""Rounding of an iterate relative to its largest entry; the iteration can do no better."""


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
        return _powers(self.rate.value, 2.0 * self.radius, tolerance)

    def require(self) -> None:
        """Refuse what is not proved."""
        if not self.proved:
            raise InputError(
                f"no contraction is proved on the ball of radius {self.radius:g}: the rate in W_{self.order:g} is at "
                f"most {self.rate.value:.6g} and outputs have norm at most {self.image_radius.value:.6g}; "
                "scale the value weights down, or choose another radius"
            )


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Where an iteration ended.

    Args:
        tokens: The last iterate.
        iterations: Evaluations of the layer.
        certified_iterations: How many the proved rate needs at most for the tolerance.
        rate: Proved rate.
        measured_rate: Largest ratio of successive steps, less the rounding of the iterates.
        error: Bound of the distance to the fixed point, from the last step and the proved rate (exact arithmetic).
        steps: Length of every step.
    """

    tokens: Float[Tensor, "n d"]
    iterations: int
    certified_iterations: int
    rate: Upper
    measured_rate: Lower
    error: Upper
    steps: tuple[float, ...]


def contraction(layer: Attention | SigmoidAttention, *, radius: float, order: Order = 2) -> Contraction:
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
    if isinstance(layer, Attention) and (layer.causal or layer.mask is not None):
        raise UnsupportedModelError("a masked layer is no map of token measures; leave the mask out")
    if layer.out_width != layer.width:
        raise UnsupportedModelError(f"the layer maps width {layer.width} to {layer.out_width}; they must agree")
    if not (math.isfinite(radius) and radius > 0) or order not in (1, 2, math.inf):
        raise InputError("give a radius > 0 and an order 1, 2 or infinity")
    rate = (
        mean_field_constant(layer, radius, order=float(order))
        if isinstance(layer, Attention)
        else sigmoid_constant(layer, radius)
    )
    views = head_norms(layer, layer.w_v, _all_rows(layer.w_v))
    largest = radius * float(smallest([view.total(view.norms) for view in views]).amax())
    image = Upper(round_up(largest + _bias_norm(layer), relative=FORMULA))
    return Contraction(float(order), radius, rate, image)


def fixed_measure(
    layer: Attention | SigmoidAttention,
    clean: TokenMeasure,
    *,
    radius: float,
    order: Order = 2,
    tolerance: float = 1e-9,
) -> FixedPoint:
    """Apply one layer again and again until its measure is within a tolerance of the fixed point in W_p.

    The proof of the mean-field constant holds for every coupling, so token by token the coupling cost of successive
    measures shrinks by the rate, and the error after a step of cost s is at most ``q s / (1 - q)``.

    Args:
        layer: See ``contraction``.
        clean: The input; its tokens lie in the ball.
        radius: R.
        order: p.
        tolerance: Distance in W_p, > 0.

    Returns:
        The tokens after the last layer, with the masses of the input.

    Raises:
        InputError: No contraction is proved, a clean token outside of the ball, a tolerance that cannot be reached.
    """
    known = contraction(layer, radius=radius, order=order)
    known.require()
    longest = float(torch.linalg.vector_norm(clean.points, dim=-1).max())
    if longest > radius:
        raise InputError(f"a clean token has norm {longest:.6g}, outside of the ball of radius {radius:.6g}")
    mass = None if clean.uniform else clean.mass

    def length(step: Tensor) -> float:
        return float(coupling_cost(step, clean.mass, order=order))

    return _iterate(lambda x: layer(x, mass), clean.points, known.rate, length, tolerance)


def l2_constant(layer: L2Attention, n: int) -> Upper:
    """Frobenius Lipschitz constant of L2 attention on at most n tokens of equal mass, on all of space.

    One head, ``c e^{c+1} = n - 1``: ``scale ||w_q|| ||w_q^T w_v w_o|| [ sqrt(n) (1 + 2c) + 2c ]``.

    Args:
        layer: The layer.
        n: Largest number of tokens.

    References:
        Derived, docs/certificates-literature.md, section 12, after Kim, Papamakarios and Mnih, ICML 2021.
    """
    if n < 1:
        raise InputError(f"n must be >= 1; got {n}")
    c, root = spread_bound(n - 1.0), layer.factor**0.5
    views = head_norms(layer, root * layer.w_q.transpose(-1, -2) @ layer.w_v, _all_rows(layer.w_v))
    inner = root * spectral_norm(layer.w_q) * (n**0.5 * (1.0 + 2.0 * c) + 2.0 * c)
    value = float(smallest([view.total(view.norms * inner) for view in views]).amax())
    return Upper(round_up(value, relative=FORMULA))


@dataclass(frozen=True, eq=False)
class ContractiveResidual:
    """``y = x + g(x)``, ``g = share / constant * layer``: invertible, because g is a contraction of rate ``share``.

    Args:
        layer: Any map of tokens to tokens of the same width.
        constant: Upper bound of its Frobenius Lipschitz constant on inputs of at most ``tokens`` tokens of equal mass.
        share: c in (0, 1).
        tokens: Largest number of tokens.

    Raises:
        InputError: A share outside (0, 1), a constant that is not positive, finite and deterministic, another width.
    """

    layer: TokenMap
    constant: Upper
    share: float
    tokens: int

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise InputError(f"the share must be in (0, 1); got {self.share}")
        if not 0.0 < self.constant.value < math.inf or self.constant.failure_probability > 0:
            raise InputError("the Lipschitz constant must be positive, finite and deterministic")
        if self.layer.out_width != self.layer.width:
            raise InputError(f"the layer maps width {self.layer.width} to {self.layer.out_width}; they must agree")
        if self.tokens < 1:
            raise InputError(f"tokens must be >= 1; got {self.tokens}")

    @classmethod
    def of_l2(cls, layer: L2Attention, *, tokens: int, share: float = 0.9) -> "ContractiveResidual":
        """The invertible layer of L2 attention with its derived constant."""
        return cls(layer, l2_constant(layer, tokens), share, tokens)

    @property
    def width(self) -> int:
        """Token width d."""
        return self.layer.width

    @property
    def out_width(self) -> int:
        """Token width d again."""
        return self.layer.out_width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of layer, constant and share."""
        return tensor_digest(extra=f"contractive;{self.layer.digest};{self.constant.value!r};{self.share!r}")

    def branch(self, x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """The contraction g."""
        if x.shape[-2] > self.tokens:
            raise InputError(f"the constant is for at most {self.tokens} tokens; the input has {x.shape[-2]}")
        return self.share / self.constant.value * self.layer(x)

    def __call__(self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None) -> Tensor:
        """Evaluate ``x + g(x)`` for equal masses."""
        if mass is not None:
            raise InputError("the constant is for tokens of equal mass; leave the masses out")
        return x + self.branch(x)

    def inverse(self, y: Float[Tensor, "n d"], *, tolerance: float = 1e-12) -> FixedPoint:
        """The x with ``x + g(x) = y``, by ``x <- y - g(x)``: rate ``share``, whatever y.

        Args:
            y: An output.
            tolerance: Frobenius distance to the exact x, > 0; near rounding the iteration stops where it stalls.

        Returns:
            x, with a bound of its error in exact arithmetic.
        """
        return _iterate(lambda x: y - self.branch(x), y.detach(), Upper(self.share), _frobenius, tolerance)

    def equilibrium(self, x: Float[Tensor, "n d"], *, tolerance: float = 1e-12) -> FixedPoint:
        """The z with ``z = x + g(z)``: the output of infinitely many layers with shared weights and the input injected.

        Args:
            x: The injected input.
            tolerance: Frobenius distance to the exact z, > 0.
        """
        return _iterate(lambda z: x + self.branch(z), x.detach(), Upper(self.share), _frobenius, tolerance)


def _iterate(
    step: Callable[[Tensor], Tensor],
    start: Float[Tensor, "n d"],
    rate: Upper,
    length: Callable[[Tensor], float],
    tolerance: float,
) -> FixedPoint:
    """Iterate a contraction until ``q / (1 - q) |step| <= tolerance``."""
    q = rate.value
    steps: list[float] = []
    needed, rounding = MOST_ITERATIONS, 0.0
    with torch.no_grad():
        x = start.to(torch.float64)
        for _ in range(MOST_ITERATIONS):
            moved = step(x)
            steps.append(length(moved - x))
            if not math.isfinite(steps[-1]):
                raise InputError("the iteration left float64; the layer overflows at these tokens")
            if len(steps) == 1:
                needed = _powers(q, steps[0] / (1.0 - q), tolerance)
            x = moved
            rounding = STALLED * length(torch.full_like(x, float(x.abs().max())))
            if steps[-1] * q <= tolerance * (1.0 - q) or steps[-1] <= rounding:
                break
    # Each step is a difference of iterates that are rounded.
    ratios = [(after - rounding) / (before + rounding) for before, after in pairwise(steps)]
    error = Upper(round_up(q / (1.0 - q) * steps[-1]))
    return FixedPoint(
        tokens=x,
        iterations=len(steps),
        certified_iterations=max(needed, 1),
        rate=rate,
        measured_rate=Lower(max([0.0, *ratios])),
        error=error,
        steps=tuple(steps),
    )


def _powers(rate: float, start: float, tolerance: float) -> int:
    """Smallest k with ``rate^k start <= tolerance``."""
    if not tolerance > 0:
        raise InputError(f"the tolerance must be > 0; got {tolerance}")
    if start <= tolerance:
        return 0
    if rate <= 0.0:
        return 1
    return math.ceil(math.log(tolerance / start) / math.log(rate))


def _all_rows(like: Tensor) -> ResolvedGoal:
    """The goal that measures whole outputs, to ask for norms."""
    one = torch.ones(1, dtype=torch.float64, device=like.device)
    return ResolvedGoal(weights=None, functionals=None, budgets=one, clean=one)


def _bias_norm(layer: Attention | SigmoidAttention) -> float:
    """Norm of what the layer adds to every output."""
    total = torch.zeros(layer.out_width, dtype=torch.float64, device=layer.w_v.device)
    if isinstance(layer, Attention) and layer.b_v is not None:
        total = total + layer.combine(layer.b_v[:, None, :])[0]
    return float(torch.linalg.vector_norm(total if layer.b_o is None else total + layer.b_o))


def _frobenius(step: Tensor) -> float:
    return float(torch.linalg.vector_norm(step))
