"""Building a network graph step by step, with the standard transformer blocks."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.activation_functions import Activation
from attnrobust.layers.graph.affine import Affine, Sum
from attnrobust.layers.graph.attend import Attend
from attnrobust.layers.graph.elementwise import Activate, Product
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.node import Node
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.wiring import INPUT, Step
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.normalisation import LayerNorm, RMSNorm

Norm = LayerNorm | RMSNorm


@dataclass(frozen=True, eq=False)
class FeedForward:
    """``f(X)_i = (activation(x_i w_1 + b_1) [* (x_i w_gate + b_gate)]) w_2 + b_2``: an MLP with any activation or gate.

    Args:
        w_1: First weights (d, m); those inside the activation.
        w_2: Second weights (m, e).
        b_1: First biases (m,) or None.
        b_2: Second biases (e,) or None.
        w_gate: Weights (d, m) of the factor outside the activation (the "up" projection of SwiGLU), or None.
        b_gate: Its biases (m,) or None.
        activation: As in ``Activate``.
    """

    w_1: Float[Tensor, "d m"]
    w_2: Float[Tensor, "m e"]
    b_1: Float[Tensor, "m"] | None = None
    b_2: Float[Tensor, "e"] | None = None
    w_gate: Float[Tensor, "d m"] | None = None
    b_gate: Float[Tensor, "m"] | None = None
    activation: Activation = "gelu"


class GraphBuilder:
    """Collects steps; each reads the latest state unless told otherwise. Mutable; ``build`` gives the frozen graph.

    Args:
        width: Token width of the input.

    Examples:
        >>> import torch
        >>> builder = GraphBuilder(2)
        >>> builder.add("head", Affine(torch.ones(2, 1, dtype=torch.float64)))
        'head'
        >>> builder.build().out_width
        1
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.latest = INPUT
        """The state that the next step reads."""
        self._steps: list[Step] = []
        self._depths: list[str] = [INPUT]

    def add(self, name: str, node: Node, *reads: str) -> str:
        """Append one step; without ``reads`` it reads the latest state. Returns its name."""
        self._steps.append(Step(name, node, reads or (self.latest,)))
        self.latest = name
        return name

    def mark_depth(self) -> None:
        """Say that tokens may move at the latest state."""
        if self.latest not in self._depths:
            self._depths.append(self.latest)

    def feed_forward(self, name: str, mlp: Mlp | FeedForward) -> str:
        """Append an MLP: ``name.in``, ``name.act``, with a gate ``name.gate`` and ``name.product``, ``name.out``."""
        read = self.latest
        self.add(f"{name}.in", Affine(mlp.w_1, mlp.b_1))
        hidden = self.add(f"{name}.act", Activate(mlp.activation))
        if isinstance(mlp, FeedForward) and mlp.w_gate is not None:
            gate = self.add(f"{name}.gate", Affine(mlp.w_gate, mlp.b_gate), read)
            self.add(f"{name}.product", Product(), hidden, gate)
        return self.add(f"{name}.out", Affine(mlp.w_2, mlp.b_2))

    def post_norm_block(
        self, name: str, *, attention: Attention, norm_1: Norm, mlp: Mlp | FeedForward, norm_2: Norm
    ) -> str:
        """``y = norm_1(x + attention(x))``, ``out = norm_2(y + mlp(y))``; its input is a depth. Returns its state."""
        self.mark_depth()
        read = self.latest
        self.add(f"{name}.attention", Attend(attention))
        self.add(f"{name}.attention.sum", Sum(), read, self.latest)
        read = self.add(f"{name}.norm_1", Normalise(norm_1))
        self.feed_forward(f"{name}.mlp", mlp)
        self.add(f"{name}.mlp.sum", Sum(), read, self.latest)
        return self.add(f"{name}.norm_2", Normalise(norm_2))

    def pre_norm_block(
        self, name: str, *, attention: Attention, norm_1: Norm, mlp: Mlp | FeedForward, norm_2: Norm
    ) -> str:
        """``y = x + attention(norm_1(x))``, ``out = y + mlp(norm_2(y))``; its input is a depth. Returns its state."""
        self.mark_depth()
        read = self.latest
        self.add(f"{name}.norm_1", Normalise(norm_1))
        self.add(f"{name}.attention", Attend(attention))
        read = self.add(f"{name}.attention.sum", Sum(), read, self.latest)
        self.add(f"{name}.norm_2", Normalise(norm_2))
        self.feed_forward(f"{name}.mlp", mlp)
        return self.add(f"{name}.mlp.sum", Sum(), read, self.latest)

    def build(self) -> NetworkGraph:
        """The graph of everything added.

        Raises:
            InputError: As ``NetworkGraph``; nothing was added.
        """
        if not self._steps:
            raise InputError("nothing was added to the graph")
        return NetworkGraph(self.width, tuple(self._steps), depth_names=tuple(self._depths))
