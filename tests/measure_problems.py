"""Random questions about token measures, and random and ascended measures that try to break their certificates."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnrobust.attacks.measures.expand import expand_layer, goal_row
from attnrobust.attacks.measures.goal import MeasureReader
from attnrobust.certify import METHODS, CertificateMethod, PreparedBound, certify
from attnrobust.goals import Displacement, Goal, Margin, Pool
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.base import Threat
from attnrobust.threats.measures import CouplingBall, MeasureThreat, WassersteinBall
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import PerturbedTokens, TokenMeasure
from tests.cases import case_named

ORDERS = (1, 2, math.inf)
KINDS = ("plain", "masses", "biases", "saturated", "equal", "single", "clusters", "heads", "causal", "masked", "large")


class Draw:
    """A stream of Gaussian and uniform numbers."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=self._generator, dtype=torch.float64))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))


def random_problem(seed: int, kind: str, *, goal: str = "whole") -> Problem:
    """A small random layer with an input of the given kind."""
    draw = Draw(seed)
    n = 1 if kind == "single" else draw.integer(2, 6)
    d, heads = draw.integer(1, 3), 3 if kind == "heads" else draw.integer(1, 2)
    strength = 30.0 if kind == "saturated" else 10.0 ** draw.uniform(-1.5, 0.5)
    biases = kind == "biases"
    out = None if draw.uniform(0, 1) < 0.3 else draw.integer(1, 3)
    mask = None
    if kind == "masked":
        mask = draw(n, n).masked_fill((draw(n, n) > 0.5) & ~torch.eye(n, dtype=torch.bool), -math.inf)
    layer = Attention(
        w_q=draw(heads, d, 2, scale=strength**0.5),
        w_k=draw(heads, d, 2, scale=strength**0.5),
        w_v=draw(heads, d, 2),
        b_q=draw(heads, 2) if biases else None,
        b_k=draw(heads, 2) if biases else None,
        b_v=draw(heads, 2) if biases else None,
        w_o=None if out is None else draw(heads, 2, out),
        b_o=draw(out) if biases and out is not None else None,
        mask=mask,
        causal=kind == "causal",
    )
    points = draw(n, d, scale=3.0 if kind == "large" else 1.0)
    if kind == "equal":
        points = points[:1].expand(n, d).clone()
    if kind == "clusters":
        points = points[torch.arange(n) % 2] + draw(n, d, scale=0.01)
    mass = torch.softmax(draw(n, scale=2.0), dim=0) if kind == "masses" or draw.uniform(0, 1) < 0.2 else None
    clean = TokenMeasure(points) if mass is None else TokenMeasure(points, mass)
    return Problem(layer, clean, FrobeniusBall(), _goal(draw, goal, layer.out_width, n))


def _goal(draw: Draw, goal: str, width: int, n: int) -> Goal:
    if goal == "whole":
        return Displacement(0.3)
    pool: Pool = "mean" if goal.endswith("mean") else draw.integer(0, n - 1)
    if goal.startswith("margin"):
        return Margin(draw(3, width), bias=draw(3), pool=pool)
    return Displacement(0.3, pool=pool)


GOALS = ("whole", "mean", "margin-mean", "row", "margin-row")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A question with every certificate that speaks about it."""

    problem: Problem
    bounds: tuple[tuple[CertificateMethod, PreparedBound], ...]

    @classmethod
    def of(cls, problem: Problem, threat: MeasureThreat) -> "Prepared":
        asked = replace(problem, threat=threat)
        methods = [m for m in METHODS if m.refuses(asked) is None]
        return cls(asked, tuple((m, m.prepare(asked, seed=0)) for m in methods))

    def check(self, atoms: PerturbedTokens) -> dict[str, float]:
        """Every bound at the measure's own distance covers its usage; the share of each bound that it reaches."""
        problem, threat = self.problem, self.problem.threat
        assert isinstance(threat, MeasureThreat)
        distance = threat.distance(problem.clean, atoms)
        assert math.isfinite(distance)
        used = float(MeasureReader(problem, atoms.mass, atoms.parent).usage(atoms.points[None])[0])
        # outputs carry 1e-13 of their size, whatever the distance
        floor = 1e-12 * (1.0 + float(problem.clean_output.abs().max())) / float(problem.resolved.budgets.min())
        shares = {}
        for method, bound in self.bounds:
            allowed = bound.usage(max(distance, 1e-300)).value
            assert used <= allowed + floor, (
                f"{method.name} on {threat.key}, {problem.goal.key}: {used} at distance {distance}, allowed {allowed}"
            )
            shares[method.name] = max(used, 0.0) / allowed if allowed > 0 and distance > 1e-9 else 0.0
        return shares


def threats(problem: Problem, *, room: float, goal: str) -> Iterator[MeasureThreat]:
    """Every ball of measures that is defined for the problem."""
    longest = float(torch.linalg.vector_norm(problem.clean.points, dim=-1).max())
    layer = problem.network
    assert isinstance(layer, Attention)
    parents = layer.mask is not None or layer.causal or goal.endswith("row")
    for order in ORDERS:
        if not math.isinf(order) and goal.endswith("row"):
            continue
        yield CouplingBall(order, domain_radius=room * longest)
        if not parents:
            yield WassersteinBall(order, domain_radius=room * longest)


