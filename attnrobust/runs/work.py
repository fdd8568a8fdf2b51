"""The work list: every input on every layer under every threat and goal, named by digests of its content."""

import fnmatch
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import AttnRobustError, InputError, UnknownNameError
from attnrobust.goals import Goal
from attnrobust.layers.attention import Attention
from attnrobust.models.capture import CapturedInput, TextLine, read_texts, read_tokens
from attnrobust.models.listing import LayerInfo
from attnrobust.models.model import Model, ModuleModel, load_model
from attnrobust.runs.config import RunConfig
from attnrobust.runs.datasets import read_dataset
from attnrobust.runs.evaluate import RowTask, evaluate_row, goal_scope
from attnrobust.runs.inputs import on_device
from attnrobust.runs.networks import NetworkGoal, Networks, curing
from attnrobust.runs.rows import Row
from attnrobust.runs.sources import Image, Source, is_pictures, read_images, read_pictures, source_digest
from attnrobust.status import Status
from attnrobust.threats.base import Threat
from attnrobust.threats.parse import parse_threat
from attnrobust.tokens import tensor_digest

CAPTURES_KEPT = 8
"""Inputs whose tokens a worker remembers; work on one input follows itself, so few are enough."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkItem:
    """One row to compute.

    Args:
        row_id: Digest of the input's content, layer, threat and goal (and of the repetition, for equal inputs).
        source: Which input, an index into the input file of this run.
        layer: Full name of the layer, or the depth of the whole model.
        threat: Key of the threat.
        goal: Which goal, an index into the configuration.
    """

    row_id: str
    source: int
    layer: str
    threat: str
    goal: int


class Workbench:
    """Everything that a worker needs to compute rows of one run; what is expensive is made once, when first needed.

    Args:
        config: The configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._specs: dict[str, Attention] = {}
        self._words: dict[int, float | None] = {}
        self._captured: OrderedDict[tuple[int, str], CapturedInput] = OrderedDict()

    @cached_property
    def model(self) -> Model:
        """The model, on the configured device; with its head where a goal is about its decision."""
        head = any(goal.goal == "decision" for goal in self.config.goals)
        with curing():
            return load_model(self.config.model, device=self.config.device, head=head)

    @cached_property
    def sources(self) -> Sequence[Source]:
        """The inputs in the order of their file."""
        if self.config.texts is not None:
            return read_texts(self.config.texts)
        if self.config.dataset is not None:
            return read_dataset(self.config.dataset, column=self.config.column)
        if self.config.images is not None:
            return self._images(self.config.images)
        assert self.config.tokens is not None  # noqa: S101 - the configuration has one of them; narrows the type
        widths = {layer.d for layer in self.layers}
        return read_tokens(self.config.tokens, width=widths.pop() if len(widths) == 1 else None)

    def _images(self, path: Path) -> Sequence[Source]:
        """Arrays as they are; pictures as the model's own processor gives them."""
        if not is_pictures(path):
            return read_images(path)
        if not isinstance(self.model, ModuleModel):
            raise InputError(f"{self.model.name} holds weights only, no image processor; give --tokens")
        return read_pictures(path, self.model.image_encoder)

    @cached_property
    def goals(self) -> tuple[Goal | NetworkGoal, ...]:
        """The goals of the configuration."""
        return tuple(goal.make() for goal in self.config.goals)

    @cached_property
    def threats(self) -> dict[str, Threat]:
        """The threats of the configuration by key."""
        return {threat.key: threat for threat in map(parse_threat, self.config.threats)}

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The layers that the configuration names; a glob takes the supported ones, None the only one."""
        if self.config.layers is None:
            return (self.model.resolve(None),)
        chosen: dict[str, LayerInfo] = {}
        for pattern in self.config.layers:
            for layer in matching_layers(self.model, pattern):
                chosen[layer.name] = layer
        return tuple(chosen.values())

    @cached_property
    def networks(self) -> Networks | None:
        """The networks of the model, where the configuration is about the whole of it."""
        return None if self.config.at is None else Networks(self.model, self.config.at)

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the layers, or the depths at which tokens move."""
        return tuple(layer.name for layer in self.layers) if self.networks is None else self.networks.depths

    def items(self) -> list[WorkItem]:
        """The whole work list, in the order input, layer or depth, threat, goal."""
        seen: Counter[str] = Counter()
        items = []
        for index, source in enumerate(self.sources):
            content = source_digest(source)
            repetition = seen[content]
            seen[content] += 1
            items += [
                WorkItem(_row_id(content, repetition, place, threat, goal.digest), index, place, threat, number)
                for place in self.places
                for threat in self.threats
                for number, goal in enumerate(self.goals)
            ]
        return items

    def refuse_hopeless(self) -> None:
        """Refuse, before the first row, what no input can answer: none can be captured, or none is long enough.

        Inputs are captured one by one until each threat has one that it can be asked of; the first suffices as a rule.

        Raises:
            InputError: A goal that the model does not answer, what the first input that cannot be captured says, or a
                threat names tokens that no input has.
        """
        for goal in self.goals:
            if isinstance(goal, NetworkGoal) and self.networks is not None:
                self.networks.require(goal)
        open_threats, sizes, wrong = dict(self.threats), list[int](), list[AttnRobustError]()
        for index in range(len(self.sources)):
            try:
                sizes.append(self._tokens_of(index))
            except AttnRobustError as error:
                wrong.append(error)
                continue
            open_threats = {key: threat for key, threat in open_threats.items() if not _fits(threat, sizes[-1])}
            if not open_threats:
                return
        if not sizes:
            raise wrong[0]
        key = next(iter(open_threats))
        raise InputError(f"no input is long enough for the threat {key}: the longest has {max(sizes)} tokens")

    def row(self, item: WorkItem) -> Row:
        """Compute one row; whatever goes wrong is its status."""
        try:
            task = self.task(item)
        except AttnRobustError as error:
            return self.failed(item, Status.ERROR, str(error))
        return evaluate_row(task, self.config)

    def task(self, item: WorkItem) -> RowTask:
        """The work of an item."""
        goal, threat = self.goals[item.goal], self.threats[item.threat]
        if isinstance(goal, NetworkGoal):
            return self._network_task(item, goal)
        captured, spec = self._capture(item.source, item.layer), self.spec(item.layer)
        measure, moved = on_device(captured.measure, goal, self.config.device)
        return RowTask(
            captured.id, item.layer, spec, measure, threat, moved, text=captured.text, tokens=captured.token_strings,
            row_id=item.row_id, scope=self._scope(item), word_distance=self._word_distance(item.source),
        )  # fmt: skip

    def _word_distance(self, index: int) -> float | None:
        """How far the nearest other word is, of a text."""
        model, source = self.model, self.sources[index]
        if not isinstance(model, ModuleModel) or not isinstance(source, TextLine):
            return None
        if index not in self._words:
            self._words[index] = model.word_distance(source)
        return self._words[index]

    def _network_task(self, item: WorkItem, goal: NetworkGoal) -> RowTask:
        """The work of an item about the whole model."""
        assert self.networks is not None  # noqa: S101 - the configuration has a depth; narrows the type
        source = self.sources[item.source]
        asked = self.networks.question(source, item.layer, goal)
        captured = asked.read.input
        measure, moved = on_device(captured.measure, asked.goal, self.config.device)
        return RowTask(
            source.id, item.layer, asked.network, measure, self.threats[item.threat], moved, text=source.text,
            tokens=captured.token_strings, row_id=item.row_id, goal_key=goal.key, scope=self._scope(item),
            class_name=asked.class_name, confirm=asked.confirm, word_distance=self._word_distance(item.source),
        )  # fmt: skip

    def _scope(self, item: WorkItem) -> str | None:
        """What the goal of an item is about."""
        goal = self.goals[item.goal]
        if isinstance(goal, NetworkGoal):
            return goal.scope(item.layer)
        return goal_scope(goal, instead=depth_of_layer(item.layer) if self.model.decides else None)

    def clean_tokens(self, layer: str) -> Iterator[Float[Tensor, "n d"]]:
        """The clean tokens of every input of a layer that can be captured."""
        for index in range(len(self.sources)):
            try:
                yield self._capture(index, layer).measure.points.to(self.config.device)
            except AttnRobustError as error:
                log.warning("input %s of layer %s is left out: %s", self.sources[index].id, layer, error)

    def failed(self, item: WorkItem, status: Status, message: str) -> Row:
        """The row of an item that could not be computed."""
        source, goal = self.sources[item.source], self.goals[item.goal]
        return Row(
            source.id, item.layer, 0, item.threat, goal.key, goal_scope=self._scope(item), seed=self.config.seed,
            status=status, message=message, text=source.text, row_id=item.row_id,
        )  # fmt: skip

    def spec(self, layer: str) -> Attention:
        """The specification of a layer."""
        if layer not in self._specs:
            self._specs[layer] = self.model.layer(layer)
        return self._specs[layer]

    def _tokens_of(self, index: int) -> int:
        """The number of tokens of an input at the first layer or depth."""
        goal, place = self.goals[0], self.places[0]
        if isinstance(goal, NetworkGoal) and self.networks is not None:
            return self.networks.read(self.sources[index], place, goal).input.measure.n
        return self._capture(index, place).measure.n

    def _capture(self, index: int, layer: str) -> CapturedInput:
        source = self.sources[index]
        if isinstance(source, CapturedInput):
            return source
        key = (index, layer)
        if key not in self._captured:
            self._captured |= {(index, name): found for name, found in self._capture_all(source, layer).items()}
            while len(self._captured) > CAPTURES_KEPT * len(self.layers):
                self._captured.popitem(last=False)
        return self._captured[key]

    def _capture_image(self, image: Image, layer: str) -> dict[str, CapturedInput]:
        if not isinstance(self.model, ModuleModel):
            raise InputError(f"{self.model.name} holds weights only; give the layer's input tokens (--tokens)")
        pixels = {"pixel_values": image.pixels[None]}
        return {layer: self.model.capture_inputs(layer, pixels, input_id=image.id)}

    def _capture_all(self, line: TextLine | Image, layer: str) -> dict[str, CapturedInput]:
        """Every layer's tokens from one forward pass; where one of them fails, only those of the layer in question."""
        if isinstance(line, Image):
            return self._capture_image(line, layer)
        names = [info.name for info in self.layers]
        if isinstance(self.model, ModuleModel):
            try:
                return dict(zip(names, self.model.capture_layers(names, line), strict=True))
            except AttnRobustError:
                log.debug("input %s is captured layer by layer", line.id, exc_info=True)
        return {layer: self.model.capture(layer, [line])[0]}


