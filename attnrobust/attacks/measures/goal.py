"""Goals read from measures, and how strongly every token's own query reacts."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand import expand_layer, expanded_problem
from attnrobust.attacks.measures.expand_graph import pools
from attnrobust.attacks.search.evaluate import into_ball
from attnrobust.attacks.search.pullback import PreparedAttention, covers
from attnrobust.attacks.verification import Reading, rows_together
from attnrobust.goals import ResolvedGoal
from attnrobust.numerics.transport import wasserstein
from attnrobust.problem import Problem, TokenMap
from attnrobust.threats.measures import MeasureThreat
from attnrobust.tokens import PerturbedTokens, TokenMeasure


class MeasureReader(Reading):
    """The goal of a problem and its ball of measures, read from atoms with given parents and masses at any positions.

    A displacement of all rows is ``sqrt(n) W_2(F(clean), F(atoms))`` by exact transport, its lower side; other goals
    read the atoms' mass-weighted mean, or the first atom of their row.

    Args:
        problem: The question about the clean input.
        mass: Mass of each atom.
        parent: Parent of each atom.
    """

    inside = 1e-9  # a distance by exact transport is an upper bound that rounds with the masses

    def __init__(self, problem: Problem, mass: Float[Tensor, "m"], parent: Int[Tensor, "m"]) -> None:
        self._network, self._resolved, self._given_mass = _read_from_atoms(problem, parent, mass)
        self._mass, self._budget = mass, problem.resolved.violated_at[0] / problem.clean.n**0.5
        whole = problem.resolved.weights is None and not pools(problem.network)
        self._clean = TokenMeasure(problem.clean_output, problem.clean.mass) if whole else None
        self._problem, self._parent = problem, parent
        self.anchors = problem.clean.points[parent]

    @property
    def threat(self) -> MeasureThreat:
        """The ball of measures that the problem asks about."""
        threat = self._problem.threat
        assert isinstance(threat, MeasureThreat)  # noqa: S101 - mass splitting refuses others; narrows the type
        return threat

    def place(self, delta: Float[Tensor, "k m d"]) -> Float[Tensor, "k m d"]:
        return into_ball(self.anchors + delta, self.threat.domain_radius)

    def project(self, delta: Float[Tensor, "k m d"], epsilon: float | None) -> Float[Tensor, "k m d"]:
        return delta  # a projection may change masses and parents; ``nearer`` did it

    def distance(self, delta: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        found = [self.threat.distance(self._problem.clean, self.atoms(self.anchors + move)) for move in delta]
        return torch.tensor(found, dtype=torch.float64).to(delta)

    def atoms(self, points: Float[Tensor, "m d"]) -> PerturbedTokens:
        """The atoms at these places."""
        return PerturbedTokens(points, self._mass, self._parent)

    def usage(self, points: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        return torch.cat([self._usage(part) for part in points.split(rows_together(points))])

    def _usage(self, points: Float[Tensor, "k m d"]) -> Float[Tensor, "k"]:
        mass = None if self._given_mass is None else self._given_mass.expand(points.shape[0], -1)
        output = self._network(points, mass)
        if self._clean is None:
            return self._resolved.usage(output)
        finite = torch.isfinite(output).flatten(1).all(dim=1).tolist()
        moved = [self._distance(rows) if good else math.nan for rows, good in zip(output, finite, strict=True)]
        distances: Tensor = torch.tensor(moved, dtype=torch.float64).to(output)
        shares: Tensor = distances / self._budget
        return shares

    def _distance(self, rows: Tensor) -> float:
        assert self._clean is not None  # noqa: S101 - only called for displacements of all rows; narrows the type
        return wasserstein(self._clean, TokenMeasure(rows, self._mass), order=2).lower.value


def _read_from_atoms(problem: Problem, parent: Tensor, mass: Tensor) -> tuple[TokenMap, ResolvedGoal, Tensor | None]:
    """The network for atoms, the goal, and the masses to hand to the network (None where they are equal)."""
    if pools(problem.network):  # its goal is the clean one, so the expensive rounding of a new one is not asked for
        network = expand_layer(problem.network, parent, problem.clean.n)
        measure = TokenMeasure(problem.clean.points[parent], mass)
        return network, problem.resolved, None if measure.uniform else mass
    expanded = expanded_problem(problem, parent, mass, row_scale=(mass * problem.clean.n).sqrt())
    return expanded.network, expanded.resolved, None if expanded.mass is None else mass


def nearer(problem: Problem, atoms: PerturbedTokens, epsilon: float | None) -> PerturbedTokens:
    """The atoms, put into the ball of measures of a fixed size; members and the minimal-radius mode change nothing."""
    threat = problem.threat
    assert isinstance(threat, MeasureThreat)  # noqa: S101 - mass splitting refuses others; narrows the type
    return atoms if epsilon is None else threat.project(problem.clean, atoms, epsilon)


def query_sensitivity(problem: Problem) -> Float[Tensor, "n"]:
    """Largest singular value of every token's own-query block ``Q_i``, from below (a few power iterations).

    To first order a zero-mean splitting of token i changes the outputs of its children by ``Q_i`` times their moves and
    nothing else; splitting beats moving where ``max_i |Q_i|`` exceeds the norm of the Jacobian at the token masses.
    Layers without this closed form are ranked by the lengths of their tokens.
    """
    layer = problem.network
    if not covers(layer):
        length: Tensor = torch.linalg.vector_norm(problem.clean.points, dim=-1)
        return length
    mass = None if problem.mass is None else problem.mass[None]
    tape = PreparedAttention(layer, problem.clean.n, mass).forward(problem.clean.points[None, None])
    vector = torch.ones_like(problem.clean.points)[None, None]
    size = vector.new_zeros(problem.clean.n)
    for _ in range(8):
        vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-300)
        image = tape.query_pushforward(vector)
        size = torch.linalg.vector_norm(image, dim=-1)[0, 0]
        vector = tape.query_pullback(image)
    return size
