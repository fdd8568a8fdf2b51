"""The certificate ``network-composite`` of whole networks."""

from dataclasses import replace
from typing import ClassVar

import torch

from attnrobust.certify.method import ATTENTION_FEATURES, MOVES, CertificateMethod, PreparedBound
from attnrobust.certify.network.composite.bound import DisplacementBound, pooled_readout, prepared
from attnrobust.certify.network.composite.branches import WorstBranch
from attnrobust.certify.network.composite.cost import estimated
from attnrobust.certify.network.composite.margin import MarginBound
from attnrobust.certify.network.composite.preparation import Settings
from attnrobust.goals import Displacement, Margin
from attnrobust.layers.graph.affine import Affine, Scale, Sum
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Node
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import AddPositions, ConcatTokens, PoolMean, PoolRow
from attnrobust.numerics.chance import MAIN_FAILURE, stream
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken

NODES: tuple[type[Node], ...] = (
    Affine, Scale, Sum, AddPositions, ConcatTokens, PoolMean, PoolRow, Attend, Normalise, Activate, Product,
)  # fmt: skip
SMOOTH = frozenset({"gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid", "identity"})
NODE_FEATURES = frozenset(
    {
        *(node.__name__ for node in NODES),
        *(f"Attention.{feature}" for feature in ATTENTION_FEATURES),
        *(f"Activate({function})" for function in SMOOTH),
        *("LayerNorm", "LayerNorm.bias", "RMSNorm", "RMSNorm.bias"),
    }
)
TOKEN_LIMIT = 16  # tokens up to which "any token" is answered token by token


class NetworkComposite(CertificateMethod):
    """Exact first order of the whole network, its second order as one object, a proved remainder.

    Holds for graphs of affine maps, dot-product attention, LayerNorm, RMSNorm, smooth activations and products of
    edges. Displacements and margins, tokens that move at the graph's input.

    References:
        Derived; docs/network-composite.md, theorems 1 and 2.
    """

    name: ClassVar[str] = "network-composite"
    reference: ClassVar[str] = "derived; docs/network-composite.md, theorems 1 and 2"
    region: ClassVar[str] = "every move of the movable tokens with threat distance at most the radius"
    layers = (NetworkGraph,)
    features = NODE_FEATURES
    threats = MOVES
    goals = (Displacement, Margin)
    seconds_limit: ClassVar[float] = 60.0
    """Estimated seconds beyond which the certificate is refused."""
    sketch: ClassVar[int] = 64
    """Gaussian directions where a basis is too large."""
    own_metrics: ClassVar[bool] = False
    """Whether remainders are measured twice."""
    cure: ClassVar[str] = "name 'network-composite-large' to run it all the same"

    def refuses_more(self, problem: Problem) -> str | None:
        network = problem.network
        assert isinstance(network, NetworkGraph)  # noqa: S101 - declared; narrows the type
        for step in network.steps:
            if type(step.node) not in NODES:
                return f"it does not cover the node {step.node.kind} (step {step.name})"
        if all(step.node.affine for step in network.steps):
            return "the network is affine"
        return self._too_long(problem, network)

    def _too_long(self, problem: Problem, network: NetworkGraph) -> str | None:
        pieces = self._pieces(problem)
        moving = max(int(piece.sum()) for piece in pieces) * network.width
        readouts = self._readouts(problem)
        cost = estimated(network, problem.clean.n, moving, sketch=self.sketch, readouts=readouts)
        seconds = len(pieces) * cost.seconds * (2.0 if self.own_metrics else 1.0)
        if seconds <= self.seconds_limit:
            return None
        classes = "" if readouts == 1 else f" and {readouts} classes could be reached"
        needed = f"{moving} numbers move{classes}: about {seconds:.0f} s"
        return f"{needed}, the limit is {self.seconds_limit:.0f} s; {self.cure}"

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        pieces = self._pieces(problem)
        readouts = self._readouts(problem)
        settings = Settings(self.sketch, self.sketch, seed, MAIN_FAILURE / len(pieces), readouts, self.own_metrics)
        if len(pieces) == 1:
            return self._piece(problem, pieces[0], settings)
        return WorstBranch(
            [
                self._piece(problem, piece, replace(settings, seed=stream(seed, index)))
                for index, piece in enumerate(pieces)
            ]
        )

    def _readouts(self, problem: Problem) -> int:
        """Numbers of the output that are bounded each on its own: one for a displacement, one per wrong class."""
        return int(problem.resolved.budgets.numel())

    def _pieces(self, problem: Problem) -> list[torch.Tensor]:
        """Movable tokens of each convex piece of the threat's set; "any token" of many is inside one ball."""
        movable = problem.moves.movable(problem.clean.n)
        if isinstance(problem.threat, AnyToken) and int(movable.sum()) <= TOKEN_LIMIT:
            return [branch.movable(problem.clean.n) for branch in problem.threat.branches(problem.clean.n)]
        return [movable]

    def _piece(self, problem: Problem, movable: torch.Tensor, settings: Settings) -> PreparedBound:
        preparation = prepared(problem, movable, settings, pooled_readout(problem))
        factor = problem.moves.frobenius_factor(problem.clean.n, problem.clean.width)
        if isinstance(problem.goal, Margin):
            return MarginBound(problem, preparation, factor)
        return DisplacementBound(problem, preparation, factor)


class NetworkCompositeLarge(NetworkComposite):
    """The same without a limit of a minute, for hours of work; runs where it is named."""

    name: ClassVar[str] = "network-composite-large"
    seconds_limit: ClassVar[float] = 6.0 * 3600.0
    sketch: ClassVar[int] = 128
    own_metrics: ClassVar[bool] = True
    cure: ClassVar[str] = "move fewer tokens, or start at a deeper block"