def matching_layers(model: Model, pattern: str) -> tuple[LayerInfo, ...]:
    """The supported layers that a name, a unique suffix or a glob means.

    Args:
        model: The model.
        pattern: With ``*``, ``?`` or ``[`` it is a glob over full names; the unsupported ones are left out and logged.

    Raises:
        UnknownNameError: A glob without a supported layer.
        InputError: As ``Model.resolve``, for names.
    """
    if not any(c in pattern for c in "*?["):
        return (model.resolve(pattern),)
    matches = [layer for layer in model.layers() if fnmatch.fnmatchcase(layer.name, pattern)]
    for layer in matches:
        if not layer.supported:
            log.warning("layer %s is left out: %s", layer.name, layer.reason)
    supported = tuple(layer for layer in matches if layer.supported)
    if not supported:
        raise UnknownNameError("layer glob", pattern, [layer.name for layer in model.layers() if layer.supported])
    return supported


def depth_of_layer(layer: str) -> str:
    """The depth at which the tokens of an attention layer move in the whole model, by the number in its name."""
    numbers = [part for part in layer.split(".") if part.isdecimal()]
    return f"block:{numbers[0]}" if len(numbers) == 1 else "DEPTH"


def model_digest(model: Model) -> str:
    """SHA-256 of every weight of the model, since tokens are captured through all layers below."""
    if not isinstance(model, ModuleModel):
        return model.layer(None).digest
    state = model.module.state_dict()
    return _sha(";".join(f"{name}={tensor_digest(state[name])}" for name in sorted(state)))


def _row_id(content: str, repetition: int, layer: str, threat: str, goal: str) -> str:
    return _sha(f"{content};{repetition};{layer};{threat};{goal}")[:32]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fits(threat: Threat, n: int) -> bool:
    """Whether the tokens that a threat names exist in an input of n tokens."""
    try:
        threat.movable(n)
    except InputError:
        return False
    return True
