"""Reading a module as a network: the reader of its class, the graph at a depth, and the check at one input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.goals import Goal, Margin
from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.models.adapters import class_path
from attnrobust.models.capture import CapturedInput
from attnrobust.models.networks.albert import AlbertReader
from attnrobust.models.networks.bert import BertReader
from attnrobust.models.networks.check import require_agreement
from attnrobust.models.networks.confirmation import Confirmation, FoundPoint, OwnModel, confirm_point
from attnrobust.models.networks.distilbert import DistilBertReader
from attnrobust.models.networks.gpt2 import Gpt2Reader
from attnrobust.models.networks.llama import LlamaReader
from attnrobust.models.networks.parts import refuse_at, refuse_dropout
from attnrobust.models.networks.plan import EMBEDDINGS, Plan, Wanted
from attnrobust.models.networks.states import States, watch
from attnrobust.models.networks.torch_layers import TorchReader
from attnrobust.models.networks.vit import VitReader
from attnrobust.tokens import as_index


class Reader(Protocol):
    """Reads the models of one architecture."""

    def classes(self) -> tuple[str, ...]:
        """Full names of the model classes that it reads; a subclass may compute something else."""

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        """The model's pieces and the output that is asked for; refuses what is not modelled by its path."""


READERS: tuple[Reader, ...] = (
    BertReader(), AlbertReader(), DistilBertReader(), Gpt2Reader(), LlamaReader(), VitReader(), TorchReader()
)  # fmt: skip
"""Every reader; a model is read by the one that names exactly its class."""


@dataclass(frozen=True)
class NetworkInfo:
    """What was read.

    Args:
        architecture: The model's class.
        blocks: Number of transformer blocks.
        depths: The states at which tokens may move, from the input on.
        at: The one at which they move here.
        head: What the output is.
        labels: Names of the classes; empty where there are none.
    """

    architecture: str
    blocks: int
    depths: tuple[str, ...]
    at: str
    head: str
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ReadNetwork:
    """A network from one depth on, and the clean tokens there; they agree with the model at this input.

    Args:
        graph: The network.
        input: The clean input: its tokens at that depth, and its text where it has one.
        info: What was read.
        own: The model object and the call that was read; None for a graph without one.
    """

    graph: NetworkGraph
    input: CapturedInput
    info: NetworkInfo
    own: OwnModel | None = None

    def confirm(self, result: FoundPoint, goal: Goal | None = None) -> Confirmation:
        """Whether the model object itself breaks the goal at the point that an attack found.

        The model runs its own forward call in float64; where block K begins (the depth ``at``) a hook replaces the
        hidden states by the perturbed ones, and everything behind is the model's own code. Copies of equal mass are
        ordinary tokens to it; unequal masses are not expressible.

        Args:
            result: An attack's result for a problem about this network, at this input.
            goal: The goal of that problem; None means the one of ``decision()``, "the predicted label stays". A margin
                whose readout is the last linear layer, or some classes of it, is read from the model's own logits; any
                other goal from the output of ``graph``.

        Returns:
            What the model does there, and whether that agrees with the result; ``status`` is DISAGREES if not.

        Raises:
            InputError: The result has no point; there is no model object; the goal does not fit the output.
            AlreadyViolatedError: The goal fails in the model's own run at the clean input.
        """
        if self.own is None:
            raise InputError("this network was not read from a model object; there is nothing to confirm with")
        return confirm_point(self.own, self.graph, self.info.at, self.input.measure, result, goal)

    def decision(self, *, label: int | None = None, target: int | None = None) -> tuple[NetworkGraph, Margin]:
        """The network and goal of "the decision stays": the last linear layer becomes the goal's readout.

        The decision is that of the model's own logits; the split keeps vocabularies and the identity out of it.

        Args:
            label: The class that must stay; None means the clean prediction.
            target: Ask about one rival alone: the goal fails where this class reaches the label's score, whatever the
                other classes score. The target may be overtaken there; ``confirm`` says which class the model gives.

        Raises:
            InputError: The output is no row of logits; a target that does not exist or is the label.
        """
        last = self.graph.steps[-1]
        if not isinstance(last.node, Affine) or self.graph.rows(self.input.measure.n)[self.graph.output] != 1:
            raise InputError(
                f"the output ({self.info.head}) is no single row of logits; give a model with a head, or row= (--row)"
            )
        if last.reads[0] == self.graph.source:
            raise InputError("the network is one linear layer; there is nothing before its readout")
        hidden = self.graph.part(self.graph.source, last.reads[0])
        goal = Margin(last.node.weight.T.contiguous(), last.node.bias, pool=0, label=label)
        return hidden, goal if target is None else self._against(goal, as_index("target", target))

    def _against(self, goal: Margin, target: int) -> Margin:
        """The margin of the label over one other class."""
        count = goal.weight.shape[0]
        label = goal.label
        if label is None:
            label = int(self.graph(self.input.measure.points)[0].argmax())
        if not 0 <= target < count or target == label:
            raise InputError(f"target {target} must be one of the classes 0 to {count - 1} other than {label}")
        both = [label, target]
        return Margin(goal.weight[both], None if goal.bias is None else goal.bias[both], pool=0, label=0)


