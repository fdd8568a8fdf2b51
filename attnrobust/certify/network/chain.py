"""Whole networks with an exact first order: clean derivatives carry every node's remainder to the output."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.method import CertificateMethod, PreparedBound
from attnrobust.certify.network.clean_tails import Tail, Tails, curved_before, targets
from attnrobust.certify.network.node_bounds.registry import NODE_FEATURES
from attnrobust.certify.network.node_bounds.state_move import StateMove
from attnrobust.certify.network.passes import FLOPS_PER_SECOND, pass_flops
from attnrobust.certify.network.propagation import Network, goal_changes, threat_move
from attnrobust.certify.radius import LARGEST
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.numerics.chance import SIDE_FAILURE, Chance, stream
from attnrobust.numerics.rounding import FORMULA, outward, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem

EVENTS = 128  # eigenvalue bounds that a radius is likely to need
REFERENCE_SHARE = 0.03  # of the radius of the first order alone, at which the sizes of remainders are compared
LONGEST = 60.0  # estimated seconds beyond which it runs only where it is named
PASSES = 60.0  # through the whole network for each pair of curved nodes: products of the tails' norms, all refinements
COTANGENT_NUMBERS = 2**24  # of the cotangents that are kept; classes beyond are bounded by the output's move


class NetworkChain(CertificateMethod):
    """``e_out = J D + sum_m X_m Rem_m(e_m)``: exact first order; remainders of nodes carried by exact clean tails.

    Every state before a curved node has the same expansion, so no norm is a product of norms of nodes. A margin drops
    by at most ``<grad, D> + sum_m |<c_m, Rem_m>|`` with the clean cotangents c_m. Never below ``network-product``.

    References:
        Derived; docs/network-certificates.md, theorem 2.
    """

    name: ClassVar[str] = "network-chain"
    reference: ClassVar[str] = "derived; docs/network-certificates.md, theorem 2"
    region: ClassVar[str] = "every move of the movable tokens with threat distance at most the radius"
    relative_tolerance: ClassVar[float] = 1e-2
    layers = (NetworkGraph,)
    features = NODE_FEATURES

    def too_long(self, problem: Problem) -> str | None:
        network = problem.network
        assert isinstance(network, NetworkGraph)  # noqa: S101 - declared; narrows the type
        curved = sum(not step.node.affine for step in network.steps)
        seconds = PASSES * curved * (curved + 1) * pass_flops(network, problem.clean.n) / FLOPS_PER_SECOND
        if seconds <= LONGEST:
            return None
        return (
            f"about {seconds:.0f} s at this depth; name {self.name!r} to run it, or let tokens move at a deeper block"
        )

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return ChainBound(problem, seed=seed)


class ChainBound(PreparedBound):
    """The used share from the moves of all states and the clean derivatives.

    Args:
        problem: The question.
        seed: Seed of random start vectors.
    """

    @torch.no_grad()
    def __init__(self, problem: Problem, *, seed: int) -> None:
        self._problem, self._goal = problem, problem.resolved
        self._chance = Chance(seed, "network-chain", SIDE_FAILURE, EVENTS)
        self._network = Network.of(problem, self._chance)
        self._tails: dict[str, Tail] = {}
        self._build = Tails(problem, self._network.clean, self._network.profiles, self._chance)
        self._prepare_readouts()
        self._prepare_tails(stream(seed, "output"))

    # ---- at the clean input ----------------------------------------------------------------------------------------

    def _prepare_readouts(self) -> None:
        """Gradients and cotangents of the classes with the least room; none for a displacement."""
        goal, wiring = self._goal, self._network.wiring
        self._classes = goal.budgets.new_zeros(0, dtype=torch.long)
        self._cotangents: dict[str, Float[Tensor, "c n e"]] = {}
        if goal.functionals is None or goal.weights is None:
            return
        curved = curved_before(wiring, wiring.output)
        numbers = sum(self._network.clean.clean[name].numel() for name in (wiring.source, *curved))
        count = max(1, COTANGENT_NUMBERS // numbers)
        pressure = torch.linalg.vector_norm(goal.functionals, dim=-1) / goal.budgets
        self._classes = pressure.argsort(descending=True)[:count]
        seeds = goal.weights[:, None] * goal.functionals[self._classes][:, None, :]
        pulled = self._network.clean.pull({wiring.output: seeds}, (wiring.source, *curved))
        self._slopes = outward(self._problem.moves.dual_norm(pulled.pop(wiring.source)), FORMULA)
        self._cotangents = pulled

    def _prepare_tails(self, seed: int) -> None:
        """Tails in the order of evaluation, each weighted by the remainders that the earlier ones lead to."""
        reference, wanted = self._reference_radius(), frozenset(targets(self._network.wiring))

        def refine(name: str, moved: StateMove, remainders: Mapping[str, float]) -> StateMove:
            if name in wanted:
                self._tails[name] = self._build.of_state(name, remainders)
            return self._refined(name, moved, remainders, reference)

        _, remainders = self._network.moves(threat_move(self._problem, reference), refine)
        self._output = None if len(self._classes) else self._build.of_output(remainders, seed)

    def _reference_radius(self) -> float:
        """A radius at which remainders are compared; any one is sound."""
        if len(self._classes):
            slope = float((self._slopes / self._goal.budgets[self._classes]).max())
        else:
            generator = torch.Generator().manual_seed(0)
            points = self._problem.clean.points
            vector = torch.randn(points.shape, generator=generator, dtype=torch.float64).to(points)
            for _ in range(3):
                vector = vector / torch.linalg.vector_norm(vector).clamp_min(1e-300)
                vector = self._network.clean.vjp(self._network.clean.jvp(vector))
            slope = math.sqrt(float(torch.linalg.vector_norm(vector))) / float(self._goal.budgets[0])
        self._guess = 1.0 / slope if 1.0 / LARGEST < slope < LARGEST else 1.0
        return REFERENCE_SHARE * self._guess

    # ---- at one radius ---------------------------------------------------------------------------------------------

    def _refined(self, name: str, moved: StateMove, remainders: Mapping[str, float], radius: float) -> StateMove:
        return moved.meet(self._tails[name].move(radius, remainders)) if name in self._tails else moved

    @property
    def failure_probability(self) -> float:
        return self._chance.spent

    @property
    def first_guess(self) -> float | None:
        return 0.3 * self._guess

    @torch.no_grad()
    def usage(self, radius: float) -> Upper:
        source = threat_move(self._problem, radius)
        moves, remainders = self._network.moves(
            source, lambda name, moved, rest: self._refined(name, moved, rest, radius)
        )
        changes = goal_changes(self._goal, moves[self._network.wiring.output])
        if self._output is not None:
            found = self._output.move(radius, remainders).frobenius
            changes = changes.clamp_max(found)
        else:
            changes[self._classes] = torch.minimum(changes[self._classes], self._readouts(radius, moves))
        return Upper(used_share(changes, self._goal.budgets, share=FORMULA), self._chance.spent)

    def _readouts(self, radius: float, moves: Mapping[str, StateMove]) -> Float[Tensor, "c"]:
        """``dual norm of the gradient + sum_m |<c_m, Rem_m>|`` of every class."""
        total = radius * self._slopes
        for step in self._network.wiring.steps:
            if step.name in self._cotangents:
                inputs = [moves[name] for name in step.reads]
                total = total + self._network.bounds[step.name].readout(self._cotangents[step.name], *inputs)
        return torch.nan_to_num(total, nan=torch.inf)
