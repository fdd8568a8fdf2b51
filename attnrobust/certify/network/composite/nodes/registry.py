"""The remainder of each kind of node."""

from torch import Tensor

from attnrobust.certify.network.composite.nodes.attend import AttendRemainder
from attnrobust.certify.network.composite.nodes.base import NodeRemainder
from attnrobust.certify.network.composite.nodes.elementwise import ActivateRemainder, ProductRemainder
from attnrobust.certify.network.composite.nodes.normalise import NormaliseRemainder
from attnrobust.certify.network.composite.targets import Port
from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.attend import AttentionState
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.linearisation import Linearisation
from attnrobust.layers.graph.normalise import Normalise


def remainder_of(record: Linearisation, port: Port, importance: Tensor) -> NodeRemainder:
    """The remainder of the node that reads a port, nothing observed yet.

    Raises:
        UnsupportedModelError: A kind of node without one.
    """
    step = next(step for step in record.wiring.steps if step.name == port.name)
    node, clean, state = step.node, record.clean[step.reads[0]], record.nodes[step.name]
    if isinstance(node, Normalise):
        return NormaliseRemainder(port, node.norm, clean)
    if isinstance(node, Activate):
        return ActivateRemainder(port, node.function, clean, importance)
    if isinstance(node, Product):
        return ProductRemainder(port, importance)
    if isinstance(state, AttentionState):
        return AttendRemainder(port, state)
    raise UnsupportedModelError(f"{node.kind} has no bound of its remainder (step {step.name})")