def readable_classes() -> frozenset[str]:
    """Names of the model classes that are read, without their modules."""
    return frozenset(path.rsplit(".", 1)[1] for reader in READERS for path in reader.classes())


def plan_of(model: nn.Module, wanted: Wanted) -> Plan:
    """Read a model.

    Args:
        model: A model in eval mode; it is read, not changed.
        wanted: Which output.

    Raises:
        UnsupportedModelError: No reader for exactly its class, or a part that is not modelled.
        InputError: An output that it does not have.
    """
    path = class_path(model)
    for reader in READERS:
        if path in reader.classes():
            refuse_dropout(model)
            return reader.plan(model, wanted)
    raise UnsupportedModelError(f"{path} is not read as a network; whole models that are: {_shown()}")


def _shown() -> str:
    return ", ".join(sorted(readable_classes()))


def refuse_unread(plan: Plan, unread: Sequence[str]) -> None:
    """A checkpoint weight inside a piece that the model has no place for means another computation.

    Args:
        plan: What was read.
        unread: Weights of the checkpoint that the model does not use.

    Raises:
        UnsupportedModelError: There is one; names it.
    """
    for piece in plan.pieces:
        inside = [key for key in unread if f".{piece.path}." in f".{key}" and not key.endswith("masked_bias")]
        if inside:
            raise refuse_at(
                piece.path, f"its checkpoint has weights that the model does not use: {', '.join(inside[:4])}"
            )


def read_at(
    model: nn.Module, plan: Plan, model_inputs: Mapping[str, Any], *, at: str = EMBEDDINGS
) -> tuple[NetworkGraph, Float[Tensor, "n d"], NetworkInfo]:
    """The network from a depth on, checked against the model at one input, and the tokens at that depth.

    Raises:
        UnsupportedModelError: The model's own states are not those of the graph; names the first one.
        UnknownNameError: No such depth.
    """
    states = watch(model, plan, model_inputs)
    graph = plan.graph(int(states.entering[0].shape[-1]))
    depth = EMBEDDINGS if at == "block:0" else at
    if depth not in graph.depths():
        raise UnknownNameError("depth", at, graph.depths())
    require_agreement(model, plan, graph, states)
    info = NetworkInfo(plan.architecture, len(plan.blocks), graph.depths(), depth, plan.head.kind, plan.head.labels)
    return graph.tail(depth) if depth != graph.source else graph, _tokens(plan, states)[depth], info


def capture_states(model: nn.Module, model_inputs: Mapping[str, Any]) -> dict[str, Float[Tensor, "n d"]]:
    """The hidden states of a model at every depth and after its last part, from its own forward pass on one input.

    Args:
        model: A model that is read, in float64 and eval mode.
        model_inputs: Keyword arguments of one forward call, batch size 1.

    Raises:
        UnsupportedModelError: A model that is not read.
        InputError: The model refuses the input.
    """
    plan = plan_of(model, Wanted("states"))
    return _tokens(plan, watch(model, plan, model_inputs))


def _tokens(plan: Plan, states: States) -> dict[str, Tensor]:
    return dict(zip(plan.states, (*states.entering, states.leaving[-1]), strict=True))
