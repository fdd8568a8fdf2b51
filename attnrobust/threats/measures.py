"""Perturbed token measures (moved, duplicated, split) and the budgets that measure them."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.numerics.projections import shortened
from attnrobust.numerics.transport import Order, coupling_cost, wasserstein
from attnrobust.tokens import MASS_SUM_TOLERANCE, TokenMeasure, require_finite

CausalOrder = Literal["tied", "strict"]
"""What a copy means under a causal mask: "tied", all copies of a token share its position and see each other;
"strict", a copy is an ordinary token inserted behind its parent, seen by later copies and by what follows."""

KEPT_MASS_ROUNDING = 1e-12
"""Relative rounding of a token's mass where its children's masses are added up."""

DOMAIN_ROUNDING = 1e-12
"""Relative amount by which the norm of an atom on the boundary of the domain may round beyond it."""


@dataclass(frozen=True, eq=False)
class PerturbedTokens:
    """Tokens that came from the tokens of a clean input: ``sum_j mass_j delta_{points_j}``, atom j from ``parent_j``.

    Args:
        points: (m, d).
        mass: Positive, sums to 1, (m,).
        parent: Index of the clean token that each atom came from, (m,); every clean token has at least one atom.

    Raises:
        InputError: Shapes that do not fit, NaN or infinity, masses that are not positive or do not sum to 1.
    """

    points: Float[Tensor, "m d"]
    mass: Float[Tensor, "m"]
    parent: Int[Tensor, "m"]

    def __post_init__(self) -> None:
        measure = TokenMeasure(self.points, self.mass)  # the checks of points and masses
        object.__setattr__(self, "points", measure.points)
        object.__setattr__(self, "mass", measure.mass)
        if tuple(self.parent.shape) != (measure.n,) or self.parent.is_floating_point():
            raise InputError(f"parent must hold one token index per atom; got shape {tuple(self.parent.shape)}")
        if bool((self.parent < 0).any()):
            raise InputError("parent holds a negative token index")

    @property
    def measure(self) -> TokenMeasure:
        """The atoms without their parents."""
        return TokenMeasure(self.points, self.mass)

    def displacement(self, clean: TokenMeasure) -> Float[Tensor, "m d"]:
        """How far each atom is from its parent."""
        return self.points - clean.points[self._parents_of(clean)]

    def keeps_masses(self, clean: TokenMeasure) -> bool:
        """Whether every token's atoms carry exactly its mass (a splitting; a duplication does not)."""
        total = torch.zeros_like(clean.mass).index_add(0, self._parents_of(clean), self.mass)
        # Relative: what a token of tiny mass gains from rounding of the others would not be rounding for it.
        return bool(((total - clean.mass).abs() <= KEPT_MASS_ROUNDING * clean.mass).all())

    def _parents_of(self, clean: TokenMeasure) -> Tensor:
        present = torch.bincount(self.parent, minlength=clean.n)
        if present.shape[0] != clean.n or bool((present == 0).any()):
            raise InputError(f"the parents must cover exactly the {clean.n} clean tokens")
        return self.parent


def identity_perturbation(clean: TokenMeasure) -> PerturbedTokens:
    """The clean input as a perturbation of itself."""
    return PerturbedTokens(clean.points, clean.mass, torch.arange(clean.n, device=clean.points.device))


class MeasureThreat(ABC):
    """A ball of token measures around a clean one, with support in a ball of tokens.

    Args:
        order: p of the distance: 1, 2 or infinity.
        domain_radius: Every atom has at most this norm; None means all of space. For finite p a tiny mass may travel
            any distance on a small budget, so certificates need the bound.
    """

    def __init__(self, order: Order = 2, *, domain_radius: float | None = None) -> None:
        if order not in (1, 2, math.inf):
            raise InputError(f"order {order} is not supported; use 1, 2 or infinity")
        if domain_radius is not None and not (math.isfinite(domain_radius) and domain_radius > 0):
            raise InputError(f"the domain radius must be a positive number; got {domain_radius}")
        self.order: Order = order
        self.domain_radius = None if domain_radius is None else float(domain_radius)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the distance."""

    @property
    def key(self) -> str:
        """Short unique name; ``parse_measure_threat`` reads it back."""
        where = "" if self.domain_radius is None else f":within:{self.domain_radius!r}"
        return f"{self.name}:{_order_name(self.order)}{where}"

    def within(self, domain_radius: float | None) -> "MeasureThreat":
        """The same distance with the support in the ball of this radius."""
        return type(self)(self.order, domain_radius=domain_radius)

    def distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        """Distance of the perturbed measure, an upper bound of W_p within rounding; infinity outside of the family."""
        if self.domain_radius is not None:
            longest = float(torch.linalg.vector_norm(perturbed.points, dim=-1).max())
            if longest > self.domain_radius * (1.0 + DOMAIN_ROUNDING):
                return math.inf
        return self._distance(clean, perturbed)

    def project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """A point of the ball of radius epsilon; members are returned unchanged."""
        if self.distance(clean, perturbed) <= epsilon:
            return perturbed
        return self._project(clean, self._into_domain(perturbed), epsilon)

    @abstractmethod
    def _distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        """Distance without regard to the domain."""

    @abstractmethod
    def _project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """Projection without regard to the domain; straight paths to clean tokens of a convex domain stay in it."""

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
        return f"{type(self).__name__}(order={self.order}{where})"


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
    """All measures with ``W_p(clean, perturbed) <= epsilon``, by exact transport; parents do not matter."""

    @property
    def name(self) -> str:
        return "wasserstein"

    def _distance(self, clean: TokenMeasure, perturbed: PerturbedTokens) -> float:
        return wasserstein(clean, perturbed.measure, order=self.order).upper.value

    def _project(self, clean: TokenMeasure, perturbed: PerturbedTokens, epsilon: float) -> PerturbedTokens:
        """The point at distance epsilon on a shortest path from the clean to the perturbed measure (a nearest one).

        The path follows an optimal plan: the mass that goes from x_i to y_j is an atom at ``x_i + t (y_j - x_i)``, so
        the result may have more atoms, and their parents are those of the plan.
        """
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


def checked_fractions(fractions: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Shares of one token's mass: positive and summing to 1."""
    fractions = require_finite("mass fractions", fractions)
    if not bool((fractions > 0).all()):
        raise InputError("every mass fraction must be > 0; leave out children without mass")
    if abs(float(fractions.sum()) - 1.0) > MASS_SUM_TOLERANCE:
        raise InputError(f"mass fractions must sum to 1, they sum to {float(fractions.sum()):.12g}")
    return fractions


