"""Goals about whole models: what they ask, of which output, and what must be said beside their radii."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.goals import Goal, Margin, parse_tolerance
from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.models.anchors import nearest_anchor_readout
from attnrobust.models.model import Model, ModuleModel
from attnrobust.models.networks.confirmation import Confirmation
from attnrobust.models.networks.heads import CURE, TOKEN
from attnrobust.models.networks.plan import EMBEDDINGS, Head, HeadName
from attnrobust.models.networks.reading import ReadNetwork
from attnrobust.results import AttackResult
from attnrobust.runs.reading import DEFAULT_TOLERANCE
from attnrobust.runs.rows import MOVE_AT
from attnrobust.runs.sources import Source, given

READS_KEPT = 8
"""Inputs whose networks a worker remembers; work on one input follows itself, so few are enough."""

CURE_BY_GOALS = (
    "ask for its hidden states by --goal hidden or pooled, or for the nearest of --anchors by --goal nearest"
)

FIRST_BLOCK = "block:0"
"""Another name of the embeddings."""


@dataclass(frozen=True)
class NetworkGoal:
    """A goal about the model itself, from its own network.

    Args:
        name: "decision" (the class of the model's own head stays), "hidden" (the last hidden states move by at most the
            tolerance), "pooled" (their mean does), or "nearest" (the nearest anchor sentence stays).
        tolerance: As in ``parse_tolerance``, of "hidden" and "pooled".
        row: The token whose output counts, where there is one per token.
        label: The class that must stay; None means the clean prediction.
        anchors: One sentence for each class, of "nearest".
    """

    name: str
    tolerance: str | None = None
    row: int | None = None
    label: int | None = None
    anchors: tuple[str, ...] = ()

    @property
    def head(self) -> HeadName:
        """The output of the model that it is about."""
        names: dict[str, HeadName] = {"decision": "logits", "hidden": "states"}
        return names.get(self.name, "mean")

    @property
    def key(self) -> str:
        """The name in tables and rows."""
        amount = f" {parse_tolerance(self._tolerance).key.removeprefix('displacement ')}" if self._moves else ""
        row = "" if self.row is None else f" row:{self.row}"
        return f"{self.name}{amount}{row}" + ("" if self.label is None else f" label:{self.label}")

    @property
    def digest(self) -> str:
        """SHA-256 of everything that it asks; the weights of a head are the model's."""
        tolerance = parse_tolerance(self._tolerance).digest if self._moves else ""
        parts = (self.name, self.head, tolerance, str(self.row), str(self.label), *self.anchors)
        return hashlib.sha256("\n".join(("network goal", *parts)).encode()).hexdigest()

    def scope(self, depth: str) -> str:
        """What it is about, in words."""
        token = "" if self.row is None else f" at token {self.row}"
        subjects = {
            "decision": f"the model's own decision{token}",
            "hidden": f"the model's last hidden states{token}",
            "pooled": "the mean of the model's last hidden states",
            "nearest": "the nearest of the anchor sentences to the mean of the model's last hidden states",
        }
        return subjects[self.name] + MOVE_AT + depth

    @property
    def _moves(self) -> bool:
        return self.name in ("hidden", "pooled")

    @property
    def _tolerance(self) -> str:
        return self.tolerance or DEFAULT_TOLERANCE


@dataclass(frozen=True, eq=False)
class NetworkQuestion:
    """A goal at one input and depth.

    Args:
        read: What was read there.
        network: The network of the problem.
        goal: The goal of the problem.
        class_name: Readable name of a class, where the goal has classes.
    """

    read: ReadNetwork
    network: NetworkGraph
    goal: Goal
    class_name: Callable[[int], str]

    @property
    def confirm(self) -> Callable[[AttackResult], Confirmation]:
        """Gives an attack's point to the model itself."""
        return lambda result: self.read.confirm(result, self.goal)


