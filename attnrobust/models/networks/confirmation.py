"""The perturbed point in the user's own model: its hidden states are replaced at the depth, the rest is its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Goal, Margin, Pool, ResolvedGoal
from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.rows import PoolRow
from attnrobust.models.networks.check import difference_of_terms
from attnrobust.models.networks.plan import Plan
from attnrobust.models.networks.states import output_behind
from attnrobust.status import Status
from attnrobust.tokens import PerturbedTokens, TokenMeasure

MOST_CLASSES = 256
"""Classes that a decision is compared over; of more than these (a vocabulary), the largest ones."""


@runtime_checkable
class FoundPoint(Protocol):
    """What is asked of an attack's result."""

    @property
    def perturbed(self) -> Tensor | None:
        """The tokens (n, d), or the atoms (m, d)."""

    @property
    def atoms(self) -> PerturbedTokens | None:
        """The atoms with masses, where tokens were split or copied."""

    @property
    def usage(self) -> float:
        """Used share of the goal's budget; >= 1 is a violation."""


@dataclass(frozen=True)
class Confirmation:
    """What the user's own model says at the perturbed point.

    Args:
        agrees: Whether the model breaks the goal where the attack says so (and keeps it where it does not).
        expressible: Whether the model can be given the point; otherwise ``message`` says why not, and nothing was run.
        usage: Share of the goal's budget that the model's own output uses; NaN where it is not expressible.
        difference: The largest difference of its output from the graph's, relative to the terms of the entry
            (1e-10 is allowed where a model is read); NaN where it is not expressible.
        decision: What the model puts out there, in words.
        label: Its class there, of goals about classes; None elsewhere.
        clean_label: Its class at the clean input.
        precision: In which precision it ran.
        given_precision: The precision of the weights as they were given; its own runs may decide otherwise by rounding.
        message: The one line for a disagreement or for a point that it cannot be given; empty elsewhere.
    """

    agrees: bool
    expressible: bool
    usage: float
    difference: float
    decision: str
    label: int | None
    clean_label: int | None
    precision: str
    given_precision: str
    message: str

    @property
    def status(self) -> Status:
        """DISAGREES where the model contradicts the attack; else FOUND, the claim about the graph stands."""
        return Status.DISAGREES if self.expressible and not self.agrees else Status.FOUND


@dataclass(frozen=True, eq=False)
class OwnModel:
    """The model object behind a read network, and the call that was read.

    Args:
        module: The model, in float64 and eval mode.
        plan: How it was read.
        model_inputs: Arguments of the forward call.
        given_precision: The precision of its weights as they were given.
    """

    module: nn.Module
    plan: Plan
    model_inputs: Mapping[str, Any]
    given_precision: str

    def output(self, at: str, tokens: Float[Tensor, "m d"]) -> Float[Tensor, "r e"]:
        """The model's own output with these hidden states at a depth; the rows are those of the graph's output.

        Raises:
            InputError: The model refuses them.
        """
        return output_behind(self.module, self.plan, self.model_inputs, self.plan.states.index(at), tokens)


def confirm_point(
    own: OwnModel, graph: NetworkGraph, at: str, clean: TokenMeasure, found: FoundPoint, goal: Goal | None
) -> Confirmation:
    """See ``ReadNetwork.confirm``."""
    if found.perturbed is None:
        raise InputError("the attack found no point; there is nothing to confirm")
    reason = _not_expressible(own, clean, found)
    if reason:
        return _refusal(own, reason)
    tokens = found.perturbed
    try:
        rest, moved = own.output(at, clean.points), own.output(at, tokens)
    except InputError as error:
        if tokens.shape == clean.points.shape:
            raise
        return _refusal(own, f"{type(own.module).__name__} does not take {tokens.shape[0]} hidden states: {error}")
    asked, of_model = _as_goal_of_output(goal, graph, rest, moved)
    resolved = _resolved(asked, graph, rest, clean)
    usage = float(resolved.usage(moved))
    agrees = (usage >= 1.0) == (found.usage >= 1.0)
    difference = difference_of_terms(graph, tokens, moved)
    labels = _labels(asked, resolved, rest, moved, of_model=of_model)
    return Confirmation(
        agrees=agrees,
        expressible=True,
        usage=usage,
        difference=difference,
        decision=_in_words(own.plan.head.labels if of_model else (), labels, usage),
        label=None if labels is None else labels[1],
        clean_label=None if labels is None else labels[0],
        precision=_precision(moved),
        given_precision=own.given_precision,
        message="" if agrees else _disagreement(own, usage, found.usage, difference),
    )


def _not_expressible(own: OwnModel, clean: TokenMeasure, found: FoundPoint) -> str:
    """Why the model cannot be given the point; empty if it can."""
    if found.atoms is None:
        return "" if clean.uniform else "the tokens have unequal masses; a model has no masses"
    mass, plan = found.atoms.mass, own.plan
    # Equal masses cancel: the atoms are then ordinary tokens.
    if not bool((mass == mass[0]).all()):
        return "the atoms have unequal masses; a model has no masses, only copies of equal mass are tokens to it"
    if found.atoms.points.shape[0] == clean.n:
        return ""
    layers = [block.attention for block in plan.blocks]
    if any(layer.causal or layer.mask is not None or layer.placed for layer in layers):
        return "there are more atoms than tokens, and the point does not say what its mask does with copies"
    first = any(isinstance(node, PoolRow) and node.row == 0 for _, node in plan.head.nodes)
    if plan.head.rows == "mean" or first:
        return ""
    return "there are more atoms than tokens; only outputs at the first token or of the mean are the same rows then"