@dataclass(frozen=True)
class Copies:
    """Up to a number of extra copies of tokens, in all; every atom then moves within the problem's own threat.

    A copy adds its token's mass to it: the perturbed measure has ``(1 + r_j) mass_j / sum`` on the atoms of token j,
    ``sum_j r_j <= copies``. Goals of all rows and of one row read the original tokens, the mean is over all atoms.

    Args:
        copies: Most extra copies, >= 1.
        order: Meaning of a causal mask.
    """

    copies: int
    order: CausalOrder = "tied"

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise InputError(f"copies must be >= 1; got {self.copies}")
        if self.order not in ("tied", "strict"):
            raise UnknownNameError("order of copies", str(self.order), ("tied", "strict"))

    @property
    def key(self) -> str:
        """Short unique name."""
        return f"copies:{self.copies} {self.order}"


def question_digest(problem_digest: str, threat: str) -> str:
    """SHA-256 of a question about perturbed measures: a problem about the clean input, and a description of the threat.

    It differs from the problem's own digest, so that no certificate of moved tokens is compared with split or copied
    ones by mistake.
    """
    return hashlib.sha256(f"{problem_digest};{threat}".encode()).hexdigest()


def parse_copies(text: str) -> Copies | None:
    """Read ``copies:R`` or ``copies:R:strict``; None where the text does not begin with ``copies``.

    Raises:
        InputError: A number that is not a positive integer.
        UnknownNameError: Another order.
    """
    name, _, rest = text.partition(":")
    if name != "copies":
        return None
    number, _, order = rest.partition(":")
    if not number.isdecimal():
        raise InputError(f"threat {text!r}: give the largest number of extra copies, as in copies:2")
    if order not in ("", "tied", "strict"):
        raise UnknownNameError("order of copies", order, ("tied", "strict"))
    return Copies(int(number), order="strict" if order == "strict" else "tied")


def parse_measure_threat(text: str) -> MeasureThreat:
    """Read a measure threat from its key: ``coupling:P`` or ``wasserstein:P`` with P one of 1, 2, inf, and optionally
    the bound of the support, ``wasserstein:P:within:R``.

    Raises:
        UnknownNameError: Another name; lists the nearest.
        InputError: A bound that is not a positive number.
    """
    name, _, radius = text.partition(":within:")
    known = {threat.key: threat for threat in all_measure_threats()}
    if name not in known:
        raise UnknownNameError("measure threat", text, known)
    if name == text:
        return known[name]
    try:
        return known[name].within(float(radius))
    except ValueError as error:
        raise InputError(f"threat {text!r}: give the largest norm of a token, as in {name}:within:3.5") from error


def all_measure_threats() -> tuple[MeasureThreat, ...]:
    """Every measure threat."""
    return tuple(kind(order) for kind in (CouplingBall, WassersteinBall) for order in (1, 2, math.inf))


def _order_name(order: Order) -> str:
    return "inf" if math.isinf(order) else str(int(order))


def _shorten(move: Tensor, mass: Tensor, epsilon: float) -> Tensor:
    """Nearest moves (mass-weighted l2) with ``sum mass |move| <= epsilon``: all lengths drop by one amount."""
    length: Tensor = torch.linalg.vector_norm(move, dim=-1)
    shorter = shortened(length, epsilon, mass)
    scaled: Tensor = move * (shorter / length.clamp_min(1e-300))[:, None]
    return scaled