class Networks:
    """The networks of one model at the inputs of a run; each is read, and compared with the model, once.

    Args:
        model: The model; loaded with its head where a goal is about the decision.
        patterns: Depths and globs of them.

    Raises:
        UnknownNameError: A depth that the model does not have.
        InputError: A model that is not read as a network.
    """

    def __init__(self, model: Model, patterns: Sequence[str]) -> None:
        self.model = model
        self.depths = matching_depths(model.depths(), patterns)
        self._reads: OrderedDict[tuple[str, str, str, int | None], ReadNetwork] = OrderedDict()
        self._readouts: dict[NetworkGoal, Margin] = {}

    def require(self, goal: NetworkGoal) -> None:
        """Refuse a goal that the model does not answer at any input.

        Raises:
            InputError: No head of its own, an output with one row for a goal about a row, anchors that tie, a label
                that does not exist.
            UnsupportedModelError: A part that is not modelled.
        """
        assert isinstance(self.model, ModuleModel)  # noqa: S101 - other models have no depths; narrows the type
        with curing():
            head = self.model.head(goal.head, row=goal.row)
        if head.kind == TOKEN and goal.row is None:
            raise InputError(f"a model for {TOKEN} decides at every token; name one by --row I")
        _require_label(goal, head)
        if goal.anchors:
            self._readout(goal)

    def read(self, source: Source, depth: str, goal: NetworkGoal) -> ReadNetwork:
        """The network at an input from a depth on, with the output that the goal is about."""
        key = (source.id, depth, goal.head, goal.row)
        if key not in self._reads:
            found = self.model.network(given(source), at=depth, head=goal.head, row=goal.row, input_id=source.id)
            self._reads[key] = found
            while len(self._reads) > READS_KEPT:
                self._reads.popitem(last=False)
        return self._reads[key]

    def question(self, source: Source, depth: str, goal: NetworkGoal) -> NetworkQuestion:
        """Network and goal of a problem.

        Raises:
            InputError: What ``Model.network`` raises, or an output that is no row of logits.
        """
        read = self.read(source, depth, goal)
        if goal.name == "decision":
            network, margin = read.decision(label=goal.label)
            return NetworkQuestion(read, network, margin, lambda index: self._class_name(read, index))
        asked = self._readout(goal) if goal.anchors else parse_tolerance(goal.tolerance or DEFAULT_TOLERANCE)
        return NetworkQuestion(read, read.graph, asked, lambda index: goal.anchors[index])

    def _class_name(self, read: ReadNetwork, index: int) -> str:
        if read.info.labels:
            return read.info.labels[index]
        assert isinstance(self.model, ModuleModel)  # noqa: S101 - it was read; narrows the type
        try:
            return self.model.word(index)
        except InputError:  # no tokenizer
            return str(index)

    def _readout(self, goal: NetworkGoal) -> Margin:
        if goal not in self._readouts:
            self._readouts[goal] = nearest_anchor_readout(self.model, goal.anchors, label=goal.label)
        return self._readouts[goal]


@contextmanager
def curing() -> Iterator[None]:
    """Within the block a missing head is cured by a goal, as runs and the command line name it."""
    try:
        yield
    except InputError as error:
        if CURE not in str(error):
            raise
        raise type(error)(str(error).replace(CURE, CURE_BY_GOALS)) from error


def _require_label(goal: NetworkGoal, head: Head) -> None:
    """Refuse a label that is none of the classes, before any input."""
    last = head.nodes[-1][1] if head.nodes else None
    count = len(goal.anchors) or (int(last.weight.shape[1]) if isinstance(last, Affine) else 0)
    if goal.label is not None and count and not 0 <= goal.label < count:
        named = f" ({', '.join(head.labels[:6])}{', ...' if count > 6 else ''})" if head.labels else ""
        raise InputError(f"label {goal.label} does not exist; the classes are 0 to {count - 1}{named}")


def matching_depths(depths: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The depths that names and globs mean, in the model's order.

    Args:
        depths: Every depth of the model.
        patterns: Names; ``block:0`` is the embeddings; with ``*``, ``?`` or ``[`` a glob.

    Raises:
        UnknownNameError: No such depth.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = [depth for depth in depths if fnmatchcase(depth, pattern) or _is_first(depth, pattern)]
        if not found:
            raise _unknown(pattern, depths)
        chosen.update(found)
    return tuple(depth for depth in depths if depth in chosen)


def _is_first(depth: str, pattern: str) -> bool:
    return depth == EMBEDDINGS and fnmatchcase(FIRST_BLOCK, pattern)


def _unknown(pattern: str, depths: Sequence[str]) -> InputError:
    """The error, with the range of blocks where it is the number that is wrong."""
    last = max((int(depth.removeprefix("block:")) for depth in depths if depth.startswith("block:")), default=0)
    kind, _, number = pattern.partition(":")
    if kind == "block" and number.isdecimal():
        return InputError(f"there is no {pattern}; the model has block:0 (the embeddings) to block:{last}")
    return UnknownNameError("depth", pattern, (*depths, FIRST_BLOCK))
