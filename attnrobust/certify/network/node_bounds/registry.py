"""From the nodes of a network to their bounds; what is not listed is refused."""

from attnrobust.certify.network.node_bounds.affine import MatrixBound, ScaleBound, SumBound
from attnrobust.certify.network.node_bounds.attend import AttendBound
from attnrobust.certify.network.node_bounds.elementwise import ActivateBound, ProductBound
from attnrobust.certify.network.node_bounds.node_bound import NodeBound
from attnrobust.certify.network.node_bounds.normalise import NormaliseBound
from attnrobust.certify.network.node_bounds.rows import FixedTokensBound, IdentityBound, PoolBound
from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.affine import Affine, Scale, Sum
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import AddPositions, ConcatTokens, PoolMean, PoolRow
from attnrobust.layers.graph.wiring import Step
from attnrobust.numerics.chance import Chance

NODE_FEATURES = frozenset({
    "Affine", "Scale", "Sum", "Product", "PoolRow", "PoolMean", "ConcatTokens", "AddPositions",
    "Activate", "Activate(relu)", "Activate(gelu)", "Activate(gelu_tanh)", "Activate(quick_gelu)", "Activate(silu)",
    "Activate(tanh)", "Activate(sigmoid)", "Activate(identity)",
    "Normalise", "LayerNorm", "LayerNorm.bias", "RMSNorm", "RMSNorm.bias",
    "Attend", "Attention.bias", "Attention.out_projection", "Attention.scale", "Attention.mask", "Attention.causal",
})  # fmt: skip
"""Features of a ``NetworkGraph`` that the bounds of this folder cover."""


def bound_of(step: Step, clean: Linearisation, chance: Chance) -> NodeBound:
    """The bound of one step at the network's clean states.

    Raises:
        UnsupportedModelError: A node without a bound (subclasses too).
    """
    node, states = step.node, [clean.clean[name] for name in step.reads]
    kind = type(node)
    if kind is Attend and isinstance(node, Attend):
        return AttendBound(node.attention, states[0], clean.masses[step.reads[0]], chance)
    if kind is Normalise and isinstance(node, Normalise):
        return NormaliseBound(node.norm, states[0])
    if kind is Activate and isinstance(node, Activate):
        return ActivateBound(node.function, states[0])
    if kind is Product:
        return ProductBound(states[0], states[1])
    return _affine_bound(step, clean)


def _affine_bound(step: Step, clean: Linearisation) -> NodeBound:
    node, kind, state = step.node, type(step.node), clean.clean[step.reads[0]]
    if kind is Affine and isinstance(node, Affine):
        return MatrixBound(node.weight)
    if kind is Scale and isinstance(node, Scale):
        return ScaleBound(state.new_tensor(node.factor) if isinstance(node.factor, float) else node.factor)
    if kind is Sum:
        return SumBound()
    if kind in (PoolRow, PoolMean):
        return PoolBound(clean.nodes[step.name].vjp(state.new_ones(1, 1))[0][:, 0])
    if kind is ConcatTokens and isinstance(node, ConcatTokens):
        return FixedTokensBound(int(node.tokens.shape[0]))
    if kind is AddPositions:
        return IdentityBound()
    raise UnsupportedModelError(f"state {step.name}: the moves of {kind.__name__} are not bounded")
