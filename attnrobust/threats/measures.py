"""Balls of token measures: moved, split and travelling mass, by couplings and by Wasserstein distances."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.numerics.projections import shortened
from attnrobust.numerics.transport import Order, coupling_cost, wasserstein
from attnrobust.threats.base import Threat, selection, token_list
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.threats.token_subset import checked_tokens
from attnrobust.tokens import KEPT_MASS_ROUNDING, PerturbedTokens, TokenMeasure, as_number, as_positive

DOMAIN_ROUNDING = 1e-12
"""Relative amount by which the norm of an atom on the boundary of the domain may round beyond it."""


class MeasureThreat(Threat):
    """A ball of token measures around a clean one, with support in a ball of tokens.

    Args:
        order: p of the distance: 1, 2 or infinity.
        domain_radius: Every atom has at most this norm; None means all of space. For finite p a tiny mass may travel
            any distance on a small budget, so certificates need the bound.
        tokens: The tokens whose mass may move and split; that of the others stays where it is. None means all.
    """

    def __init__(
        self, order: Order = 2, *, domain_radius: float | None = None, tokens: tuple[int, ...] | None = None
    ) -> None:
        if as_number("order", order) not in (1, 2, math.inf):
            raise InputError(f"order {order} is not supported; use 1, 2 or infinity")
        self.order: Order = order
        self.domain_radius = None if domain_radius is None else as_positive("the domain radius", domain_radius)
        self.tokens = checked_tokens(tokens)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the distance."""

    @property
    def key(self) -> str:
        return self._ball + ("" if self.tokens is None else f":tokens:{token_list(self.tokens)}")

    @property
    def _ball(self) -> str:
        """The key without the tokens."""
        where = "" if self.domain_radius is None else f":within:{self.domain_radius!r}"
        return f"{self.name}:{_order_name(self.order)}{where}"

    @property
    def rounding_factor(self) -> float:
        # Under W_1 the change of all rows may grow like the root of the radius: an error of usage counts twice.
        return 2.0

    def movable(self, n: int) -> Bool[Tensor, "n"]:
        return selection(self.tokens, n)

    def digest(self, of_moves: Callable[[str], str]) -> str:
        return hashlib.sha256(f"{of_moves(FrobeniusBall(self.tokens).key)};{self._ball}".encode()).hexdigest()

    def check(self, clean: TokenMeasure) -> None:
        self.movable(clean.n)
        longest = float(torch.linalg.vector_norm(clean.points, dim=-1).max())
        if self.domain_radius is not None and longest > self.domain_radius * (1.0 + DOMAIN_ROUNDING):
            raise InputError(
                f"a clean token has norm {longest:.6g}, outside of the domain radius {self.domain_radius:.6g}; raise it"
            )

    def distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        """Distance of the perturbed measure, an upper bound of W_p within rounding; infinity outside of the family."""
        if self.domain_radius is not None:
            longest = float(torch.linalg.vector_norm(perturbed.points, dim=-1).max())
            if longest > self.domain_radius * (1.0 + DOMAIN_ROUNDING):
                return math.inf
        return self._distance(clean, perturbed) if self._holds_the_others(clean, perturbed) else math.inf

    def project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """A point of the ball of radius epsilon; members are returned unchanged."""
        if self.distance(clean, perturbed) <= epsilon:
            return perturbed
        return self._project(clean, self._into_domain(self._put_back(clean, perturbed)), epsilon)

    @abstractmethod
    def _distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        """Distance without regard to the domain, of atoms whose fixed tokens are at rest."""

    @abstractmethod
    def _project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """Projection without regard to the domain; straight paths to clean tokens of a convex domain stay in it."""

    def _holds_the_others(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> bool:
        """Whether the atoms of tokens outside the subset are where those are (up to what the domain rounds)."""
        if self.tokens is None:
            return True
        moves = perturbed.displacement(clean)  # refuses parents that do not exist
        fixed = ~self.movable(clean.n).to(perturbed.parent.device)[perturbed.parent]
        moved = torch.linalg.vector_norm(moves[fixed], dim=-1)
        rounding = 0.0 if self.domain_radius is None else DOMAIN_ROUNDING * self.domain_radius
        return bool((moved <= rounding).all())

    def _put_back(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> PerturbedTokens:
        if self.tokens is None:
            return perturbed
        moves = (
            perturbed.displacement(clean) * self.movable(clean.n).to(perturbed.parent.device)[perturbed.parent, None]
        )
        return PerturbedTokens(clean.points[perturbed.parent] + moves, perturbed.mass, perturbed.parent)

    def _into_domain(self, perturbed: PerturbedTokens) -> PerturbedTokens:
        if self.domain_radius is None:
            return perturbed
        length = torch.linalg.vector_norm(perturbed.points, dim=-1, keepdim=True)
        factor = torch.where(length > self.domain_radius, self.domain_radius / length.clamp_min(1e-300), 1.0)
        return PerturbedTokens(perturbed.points * factor, perturbed.mass, perturbed.parent)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.key == getattr(other, "key", None)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        where = "" if self.domain_radius is None else f", domain_radius={self.domain_radius!r}"
        which = "" if self.tokens is None else f", tokens={self.tokens!r}"
        return f"{type(self).__name__}(order={self.order}{where}{which})"


class CouplingBall(MeasureThreat):
    """Every atom stays near its own parent: ``(sum_j mass_j |y_j - x_parent(j)|^p)^(1/p) <= epsilon``, masses kept.

    For p = infinity every atom is within epsilon of its parent. The cost of the given coupling is an upper bound of
    W_p, so this set lies inside the Wasserstein ball.
    """

    @property
    def name(self) -> str:
        return "coupling"

    def _distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        if not perturbed.keeps_masses(clean):
            return math.inf
        return float(coupling_cost(perturbed.displacement(clean), perturbed.mass, order=self.order))

    def _project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """A nearest point among those with the same masses: all atoms are pulled back in proportion (p = 1, 2), or each
        one onto its own ball (p = infinity).

        Raises:
            InputError: The masses are not those of the clean tokens.
        """
        require_masses(clean, perturbed)
        distance = self._distance(clean, perturbed)
        if distance <= epsilon:
            return perturbed
        move = perturbed.displacement(clean)
        if math.isinf(self.order):
            length = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
            move = move * torch.where(length > epsilon, epsilon / length.clamp_min(1e-300), 1.0)
        elif self.order == 1:
            move = _shorten(move, perturbed.mass, epsilon)
        else:
            move = move * (epsilon / distance)
        return PerturbedTokens(clean.points[perturbed.parent] + move, perturbed.mass, perturbed.parent)


class WassersteinBall(MeasureThreat):
    """All measures with ``W_p(clean, perturbed) <= epsilon``, by exact transport; parents do not matter.

    With ``tokens`` the mass of the other tokens stays, and the transport is that of the rest,
    ``(sum of its masses)^(1/p) W_p`` of the rest normalised: never below W_p of the whole.
    """

    @property
    def name(self) -> str:
        return "wasserstein"

    def _distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        if self.tokens is None:
            return wasserstein(clean, perturbed.measure, order=self.order).upper.value
        kept = torch.zeros_like(clean.mass).index_add(0, perturbed.parent, perturbed.mass)
        fixed = ~self.movable(clean.n).to(kept.device)
        if bool(((kept - clean.mass).abs() > KEPT_MASS_ROUNDING * clean.mass)[fixed].any()):
            return math.inf
        rest, atoms, total = self._rest(clean, perturbed)
        return wasserstein(rest, atoms.measure, order=self.order).upper.value * self._weight(total)

    def _project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """The point at distance epsilon on a shortest path from the clean to the perturbed measure (a nearest one).

        The path follows an optimal plan: the mass that goes from x_i to y_j is an atom at ``x_i + t (y_j - x_i)``, so
        the result may have more atoms, and their parents are those of the plan.
        """
        if self.tokens is None:
            return self._along_plan(clean, perturbed, epsilon)
        rest, atoms, total = self._rest(clean, perturbed)
        nearer = self._along_plan(rest, atoms, epsilon / self._weight(total))
        chosen = self.movable(clean.n).to(clean.points.device)
        index = torch.arange(clean.n, device=chosen.device)
        return PerturbedTokens(
            torch.cat([clean.points[~chosen], nearer.points]),
            torch.cat([clean.mass[~chosen], nearer.mass * total]),
            torch.cat([index[~chosen], index[chosen][nearer.parent]]),
        )

    def _rest(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> tuple[TokenMeasure, PerturbedTokens, float]:
        """The movable tokens and their atoms as measures of mass 1, and the mass that they have."""
        chosen = self.movable(clean.n).to(clean.points.device)
        place = chosen.cumsum(0) - 1
        theirs = chosen[perturbed.parent]
        total, mass = clean.mass[chosen].sum(), perturbed.mass[theirs]
        rest = TokenMeasure(clean.points[chosen], clean.mass[chosen] / total)
        atoms = PerturbedTokens(perturbed.points[theirs], mass / mass.sum(), place[perturbed.parent[theirs]])
        return rest, atoms, float(total)

    def _weight(self, total: float) -> float:
        return 1.0 if math.isinf(self.order) else total ** (1.0 / self.order)

    def _along_plan(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        transport = wasserstein(clean, perturbed.measure, order=self.order)
        distance = transport.upper.value
        if distance <= epsilon:
            return perturbed
        plan = transport.plan.to(clean.points)
        plan = plan * (clean.mass / plan.sum(dim=1).clamp_min(1e-300))[:, None]  # row sums exact to the last place
        source, sink = (plan > 1e-15 * clean.mass.min()).nonzero(as_tuple=True)
        mass = plan[source, sink]
        start, end = clean.points[source], perturbed.points[sink]
        return PerturbedTokens(start + (epsilon / distance) * (end - start), mass / mass.sum(), source)


def require_masses(clean: TokenMeasure, perturbed: PerturbedTokens) -> None:
    """Refuse perturbations whose atoms do not carry the masses of their parents."""
    if not perturbed.keeps_masses(clean):
        raise InputError("the atoms of a token must carry exactly its mass; a duplication is not a splitting")


def _order_name(order: Order) -> str:
    return "inf" if math.isinf(order) else str(int(order))


def _shorten(move: Tensor, mass: Tensor, epsilon: float) -> Tensor:
    """Nearest moves (mass-weighted l2) with ``sum mass |move| <= epsilon``: all lengths drop by one amount."""
    length: Tensor = torch.linalg.vector_norm(move, dim=-1)
    shorter = shortened(length, epsilon, mass)
    scaled: Tensor = move * (shorter / length.clamp_min(1e-300))[:, None]
    return scaled
