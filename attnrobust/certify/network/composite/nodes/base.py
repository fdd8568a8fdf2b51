"""What a curved node must give: ranges of its features on the ball, and bounds of its remainders there.

At a node with port e = T D + R, ||D|| <= r, and R = R2 + R' with the exact second order R2 of the network, write
``Rem(e) = f(x + e) - f(x) - f'[e]``, ``C3(e) = 1/6 f'''[e, e, e]``,
``Beyond = 1/2 f''[R, R] + Rem(e) - 1/2 f''[e, e]`` and ``Further = Beyond - C3(T D)``. What R adds to the remainder of
the first-order move is ``Lift = Rem(T D + R) - Rem(T D)`` and ``Drift = Lift - f''[T D, R]``. They are sums of channels
``emit(t)`` with a bound of |t|, because a remainder is sharper where it arises (per neuron, before an output
projection) than as a whole output.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph.node import Edges
from attnrobust.numerics.rounding import FORMULA, nonzero, outward

QUANTILES = (0.5, 0.8, 0.9, 0.97, 0.99, 0.998)


@dataclass(frozen=True)
class Ball:
    """What is known of D and R.

    Args:
        radius: ``||D||_F`` at most.
        rho: Metric norm of R at most.
        rest: Metric norm of R' = R - R2 at most.
        own: Norm of R in the node's own metric at most, see ``NodeRemainder.own_metric``.
        own_rest: The same of R'.
        own_second: The same of R2.
    """

    radius: float
    rho: float
    rest: float
    own: float = math.inf
    own_rest: float = math.inf
    own_second: float = math.inf

    @property
    def still(self) -> "Ball":
        """The same moves without R."""
        return Ball(self.radius, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Channel:
    """A linear map from where a remainder arises to the node's output.

    Args:
        emit: t -> output; batched.
        absorb: Its transpose.
        shape: Shape of t.
    """

    emit: Callable[[Tensor], Tensor]
    absorb: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """Weighted features of a direction: their stacked norm over the ball is one number of the preparation.

    Args:
        forward: Edges -> (*b, K).
        backward: The transpose.
    """

    forward: Callable[[Edges], Tensor]
    backward: Callable[[Tensor], Edges]


class NodeRemainder(ABC):
    """Ranges and remainders of one node; ``observe`` collects, after ``settle`` it is only read.

    Args:
        port: What the node reads.
    """

    counts_maps: ClassVar[bool] = False
    """Whether its ranges count the maps from the port's roots to its edges."""

    def __init__(self, port: Port) -> None:
        if not self.counts_maps and any(matrix is not None for matrix in port.maps):
            raise ValueError(
                f"{type(self).__name__} bounds what its own edges move; its port has a map in front of them"
            )
        self.port = port
        self.kappa: float | None = None
        """Upper bound of ``sup ||f''[R, .]||_F`` over metric norms 1 in ``curved``; set by the preparation."""
        self.joints: dict[str, float] = {}
        """Upper bounds of the norms of ``forms`` over moves of norm 1; set by the preparation."""

    @property
    @abstractmethod
    def channels(self) -> Mapping[str, Channel]:
        """Where the remainder arises."""

    @property
    @abstractmethod
    def features(self) -> int:
        """How many features ``observe_second`` bounds: each may fail by itself."""

    @abstractmethod
    def observe(self, edges: Edges) -> None:
        """Take tangents T_m b of a batch (b, n, d) of orthonormal moves; all batches together are a basis."""

    @abstractmethod
    def observe_second(self, edges: Edges) -> None:
        """Take second derivatives ``D2[a, b]`` at the edges for a batch of pairs; their squares add up to a bound."""

    @abstractmethod
    def settle(self) -> None:
        """Ranges from everything observed."""

    def curved(self) -> Channel | None:
        """The channel in which the node's own second derivative is normed; None: it has a closed bound."""
        return None

    def own_metric(self) -> Edges | None:
        """Positive factors of the entries of its edges in which it is about equally sensitive; None: it knows none."""
        return None

    @property
    def forms(self) -> Mapping[str, Form]:
        """Features whose joint norms sharpen the bounds."""
        return {}

    @abstractmethod
    def whole(self, ball: Ball) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Rem``."""

    @abstractmethod
    def beyond(self, ball: Ball) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Beyond``."""

    @abstractmethod
    def further(self, ball: Ball) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Further``."""

    @abstractmethod
    def quadratic(self, ball: Ball) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``1/2 f''[R, R]``."""

    def lift(self, ball: Ball) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Lift``, one power of R; inf where a node has none."""
        return dict.fromkeys(self.channels, 0.0 if ball.rho == 0.0 else math.inf)

    def drift(self, ball: Ball) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Drift``."""
        return self.lift(ball) if ball.rho == 0.0 else dict.fromkeys(self.channels, math.inf)

    @abstractmethod
    def third_readout(self, cotangent: Tensor, ball: Ball) -> float:
        """Bound of ``|<c, Rem(e) - 1/2 f''[e, e]>|`` for one cotangent c of the node's output."""


