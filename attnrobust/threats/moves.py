"""Threats on moved tokens. Each owns its distance AND its projection; the budget is an argument."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import UnknownNameError
from attnrobust.numerics.projections import shortened
from attnrobust.threats.base import Threat, selection, token_list
from attnrobust.threats.token_subset import checked_tokens

TokenNorm = Literal["l2", "linf", "l1"]
TINY = 1e-300  # keeps 0/0 out of normalisations; far below every meaningful norm


class MoveThreat(Threat):
    """Tokens move: sets ``{D : distance(D) <= epsilon}``, positively homogeneous and star-shaped around 0.

    All methods take perturbations ``D = X' - X`` with any leading batch dimensions, (*b, n, d).
    """

    def digest(self, of_moves: Callable[[str], str]) -> str:
        return of_moves(self.key)

    @abstractmethod
    def distance(self, delta: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """The smallest epsilon whose set holds ``delta``; infinity if none does."""

    @abstractmethod
    def project(self, delta: Float[Tensor, "*b n d"], epsilon: Float[Tensor, "*b"] | float) -> Float[Tensor, "*b n d"]:
        """A nearest point (Frobenius) of the set of size epsilon; points inside are returned unchanged."""

    @abstractmethod
    def steepest(self, gradient: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """A maximiser of ``<gradient, D>`` over ``distance(D) <= 1``; zero where the gradient is zero."""

    @abstractmethod
    def dual_norm(self, gradient: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
        """``sup <gradient, D>`` over ``distance(D) <= 1``."""

    @abstractmethod
    def frobenius_factor(self, n: int, d: int) -> float:
        """``sup ||D||_F / distance(D)``."""

    @abstractmethod
    def token_factor(self, n: int, d: int) -> float:
        """``sup max_i ||D_i||_2 / distance(D)``."""


def _row_norm(delta: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(delta, dim=-1)
    return norm


def _frobenius_norm(delta: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(delta, dim=(-2, -1))
    return norm


def _budget(epsilon: Tensor | float, like: Tensor, trailing: int) -> Tensor:
    eps = torch.as_tensor(epsilon, dtype=like.dtype, device=like.device)
    return eps.reshape(eps.shape + (1,) * trailing)


def _shrink(delta: Tensor, norm: Tensor, eps: Tensor) -> Tensor:
    """Scale ``delta`` to norm eps where its norm is larger, leaving the rest bit for bit."""
    factor = torch.where(norm > eps, eps / norm.clamp_min(TINY), torch.ones_like(norm))
    return delta * factor


def _outside_is_infinite(distance: Tensor, delta: Tensor, chosen: Tensor) -> Tensor:
    moved_outside = (delta[..., ~chosen, :] != 0).any(dim=-1).any(dim=-1)
    return distance.masked_fill(moved_outside, torch.inf)


@dataclass(frozen=True)
class FrobeniusBall(MoveThreat):
    """All chosen tokens share one l2 budget: ``||D||_F <= epsilon``; tokens outside the subset do not move.

    Args:
        tokens: The tokens that may move; None means all. One index gives the threat "this known token".
    """

    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", checked_tokens(self.tokens))

    @property
    def key(self) -> str:
        if self.tokens is None:
            return "frobenius"
        if len(self.tokens) == 1:
            return f"token:{self.tokens[0]}"
        return "tokens:" + token_list(self.tokens)

    def distance(self, delta: Tensor) -> Tensor:
        chosen = selection(self.tokens, delta.shape[-2], delta.device)
        return _outside_is_infinite(_frobenius_norm(delta), delta, chosen)

    def project(self, delta: Tensor, epsilon: Tensor | float) -> Tensor:
        delta = delta * selection(self.tokens, delta.shape[-2], delta.device)[:, None]
        return _shrink(delta, _frobenius_norm(delta)[..., None, None], _budget(epsilon, delta, 2))

    def steepest(self, gradient: Tensor) -> Tensor:
        gradient = gradient * selection(self.tokens, gradient.shape[-2], gradient.device)[:, None]
        return gradient / _frobenius_norm(gradient)[..., None, None].clamp_min(TINY)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        chosen = selection(self.tokens, gradient.shape[-2], gradient.device)
        return _frobenius_norm(gradient * chosen[:, None])

    def movable(self, n: int) -> Tensor:
        return selection(self.tokens, n)

    def frobenius_factor(self, n: int, d: int) -> float:
        return 1.0

    def token_factor(self, n: int, d: int) -> float:
        return 1.0


@dataclass(frozen=True)
class PerTokenBall(MoveThreat):
    """Each chosen token has its own budget: ``max_i ||D_i||_norm <= epsilon``.

    Args:
        norm: Norm of one token's move: "l2", "linf" or "l1".
        tokens: The tokens that may move; None means all.
    """

    norm: TokenNorm = "l2"
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf", "l1"):
            raise UnknownNameError("token norm", str(self.norm), ("l2", "linf", "l1"))
        object.__setattr__(self, "tokens", checked_tokens(self.tokens))

    @property
    def key(self) -> str:
        name = "per-token" if self.norm == "l2" else f"per-token-{self.norm}"
        return name if self.tokens is None else f"{name}:" + token_list(self.tokens)

    def _norms(self, delta: Tensor) -> Tensor:
        order = {"l2": 2.0, "linf": torch.inf, "l1": 1.0}[self.norm]
        norms: Tensor = torch.linalg.vector_norm(delta, ord=order, dim=-1)
        return norms

    def distance(self, delta: Tensor) -> Tensor:
        chosen = selection(self.tokens, delta.shape[-2], delta.device)
        return _outside_is_infinite(self._norms(delta).amax(dim=-1), delta, chosen)

    def project(self, delta: Tensor, epsilon: Tensor | float) -> Tensor:
        delta = delta * selection(self.tokens, delta.shape[-2], delta.device)[:, None]
        eps = _budget(epsilon, delta, 2)
        if self.norm == "l2":
            return _shrink(delta, _row_norm(delta)[..., None], eps)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(delta, -eps), eps)
        return _project_l1(delta, eps)

    def steepest(self, gradient: Tensor) -> Tensor:
        gradient = gradient * selection(self.tokens, gradient.shape[-2], gradient.device)[:, None]
        if self.norm == "l2":
            return gradient / _row_norm(gradient)[..., None].clamp_min(TINY)
        if self.norm == "linf":
            return gradient.sign()
        top = gradient.abs().argmax(dim=-1, keepdim=True)
        return torch.zeros_like(gradient).scatter(-1, top, gradient.gather(-1, top).sign())

    def dual_norm(self, gradient: Tensor) -> Tensor:
        order = {"l2": 2.0, "linf": 1.0, "l1": torch.inf}[self.norm]
        chosen = selection(self.tokens, gradient.shape[-2], gradient.device)
        norms: Tensor = torch.linalg.vector_norm(gradient * chosen[:, None], ord=order, dim=-1)
        return norms.sum(dim=-1)

    def movable(self, n: int) -> Tensor:
        return selection(self.tokens, n)

    def frobenius_factor(self, n: int, d: int) -> float:
        return math.sqrt(float(self.movable(n).sum())) * self.token_factor(n, d)

    def token_factor(self, n: int, d: int) -> float:
        return math.sqrt(d) if self.norm == "linf" else 1.0


@dataclass(frozen=True)
class AnyToken(MoveThreat):
    """One token moves by at most epsilon (l2), and the adversary chooses which.

    Args:
        tokens: The tokens among which the adversary chooses; None means all.
    """

    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", checked_tokens(self.tokens))

    @property
    def key(self) -> str:
        return "any-token" if self.tokens is None else "any-token:" + token_list(self.tokens)

    def distance(self, delta: Tensor) -> Tensor:
        chosen = selection(self.tokens, delta.shape[-2], delta.device)
        norms = _row_norm(delta)
        several = (delta != 0).any(dim=-1).sum(dim=-1) > 1
        return _outside_is_infinite(norms.amax(dim=-1).masked_fill(several, torch.inf), delta, chosen)

    def project(self, delta: Tensor, epsilon: Tensor | float) -> Tensor:
        delta = delta * selection(self.tokens, delta.shape[-2], delta.device)[:, None]
        norms = _row_norm(delta)
        # Keeping row j alone saves norm_j^2 - (norm_j - epsilon)_+^2 of the squared distance, which grows with norm_j.
        keep = torch.nn.functional.one_hot(norms.argmax(dim=-1), delta.shape[-2]).to(delta.dtype)
        delta = delta * keep[..., None]
        return _shrink(delta, _row_norm(delta)[..., None], _budget(epsilon, delta, 2))

    def steepest(self, gradient: Tensor) -> Tensor:
        gradient = gradient * selection(self.tokens, gradient.shape[-2], gradient.device)[:, None]
        norms = _row_norm(gradient)
        keep = torch.nn.functional.one_hot(norms.argmax(dim=-1), gradient.shape[-2]).to(gradient.dtype)
        return gradient * keep[..., None] / norms.amax(dim=-1)[..., None, None].clamp_min(TINY)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        chosen = selection(self.tokens, gradient.shape[-2], gradient.device)
        return _row_norm(gradient * chosen[:, None]).amax(dim=-1)

    def movable(self, n: int) -> Tensor:
        return selection(self.tokens, n)

    def frobenius_factor(self, n: int, d: int) -> float:
        return 1.0

    def token_factor(self, n: int, d: int) -> float:
        return 1.0

    def branches(self, n: int) -> tuple[FrobeniusBall, ...]:
        """The convex pieces: one known token each; the threat's set is their union."""
        return tuple(FrobeniusBall(tokens=(int(i),)) for i in self.movable(n).nonzero().flatten())


def _project_l1(delta: Tensor, eps: Tensor) -> Tensor:
    """Euclidean projection of each row onto the l1 ball."""
    return delta.sign() * shortened(delta.abs(), eps)