def _refusal(own: OwnModel, reason: str) -> Confirmation:
    nan = float("nan")
    return Confirmation(
        False, False, nan, nan, "not run", None, None, "float64", own.given_precision, f"not expressible: {reason}"
    )


# ---- the goal, of the output that the model shows --------------------------------------------------------------------


def _as_goal_of_output(goal: Goal | None, graph: NetworkGraph, rest: Tensor, moved: Tensor) -> tuple[Goal, bool]:
    """A goal of the network's output, and whether it is about the model's own classes.

    Margins whose readout is (part of) the last layer become ones of its logits. Of a vocabulary only the largest at
    either point count: the rival that overtakes the label is among them, as is the label itself.

    Args:
        goal: The goal; None is "the predicted label stays".
        graph: The network.
        rest: The model's output at the clean input.
        moved: The same at the point.
    """
    if goal is not None and not (isinstance(goal, Margin) and isinstance(graph.steps[-1].node, Affine)):
        return goal, False
    classes = list(range(graph.out_width)) if goal is None else own_classes(goal, graph)
    if classes is None:
        assert goal is not None  # noqa: S101 - without a goal every class is asked about; narrows the type
        return goal, False
    pool, label = (0, None) if goal is None else (goal.pool, goal.label)
    kept = list(range(len(classes))) if len(classes) <= MOST_CLASSES else _largest(classes, pool, label, rest, moved)
    chosen = torch.tensor([classes[place] for place in kept], device=rest.device)
    one_hot = torch.nn.functional.one_hot(chosen, graph.out_width).to(torch.float64)
    return Margin(one_hot, pool=pool, label=None if label is None else kept.index(label)), True


def _largest(classes: list[int], pool: Pool, label: int | None, rest: Tensor, moved: Tensor) -> list[int]:
    """Places of the classes with the largest scores at the clean input and at the point, and that of the label."""
    kept = set() if label is None else {label}
    for output in (rest, moved):
        scores = (output[pool] if isinstance(pool, int) else output.mean(dim=0))[classes]
        kept |= set(scores.topk(MOST_CLASSES // 2).indices.tolist())
    return sorted(kept)


def own_classes(goal: Margin, graph: NetworkGraph) -> list[int] | None:
    """Which columns of the last layer a margin reads; None where its readout is another one."""
    last = graph.steps[-1].node
    assert isinstance(last, Affine)  # noqa: S101 - asked before; narrows the type
    if goal.weight.shape[1] != last.weight.shape[0] or (goal.bias is None) != (last.bias is None):
        return None
    own, read = _with_bias(last.weight.T, last.bias), _with_bias(goal.weight, goal.bias)
    if own.shape == read.shape and bool((own == read).all()):
        return list(range(own.shape[0]))
    found = [(own == row).all(dim=-1).nonzero().flatten()[:1].tolist() for row in read]  # row by row: vocabularies
    return [place[0] for place in found] if all(found) else None


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def _resolved(goal: Goal, graph: NetworkGraph, rest: Tensor, clean: TokenMeasure) -> ResolvedGoal:
    mass = graph.output_mass(None, clean.n).to(rest)
    try:
        return goal.resolve(rest, mass)
    except AlreadyViolatedError as error:
        raise AlreadyViolatedError(f"in the model's own run {error}") from error


def _labels(
    goal: Goal, resolved: ResolvedGoal, rest: Tensor, moved: Tensor, *, of_model: bool
) -> tuple[int, int] | None:
    """The class before and behind: the largest of the model's logits, or of the goal's own readout."""
    if not isinstance(goal, Margin):
        return None
    before, behind = (resolved.pooled(rows) for rows in (rest, moved))
    if not of_model:
        before, behind = goal.logits(before), goal.logits(behind)
    return int(before.argmax()), int(behind.argmax())


def _in_words(names: tuple[str, ...], labels: tuple[int, int] | None, usage: float) -> str:
    if labels is None:
        return f"its output uses {usage:.6g} of the budget"
    before, behind = (f"{k} ({names[k]})" if k < len(names) else str(k) for k in labels)
    return f"class {before} at the clean input, {behind} here"


def _disagreement(own: OwnModel, usage: float, claimed: float, difference: float) -> str:
    return (
        f"{type(own.module).__name__} itself uses {usage:.6g} of the budget at this point, the graph {claimed:.6g}; "
        f"their outputs differ by {difference:.3g} of the terms"
    )


def _precision(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _device(graph: NetworkGraph) -> torch.device:
    last = graph.steps[-1].node
    return last.weight.device if isinstance(last, Affine) else torch.device("cpu")
