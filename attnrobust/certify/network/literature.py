"""Whole networks by the literature's Lipschitz bounds, composed node by node."""

import math
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.castin2024_smooth import CastinDerived, CastinReported
from attnrobust.certify.closed_form.havens2024_local import HavensLocal
from attnrobust.certify.closed_form.spread_lipschitz import SpreadLipschitz
from attnrobust.certify.method import CertificateMethod, PreparedBound
from attnrobust.certify.network.node_bounds.activation_ranges import FAR, largest_slope
from attnrobust.certify.network.node_bounds.node_bound import NodeBound
from attnrobust.certify.network.node_bounds.registry import NODE_FEATURES, bound_of
from attnrobust.certify.network.node_bounds.state_move import StateMove, scaled_move, token_move
from attnrobust.certify.network.product import PropagatedBound
from attnrobust.errors import UnsupportedModelError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.wiring import Step
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.numerics.chance import Chance
from attnrobust.numerics.rounding import ENTRY, FORMULA, outward
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure

SMALL_INPUT = 600
"""Numbers of an attention layer's input up to which Havens' bound decomposes a matrix; beyond, its norm would rest on
chance, and the others answer."""


ABOVE_ROUNDING = 1e9
"""Outputs of saturated attention at large scores may be rounded by many times their size."""


class NetworkLipschitz(CertificateMethod):
    """Every node by the smallest Lipschitz bound of the literature on the set that its input moves in, composed.

    Attention: the bounds of Castin et al. 2024 on the ball of its tokens (reported and derived form), by the tokens'
    spread, and of Havens et al. 2024 for small inputs. Norms: ``max|weight| / s`` with the least root s on the set, at
    least ``eps^{1/2}``. Matrices: spectral norms. Activations: their Lipschitz constant. Sums: the triangle inequality.
    The baseline that the other network certificates improve on; no first order of the network anywhere.

    References:
        Castin, Ablin, Peyre, How smooth is attention?, ICML 2024; Havens et al., Fine-grained local sensitivity
        analysis of standard dot-product self-attention, ICML 2024; composition: docs/network-certificates.md,
        theorem 3.
    """

    name: ClassVar[str] = "network-lipschitz"
    reference: ClassVar[str] = (
        "Castin et al. 2024 and Havens et al. 2024 for attention, composed; docs/network-certificates.md, theorem 3"
    )
    region: ClassVar[str] = "every move of the movable tokens with threat distance at most the radius"
    relative_tolerance: ClassVar[float] = 1e-2
    layers = (NetworkGraph,)
    features = NODE_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        return PropagatedBound(problem, seed=seed, name=self.name, bound=lipschitz_of)


def lipschitz_of(step: Step, clean: Linearisation, chance: Chance) -> NodeBound:
    """The literature's bound of one step; affine nodes and products as everywhere.

    Raises:
        UnsupportedModelError: A node without a bound (subclasses too).
    """
    node, state = step.node, clean.clean[step.reads[0]]
    if type(node) is Attend and isinstance(node, Attend):
        return AttentionLipschitz(node.attention, state, clean.masses[step.reads[0]])
    if type(node) is Normalise and isinstance(node, Normalise):
        return NormLipschitz(node.norm, state)
    if type(node) is Activate and isinstance(node, Activate):
        return ActivationLipschitz(node.function)
    return bound_of(step, clean, chance)


class _MoveOnly(NodeBound):
    """A node whose derivative nothing is said about: its remainder is never asked for."""

    def remainder(self, *inputs: StateMove) -> StateMove:
        raise UnsupportedModelError(f"{type(self).__name__} bounds moves only")


class AttentionLipschitz(_MoveOnly):
    """``||f(X + E) - f(X)||_F`` by closed formulas on the ball ``||E||_F <= rho``.

    Args:
        attention: The layer.
        points: Clean tokens.
        mass: Their masses or None.
    """

    def __init__(self, attention: Attention, points: Float[Tensor, "n d"], mass: Float[Tensor, "n"] | None) -> None:
        self._width = attention.out_width
        # attention knows masses up to a factor; beside fixed tokens they do not sum to 1
        clean = TokenMeasure(points) if mass is None else TokenMeasure(points, mass / mass.sum())
        # any tolerance gives the same bound of the change; one far above the output is above its rounding, too
        size = float(torch.linalg.vector_norm(attention(points, mass)))
        self._problem = Problem(attention, clean, FrobeniusBall(), Displacement(ABOVE_ROUNDING * max(1.0, size)))
        methods: list[CertificateMethod] = [CastinReported(), CastinDerived(), SpreadLipschitz()]
        if points.numel() <= SMALL_INPUT:
            methods.append(HavensLocal())
        bounds = [method.prepare(self._problem, seed=0) for method in methods if method.refuses(self._problem) is None]
        self._bounds = [bound for bound in bounds if bound.failure_probability == 0.0]

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        if given.frobenius == 0.0:
            return token_move(0.0, torch.zeros_like(given.tokens), self._width)
        goal = self._problem.resolved
        unit = float(goal.budgets[0]) * goal.outward  # the tolerance, as the shares were divided by it
        shares = [bound.usage(given.frobenius).value for bound in self._bounds]
        whole = outward(unit * min((s for s in shares if s >= 0.0), default=math.inf), FORMULA)
        return token_move(whole, torch.full_like(given.tokens, whole), self._width)


class NormLipschitz(_MoveOnly):
    """``|f(x + e) - f(x)| <= max|weight| |e| / max(eps^{1/2}, s(x) - |e| d^{-1/2})`` of every token.

    Args:
        norm: The normalisation.
        x: Clean tokens.
    """

    def __init__(self, norm: LayerNorm | RMSNorm, x: Float[Tensor, "n d"]) -> None:
        self.norm, self.x = norm, x

    @cached_property
    def _spread(self) -> Float[Tensor, "n"]:
        centred = self.x - self.x.mean(dim=-1, keepdim=True) if isinstance(self.norm, LayerNorm) else self.x
        spread: Tensor = (centred.square().mean(dim=-1) + self.norm.eps).sqrt()
        return spread

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        # less what rounding may have added to s, whose terms are as large as the entries
        rounding = 1e-14 * self.x.abs().amax(dim=-1)
        least = self._spread - rounding - outward(given.tokens, ENTRY) / math.sqrt(self.norm.width)
        least = least.clamp_min(math.sqrt(self.norm.eps) * (1.0 - 1e-14))
        slopes = outward(self.norm.weight.abs().max() / least, ENTRY)
        whole = float(slopes.max()) * given.frobenius
        return token_move(whole, slopes * given.tokens, self.norm.width)


class ActivationLipschitz(_MoveOnly):
    """``|phi(x + t) - phi(x)| <= sup|phi'| |t|``, entry by entry.

    Args:
        function: Name of the activation.
    """

    def __init__(self, function: str) -> None:
        everywhere = torch.full((1,), 2.0 * FAR, dtype=torch.float64)
        self._constant = largest_slope(function, torch.zeros_like(everywhere), everywhere)

    def move(self, *inputs: StateMove) -> StateMove:
        (given,) = inputs
        return scaled_move(given, self._constant.to(given.entries).expand_as(given.entries))