@dataclass(frozen=True, eq=False)
class Reach:
    """Sizes of the elements (tokens, neurons) of a port on the ball.

    Args:
        tangent: Supremum of |(T D)_k| over moves of norm 1.
        bend: Supremum of |(R2)_k| over moves of norm 1.
        raw: Supremum of |R_k| over remainders of metric norm 1.
        weights: Weights c_k > 0 of the joint forms ``sum_k c_k |e_k|^2``.
        joint: Supremum of that form's root over moves of norm 1, or None.
        raw_joint: The same over remainders of metric norm 1; None: the R_k are orthogonal parts.
        raw_form: The same for any weights, where it can be had; it takes the place of ``raw_joint``.
        unit: Factors u_k of the node's own metric, ``sum_k u_k^2 |R_k|^2 <= own^2``.
    """

    tangent: Tensor
    bend: Tensor
    raw: Tensor
    weights: Tensor
    joint: float | None = None
    raw_joint: float | None = None
    raw_form: Callable[[Tensor], float] | None = None
    unit: Tensor | None = None

    def first(self, ball: Ball) -> Tensor:
        """``|(T D)_k|`` at most."""
        return self.tangent * ball.radius

    def rest(self, ball: Ball) -> Tensor:
        """``|R_k|`` at most."""
        size = remainder_size(self.bend, self.raw, ball)
        if self.unit is None:
            return size
        own = torch.minimum(ball.own / self.unit, self.bent(ball) + ball.own_rest / self.unit)
        return torch.minimum(size, own)

    def sizes(self, ball: Ball) -> Tensor:
        """``E_k >= |e_k|``."""
        return self.first(ball) + self.rest(ball)

    def stacked(self, factor: Tensor, ball: Ball) -> float:
        """Upper bound of ``(sum_k factor_k^2 |e_k|^2)^{1/2}`` over the ball (lemma 5)."""
        square = factor.square()
        apart = float((square * self.sizes(ball).square()).sum().sqrt())
        together = self._split(square, self.tangent, self.joint) * ball.radius + self.stacked_rest(factor, ball)
        return outward(min(apart, together), FORMULA)

    def stacked_rest(self, factor: Tensor, ball: Ball) -> float:
        """The same of R alone."""
        if ball.rho == 0.0:
            return 0.0
        square, whole = factor.square(), self.raw_norm(factor)
        bent = float((square * self.bend.square()).sum().sqrt()) * ball.radius**2
        apart = float((square * self.rest(ball).square()).sum().sqrt())
        found = min(apart, whole * ball.rho, bent + whole * ball.rest)
        if self.unit is not None:
            found = min(found, self._owned(square, self.rest(ball), ball.own))
            beside = torch.minimum(self.raw * ball.rest, ball.own_rest / self.unit)
            second = min(bent, self._owned(square, self.bent(ball), ball.own_second))
            found = min(found, second + self._owned(square, beside, ball.own_rest))
        return outward(found, FORMULA)

    def bent(self, ball: Ball) -> Tensor:
        """``|(R2)_k|`` at most."""
        return self.bend * ball.radius**2

    def raw_norm(self, factor: Tensor) -> float:
        """Upper bound of ``(sum_k factor_k^2 |R_k|^2)^{1/2}`` over remainders of metric norm 1."""
        if self.raw_form is not None:
            return self.raw_form(factor.square())
        if self.raw_joint is None:
            return float((factor * self.raw).max())
        return self._split(factor.square(), self.raw, self.raw_joint)

    def _owned(self, square: Tensor, size: Tensor, own: float) -> float:
        """The same from the node's own metric."""
        assert self.unit is not None  # noqa: S101 - the caller's choice; narrows the type
        return _split(square, size, self.unit.square(), own) if math.isfinite(own) else math.inf

    def _split(self, square: Tensor, size: Tensor, joint: float | None) -> float:
        """Bound of the root of ``sum_k square_k |x_k|^2``, |x_k| <= size_k, from the joint form."""
        if joint is None:
            return math.sqrt(float((square * size.square()).sum()))
        return _split(square, size, self.weights, joint)


def _split(square: Tensor, size: Tensor, weights: Tensor, joint: float) -> float:
    """Root of ``sum_k square_k |x_k|^2`` at most, from ``sum_k weights_k |x_k|^2 <= joint^2``: any share is sound."""
    best = float((square * size.square()).sum())
    ratio = (square / weights).flatten()
    for share in (*(float(torch.quantile(ratio, q)) for q in QUANTILES), float(ratio.max())):
        rest = (square - share * weights).clamp_min(0.0) * size.square()
        best = min(best, share * joint**2 + float(rest.sum()))
    return math.sqrt(best)


def remainder_size(bend: Tensor, raw: Tensor, ball: Ball) -> Tensor:
    """A feature of R: by its second order and the raw size of what is left, or by the raw size of everything."""
    return torch.minimum(raw * ball.rho, bend * ball.radius**2 + raw * ball.rest)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """``int_0^1 (a + s b)^2 ds``."""
    return a.square() + a * b + b.square() / 3.0


def largest_eigenvalues(gram: Float[Tensor, "*b d d"]) -> Float[Tensor, "*b"]:
    """Upper bounds of the largest eigenvalues of many Gram matrices."""
    values = torch.linalg.eigvalsh(gram)
    size = nonzero(values.abs().amax(-1))
    largest: Tensor = outward((values[..., -1] + 1e-13 * gram.shape[-1] * size).clamp_min(0.0), FORMULA)
    return largest
