"""Batched value and closed-form gradient of the used budget for several problems on one layer."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attnrobust.attacks.search.graph_input import GraphInput
from attnrobust.attacks.search.memory import bytes_of_a_row
from attnrobust.attacks.search.pullback import AttentionTape, PreparedAttention, covers
from attnrobust.attacks.search.row_pullback import PreparedRows, RowTape, asked_rows
from attnrobust.attacks.search.stacked_goal import ScaledGoal, StackedGoal
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat

TINY = 1e-300
REACHED = 1e-12
"""A share within this distance of 1 uses the whole budget; ends of a bracket count as inside it by as much."""
WORKING_COPIES = 5
"""Score-sized arrays alive at once in one value-and-gradient call (scores, weights, two gradients, one temporary)."""


class OutOfQueries(Exception):  # noqa: N818 - no error of the user's: the phase that meets it ends
    """An evaluation beyond ``Evaluator.limit`` was asked for, and not made."""


class Evaluator:
    """p problems with one layer, token count, threat and goal shape; evaluates perturbations (p, r, n, d).

    Every matrix product is done per problem with a shape that does not depend on p. Chunks are cut along the restarts r
    by a rule that does not depend on p either, and then between problems: a problem's numbers do not change with its
    companions.

    Args:
        problems: Problems of one group (``group_key``).
        memory_bytes: Bytes that the arrays of one call may take.
        scale: Token moves are the search's variables times these factors (p, n); None means 1.
        domain_radius: Moved tokens are put back into the ball of this radius (nearest point); None means all of space.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        memory_bytes: int,
        scale: Float[Tensor, "p n"] | None = None,
        domain_radius: float | None = None,
    ) -> None:
        self.problems = tuple(problems)
        self.index = torch.arange(len(problems))
        self.queries = torch.zeros(len(problems), dtype=torch.int64)
        """Forward evaluations of each of the ORIGINAL problems; shared with the evaluators that ``take`` makes."""
        self.limit: int | None = None
        """Most evaluations of each problem; one more raises ``OutOfQueries``. None means no limit."""
        self.memory_bytes = memory_bytes
        self.network = problems[0].network
        self.points = torch.stack([p.clean.points for p in problems])
        equal = all(p.mass is None for p in problems)
        self.mass = None if equal else torch.stack([p.clean.mass for p in problems])
        asked = asked_rows(problems[0])  # the same for all of a group
        self.at = None if asked is None else torch.tensor(asked, device=self.points.device)
        """The rows of the output that are evaluated; None means all."""
        self.goal = StackedGoal.stack([p.resolved for p in problems]).of_rows(self.at)
        self.scale, self.domain_radius = scale, domain_radius
        self._row_bytes: int | None = None
        self._graphs: list[GraphInput] | None = None
        self._cut: dict[int, list[Evaluator]] = {}

    @property
    def device(self) -> torch.device:
        """Where the tokens live."""
        return self.points.device

    @cached_property
    def prepared(self) -> PreparedAttention | PreparedRows | None:
        """Fused weights of an attention layer that they cover; None for any other network (then autograd is used)."""
        if not covers(self.network):
            return None
        if self.at is not None:
            return PreparedRows(self.network, self.points.shape[-2], self.at)
        return PreparedAttention(self.network, self.points.shape[-2], self.mass)

    def take(self, index: Int[Tensor, "q"]) -> "Evaluator":
        """The evaluator of some of the problems; it counts into the same record."""
        scale = None if self.scale is None else self.scale[index]
        problems = [self.problems[i] for i in index.tolist()]
        chosen = Evaluator(problems, memory_bytes=self.memory_bytes, scale=scale, domain_radius=self.domain_radius)
        chosen.index, chosen.queries, chosen.limit = self.index[index.cpu()], self.queries, self.limit
        chosen._row_bytes, graphs = self._row_bytes, self._graphs
        chosen._graphs = None if graphs is None else [graphs[i] for i in index.tolist()]
        return chosen

    @property
    def graphs(self) -> list[GraphInput]:
        """Each problem on a whole network, prepared for the search; one evaluation each."""
        if self._graphs is None:
            assert isinstance(self.network, NetworkGraph)  # noqa: S101 - asked before; narrows the type
            self._count(1)
            self._graphs = [
                GraphInput(self.network, p.clean.points, p.mass, self.goal.take(torch.tensor([i], device=self.device)))
                for i, p in enumerate(self.problems)
            ]
        return self._graphs

    @property
    def resolution(self) -> Float[Tensor, "p 1"]:
        """What the search takes for a used share of exactly 1: the rounding of each problem's evaluation."""
        whole = isinstance(self.network, NetworkGraph)
        found = [graph.resolution for graph in self.graphs] if whole else [REACHED] * len(self.problems)
        return self.points.new_tensor(found)[:, None]

    @property
    def spent(self) -> Int[Tensor, "p"]:
        """Queries of each problem so far; a whole network's preparation is among them before it is made."""
        waiting = isinstance(self.network, NetworkGraph) and self._graphs is None
        return self.queries[self.index] + int(waiting)

    def _count(self, rows: int) -> None:
        if self.limit is not None and int(self.queries[self.index].max()) + rows > self.limit:
            raise OutOfQueries
        self.queries[self.index] += rows

    @property
    def movable(self) -> Bool[Tensor, "p n"]:
        """Which tokens of each problem may move."""
        n = self.points.shape[-2]
        return torch.stack([p.threat.movable(n) for p in self.problems]).to(self.device)

    def moves(self, variables: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r n d"]:
        """Token moves of search variables; the factor is its own adjoint."""
        return variables if self.scale is None else variables * self.scale[:, None, :, None]

    def place(self, variables: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r n d"]:
        """Where the tokens are: moved, and put back into the domain."""
        return into_ball(self.points[:, None] + self.moves(variables), self.domain_radius)

    def _pull(self, variables: Tensor, gradient: Tensor) -> Tensor:
        """Adjoint of the derivative of ``place``: outside of the ball it shrinks, and only tangential parts pass."""
        if self.domain_radius is not None:
            free = self.points[:, None] + self.moves(variables)
            length = torch.linalg.vector_norm(free, dim=-1, keepdim=True)
            normal = free / length.clamp_min(TINY)
            tangential = gradient - (gradient * normal).sum(dim=-1, keepdim=True) * normal
            outside = length > self.domain_radius
            gradient = torch.where(outside, tangential * (self.domain_radius / length.clamp_min(TINY)), gradient)
        return self.moves(gradient)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def shares(self, delta: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r c"]:
        """Used share of every budget at moved tokens."""
        found = []
        for part, d in self._parts(delta):
            pieces = d.split(self.rows_at_once, dim=1)
            found.append(torch.cat([part._shares(x) for x in pieces], dim=1))  # noqa: SLF001 - own class
        return torch.cat(found)

    def usage(self, delta: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r"]:
        """Largest used share; a violation where it is >= 1."""
        return self.shares(delta).amax(dim=-1)

    def shares_and_gradient(
        self, delta: Float[Tensor, "p r n d"], target: Int[Tensor, "p r"]
    ) -> tuple[Float[Tensor, "p r c"], Float[Tensor, "p r n d"]]:
        """Shares, and the gradient of the share ``target`` with respect to the tokens."""
        shares, gradients, rows = [], [], self.rows_at_once
        for (part, d), (_, t) in zip(self._parts(delta), self._parts(target), strict=True):
            pieces = zip(d.split(rows, dim=1), t.split(rows, dim=1), strict=True)
            found = [part._shares_and_gradient(x, y) for x, y in pieces]  # noqa: SLF001 - own class
            shares.append(torch.cat([f[0] for f in found], dim=1))
            gradients.append(torch.cat([f[1] for f in found], dim=1))
        return torch.cat(shares), torch.cat(gradients)

    def _parts(self, rows: Shaped[Tensor, "p r ..."]) -> list[tuple["Evaluator", Tensor]]:
        """The problems cut into groups whose score-sized arrays fit into the memory together, with their rows."""
        count = len(self.problems)
        size = max(1, int(self.memory_bytes // (self.bytes_of_a_row * min(self.rows_at_once, max(1, rows.shape[1])))))
        if size >= count:
            return [(self, rows)]
        if size not in self._cut:
            self._cut[size] = [self.take(index) for index in torch.arange(count, device=self.device).split(size)]
        return list(zip(self._cut[size], rows.split(size), strict=True))

    def _shares(self, delta: Tensor) -> Tensor:
        self._count(delta.shape[1])
        x = self.place(delta)
        if self.prepared is not None:
            return self.goal.shares(self.prepared.forward(x).output)
        return self.goal.shares(torch.stack([self.output(i, x[i]) for i in range(x.shape[0])]))

    def _shares_and_gradient(self, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self._count(delta.shape[1])
        x = self.place(delta)
        if self.prepared is not None:
            tape = self.prepared.forward(x)
            shares, cotangent = self.goal.shares_and_cotangent(tape.output, target)
            return shares, self._pull(delta, tape.pullback(cotangent))
        x.requires_grad_(True)
        with torch.enable_grad():
            output = torch.stack([self.output(i, x[i]) for i in range(x.shape[0])])
        shares, cotangent = self.goal.shares_and_cotangent(output.detach(), target)
        (gradient,) = torch.autograd.grad(output, x, cotangent)
        return shares, self._pull(delta, gradient)

    def output(self, index: int, x: Float[Tensor, "r n d"]) -> Tensor:
        """The network's output for one problem at placed tokens, as the search sees it; differentiable."""
        if isinstance(self.network, NetworkGraph):
            return self.graphs[index].value(x)
        mass = None if self.mass is None else self.mass[index].expand(x.shape[0], -1)
        return self.network(x, mass)

    # ---- linearisation at the clean inputs -------------------------------------------------------------------------

    def normal_product(self, vectors: Float[Tensor, "p r n d"]) -> Float[Tensor, "p r n d"]:
        """``J^T J v`` for the pooled Jacobian at the clean inputs, in units of the (first) budget."""
        found = []
        for part, moved in self._parts(self.moves(vectors)):
            pieces = moved.split(self.rows_at_once, dim=1)
            found.append(torch.cat([part._normal_product(v) for v in pieces], dim=1))  # noqa: SLF001 - own class
        return self.moves(torch.cat(found))

    def _normal_product(self, vectors: Tensor) -> Tensor:
        self._count(vectors.shape[1])
        scale = (self.goal.budgets[:, :1] ** 2)[..., None, None]
        if self.prepared is not None:
            tape = self._clean_tape
            image = self.goal.pool(tape.pushforward(vectors))
            return tape.pullback(self.goal.unpool(image)) / scale
        return torch.stack([self._plain_normal_product(i, v) for i, v in enumerate(vectors)]) / scale

    @cached_property
    def _clean_tape(self) -> AttentionTape | RowTape:
        assert self.prepared is not None  # noqa: S101 - only called for attention layers; narrows the type
        return self.prepared.forward(self.points[:, None])

    def _plain_normal_product(self, index: int, vectors: Tensor) -> Tensor:
        if isinstance(self.network, NetworkGraph):
            return self.graphs[index].normal_product(vectors)
        x = self.points[index].expand_as(vectors).clone().requires_grad_(True)
        goal = self.goal.take(torch.tensor([index], device=x.device))
        with torch.enable_grad():
            image = goal.pool(self.output(index, x)[None])[0]
            dual = torch.zeros_like(image, requires_grad=True)
            (pulled,) = torch.autograd.grad(image, x, dual, create_graph=True)
            # The pullback is linear in its cotangent: differentiating it along v gives J v.
            (pushed,) = torch.autograd.grad(pulled, dual, vectors, retain_graph=True)
            (product,) = torch.autograd.grad(image, x, pushed)
        return product

    @property
    def bytes_of_a_row(self) -> int:
        """Bytes that one evaluation with its gradient needs at once, for one row of one problem."""
        n = self.points.shape[-2]
        if isinstance(self.network, Attention):
            width = self.points.shape[-1] + self.network.out_width
            if self.at is not None:
                return int(8 * WORKING_COPIES * n * (self.network.heads * len(self.at) + width))
            return int(8 * WORKING_COPIES * n * (self.network.heads * n + width))
        if self._row_bytes is None:
            self._row_bytes = bytes_of_a_row(lambda x: self.output(0, x), self.points[0])
        return self._row_bytes

    @property
    def rows_at_once(self) -> int:
        """Restarts of one problem that are evaluated together, whatever its companions."""
        return max(1, int(self.memory_bytes // self.bytes_of_a_row))


def group_key(problem: Problem) -> tuple[object, ...]:
    """Problems with equal keys can be attacked together; token subsets of a Frobenius ball may differ."""
    goal = problem.resolved
    return (
        problem.network.digest,
        problem.clean.n,
        search_threat(problem.threat) if isinstance(problem.threat, MoveThreat) else problem.threat,
        problem.mass is None,
        goal.weights is None,
        asked_rows(problem),
        goal.functionals is None,
        isinstance(goal, ScaledGoal),
        goal.budgets.shape[0],
    )


def search_threat(threat: MoveThreat) -> MoveThreat:
    """The threat whose geometry the search uses; its rows are masked by the tokens that may move."""
    return FrobeniusBall() if isinstance(threat, FrobeniusBall) else threat


def into_ball(points: Float[Tensor, "*b d"], radius: float | None) -> Float[Tensor, "*b d"]:
    """Nearest points of the ball of this radius around 0; points inside are unchanged."""
    if radius is None:
        return points
    length = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points * torch.where(length > radius, radius / length.clamp_min(TINY), 1.0)
