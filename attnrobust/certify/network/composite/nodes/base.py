"""What a curved node must give: ranges of its features on the ball, and bounds of its remainder there.

At a node with port e = T D + R (||D|| <= r, metric norm of R at most rho) write
``Rem(e) = f(x + e) - f(x) - f'[e]`` and ``Beyond(D, R) = 1/2 f''[R, R] + Rem(e) - 1/2 f''[e, e]``. Both are written as
sums of channels ``emit(t)`` with a bound of |t|, because a remainder is sharper where it arises (per neuron, before an
output projection) than as a whole output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.network.composite.targets import Port
from attnrobust.layers.graph.node import Edges
from attnrobust.numerics.rounding import FORMULA, nonzero, outward

QUANTILES = (0.5, 0.9, 0.99)


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

    def __init__(self, port: Port) -> None:
        self.port = port
        self.kappa: float | None = None
        """Upper bound of ``sup ||f''[R, .]||_F`` over metric norms 1 in ``curved``; set by the preparation."""
        self.joint: float | None = None
        """Upper bound of the norm of ``form`` over moves of norm 1; set by the preparation."""

    @property
    @abstractmethod
    def channels(self) -> Mapping[str, Channel]:
        """Where the remainder arises."""

    @abstractmethod
    def observe(self, edges: Edges) -> None:
        """Take tangents T_m b of a batch (b, n, d) of orthonormal moves; all batches together are a basis."""

    @abstractmethod
    def settle(self) -> None:
        """Ranges from everything observed."""

    def curved(self) -> Channel | None:
        """The channel in which the node's own second derivative is normed; None: it has a closed bound."""
        return None

    def form(self) -> Form | None:
        """Features whose joint norm sharpens the bounds; None where there are none."""
        return None

    @abstractmethod
    def beyond(self, radius: float, rho: float) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Beyond``."""

    @abstractmethod
    def whole(self, radius: float, rho: float) -> Mapping[str, float]:
        """Per channel a bound of |t| of ``Rem``."""


@dataclass(frozen=True, eq=False)
class Reach:
    """Sizes of the elements (tokens, neurons) of a port on the ball.

    Args:
        tangent: Supremum of |(T D)_k| over moves of norm 1.
        raw: Supremum of |R_k| over remainders of metric norm 1.
        weights: Weights c_k > 0 of the joint forms ``sum_k c_k |e_k|^2``.
        raw_joint: Supremum of that form's root over remainders of metric norm 1; None: the R_k are orthogonal parts.
    """

    tangent: Tensor
    raw: Tensor
    weights: Tensor
    raw_joint: float | None = None

    def sizes(self, radius: float, rho: float) -> Tensor:
        """``E_k >= |e_k|``."""
        return self.tangent * radius + self.raw * rho

    def stacked(self, factor: Tensor, radius: float, rho: float, joint: float | None) -> float:
        """Upper bound of ``(sum_k factor_k^2 |e_k|^2)^{1/2}`` over the ball (lemma 5)."""
        square = factor.square()
        apart = float((square * self.sizes(radius, rho).square()).sum().sqrt())
        raw = float((factor * self.raw).max()) if self.raw_joint is None else self._split(square, self.raw, self.raw_joint)
        together = self._split(square, self.tangent, joint) * radius + raw * rho
        return outward(min(apart, together), FORMULA)

    def _split(self, square: Tensor, size: Tensor, joint: float | None) -> float:
        """Bound of the root of ``sum_k square_k |x_k|^2``, |x_k| <= size_k, the joint form given: any share is sound."""
        own = square * size.square()
        best = float(own.sum())
        if joint is None:
            return best**0.5
        ratio = (square / self.weights).flatten()
        for share in (*(float(torch.quantile(ratio, q)) for q in QUANTILES), float(ratio.max())):
            rest = (square - share * self.weights).clamp_min(0.0) * size.square()
            best = min(best, share * joint**2 + float(rest.sum()))
        return best**0.5


def largest_eigenvalues(gram: Float[Tensor, "*b d d"]) -> Float[Tensor, "*b"]:
    """Upper bounds of the largest eigenvalues of many Gram matrices."""
    values = torch.linalg.eigvalsh(gram)
    size = nonzero(values.abs().amax(-1))
    return outward((values[..., -1] + 1e-13 * gram.shape[-1] * size).clamp_min(0.0), FORMULA)