def random_atoms(draw: Draw, clean: TokenMeasure, radius: float, size: float) -> PerturbedTokens:
    """Every token in one to three children of any masses; some move by about ``size``, some anywhere in the ball."""
    parents: list[int] = []
    masses: list[Tensor] = []
    for i in range(clean.n):
        children = draw.integer(1, 3)
        parents += [i] * children
        masses.append(clean.mass[i] * torch.softmax(draw(children, scale=4.0), dim=0))
    parent, mass = torch.tensor(parents), torch.cat(masses)
    m, d = len(parents), clean.width
    points = clean.points[parent] + draw(m, d, scale=size)
    far = draw(m, d, scale=radius)
    points = torch.where(draw(m, 1) > 1.3, far, points)
    length = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    points = points * torch.where(length > radius, radius * (1 - 1e-13) / length, 1.0)
    return PerturbedTokens(points, mass / mass.sum(), parent)


def ascended_atoms(
    draw: Draw, problem: Problem, start: PerturbedTokens, threat: MeasureThreat, *, steps: int = 25
) -> Iterator[PerturbedTokens]:
    """Gradient ascent of the goal's change on positions and masses, pulled back to the start's own coupling cost."""
    clean = problem.clean
    budget = CouplingBall(threat.order, domain_radius=threat.domain_radius)
    size = budget.distance(clean, start)
    if not size > 0:
        return
    share = start.mass / clean.mass[start.parent]
    logits, move = share.log().clone(), start.displacement(clean)
    direction = draw(problem.resolved.clean.numel()).reshape(problem.resolved.clean.shape)
    atoms = start
    for step in range(steps):
        move, logits = move.detach().requires_grad_(), logits.detach().requires_grad_()
        group = torch.zeros(clean.n, dtype=torch.float64).index_add(0, start.parent, logits.exp())
        mass = clean.mass[start.parent] * logits.exp() / group[start.parent]
        objective = _objective(problem, clean.points[start.parent] + move, mass, start.parent, direction)
        cost = mass @ torch.linalg.vector_norm(move, dim=-1).clamp_min(1e-12) ** min(float(threat.order), 2.0)
        gradients = torch.autograd.grad(objective - 1e-3 * cost, (move, logits), allow_unused=True)
        rate = 0.3 * 0.9**step
        slope = gradients[0]
        move = move + rate * size * slope / torch.linalg.vector_norm(slope, dim=-1, keepdim=True).clamp_min(1e-12)
        if gradients[1] is not None:
            logits = logits + rate * gradients[1] / gradients[1].abs().max().clamp_min(1e-12)
        with torch.no_grad():
            group = torch.zeros(clean.n, dtype=torch.float64).index_add(0, start.parent, logits.exp())
            mass = clean.mass[start.parent] * logits.exp() / group[start.parent]
            if not bool((mass > 1e-14).all()):
                return
            moved = PerturbedTokens(clean.points[start.parent] + move, mass / mass.sum(), start.parent)
            atoms = budget.project(clean, moved, size)
            move = atoms.displacement(clean)
        if step % 6 == 5:
            yield atoms
    yield atoms


def _objective(problem: Problem, points: Tensor, mass: Tensor, parent: Tensor, direction: Tensor) -> Tensor:
    """A smooth stand-in of the used budget, whose gradient says where to go."""
    layer = expand_layer(problem.network, parent, problem.clean.n)
    output = layer(points, mass)
    goal = problem.resolved
    if goal.weights is None:
        moved = (output - problem.clean_output[parent]).square().sum(dim=-1)
        return mass @ moved + 1e-6 * (output * direction[parent]).sum()
    row = goal_row(problem)
    pooled = mass @ output if row is None else output[int((parent == row).nonzero()[0, 0])]
    if goal.functionals is None:
        return (pooled - goal.clean).square().sum() + 1e-6 * (pooled * direction).sum()
    return (-((pooled - goal.clean) @ goal.functionals.T) / goal.violated_at).amax()


def one_head(a: list[list[float]], v: list[list[float]]) -> Attention:
    """Scores ``(A x_i) . x_j``, values ``V x_j``."""
    matrix, value = torch.tensor(a).double(), torch.tensor(v).double()
    eye = torch.eye(matrix.shape[0]).double()
    return Attention(w_q=matrix.T.contiguous()[None], w_k=eye[None], w_v=value.T.contiguous()[None], scale=1.0)


def radius_of(problem: Problem, threat: Threat, method: str) -> float:
    return certify(replace(problem, threat=threat), methods=[method]).certificates[0].radius


def ask(threat: Threat, *, name: str = "plain-h2-n3-d4", pool: Pool = "all") -> Problem:
    case = case_named(name)
    return Problem(case.attention, case.tokens, threat, Displacement(0.1, pool=pool))
