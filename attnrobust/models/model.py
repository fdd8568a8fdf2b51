"""Models by name: which layers they have, a layer's specification, and a layer's inputs."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from attnrobust.errors import InputError, UnknownNameError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.models.arrays import SUFFIXES
from attnrobust.models.capture import CapturedInput, Tap, TextLine, capture_taps, text_line
from attnrobust.models.checks.forward_inputs import Given, forward_arguments
from attnrobust.models.from_file import from_file
from attnrobust.models.listing import LayerInfo, adapter_for, describe, find_layer, list_layers
from attnrobust.models.networks.confirmation import OwnModel
from attnrobust.models.networks.plan import EMBEDDINGS, Head, HeadName, Plan, Wanted
from attnrobust.models.networks.reading import ReadNetwork, plan_of, read_at, readable_classes, refuse_unread
from attnrobust.models.own_attention import exact_positions
from attnrobust.models.pictures import ImageEncoder
from attnrobust.models.pretrained import (
    Pretrained,
    TextEncoder,
    eager_experts,
    load_image_processor,
    load_pretrained,
    longest_input,
)
from attnrobust.models.word_distance import embedding_table, word_distance
from attnrobust.tokens import TokenMeasure

FILE_LAYER = "attention"
"""The name of the one layer of a weights file."""


def split_call(name: str | None) -> tuple[str | None, int | None]:
    """A layer's name and the number of one of its calls, as in ``encoder.attention#3``; None without."""
    base, mark, call = (name or "").rpartition("#")
    return (base, int(call)) if mark and call.isdecimal() else (name, None)


class Model(ABC):
    """A named source of attention layers."""

    name: str

    @abstractmethod
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every attention layer, the unsupported ones with the reason."""

    @abstractmethod
    def layer(self, name: str | None = None) -> Attention:
        """The specification of a layer; ``name`` as in ``resolve``."""

    @abstractmethod
    def capture(self, layer: str | None, texts: Sequence[TextLine | str]) -> tuple[CapturedInput, ...]:
        """The layer's input tokens for each text, from the model's own forward pass."""

    def network(
        self,
        given: TextLine | str | Mapping[str, Given],
        *,
        at: str = EMBEDDINGS,
        head: HeadName | None = None,
        row: int | None = None,
        input_id: str = "0001",
    ) -> ReadNetwork:
        """The whole model from a depth on, with the clean tokens there, checked at this input; see ``ModuleModel``."""
        raise InputError(f"{self.name} holds one attention layer, no network; give a model")

    def depths(self) -> tuple[str, ...]:
        """The depths at which tokens of the whole model may move, from the input on; see ``network``."""
        raise InputError(f"{self.name} holds one attention layer, no network; give a model")

    @property
    def decides(self) -> bool:
        """Whether the model was made with a head that is read, so that it has a decision of its own."""
        return False

    def resolve(self, name: str | None = None) -> LayerInfo:
        """The supported layer that a full name or a unique suffix means (None: the only one).

        A layer that its model calls several times is named with the number of a call: ``encoder.attention#3``.

        Raises:
            UnknownNameError: No such layer; names the nearest.
            InputError: An ambiguous suffix; lists the candidates.
            UnsupportedModelError: The layer has no exact specification; gives the reason.
        """
        base, call = split_call(name)
        found = find_layer(self.layers(), base)
        return found if call is None else replace(found, name=f"{found.name}#{call}")


class WeightsFile(Model):
    """The one attention layer of a ``.safetensors`` or ``.npz`` file.

    Args:
        path: The file; see ``from_file``.
        device: Where the weights go.
    """

    def __init__(self, path: str | Path, *, device: str | torch.device = "cpu") -> None:
        self.name = str(path)
        self._spec = from_file(path).to(device)

    def layers(self) -> tuple[LayerInfo, ...]:
        ending = "heads concatenated" if self._spec.w_o is None else "with W_O"
        return (describe(FILE_LAYER, f"weights file, {ending}", self._spec),)

    def layer(self, name: str | None = None) -> Attention:
        self.resolve(name)
        return self._spec

    def capture(self, layer: str | None, texts: Sequence[TextLine | str]) -> tuple[CapturedInput, ...]:
        raise InputError(f"{self.name} holds weights only, no tokenizer; give the layer's input tokens (--tokens)")


class ModuleModel(Model):
    """A torch module in float64 and eval mode.

    Args:
        module: Any module; it is copied unless ``owned``, so its mode, dtype and ``requires_grad`` stay as they are.
        name: How to call it.
        pretrained: Where its tokenizer is; None if it has none.
        owned: The module may be converted in place.
    """

    def __init__(
        self, module: nn.Module, *, name: str = "model", pretrained: Pretrained | None = None, owned: bool = False
    ) -> None:
        self.name = name
        self._given_precision = _precision(module)
        own = module if owned else _own_copy(module)
        self.module = _exact(own.to(torch.float64).eval().requires_grad_(False))
        self._pretrained = pretrained
        self._taps: dict[str, Tap] = {}  # the module does not change, so neither do its specifications
        self._plans: dict[Wanted, Plan] = {}

    def layers(self) -> tuple[LayerInfo, ...]:
        return self._layers

    @cached_property
    def _layers(self) -> tuple[LayerInfo, ...]:
        unread = self._pretrained.unread if self._pretrained is not None else ()
        return tuple(_refused_if_unread(info, unread) for info in list_layers(self.module))

    @cached_property
    def _encoder(self) -> TextEncoder:
        if self._pretrained is None:
            raise InputError(f"{self.name} has no tokenizer; give the layer's input tokens (--tokens)")
        return TextEncoder(self._pretrained)

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """The model's own image processor.

        Raises:
            InputError: It has none, or Pillow is missing.
        """
        if self._pretrained is None:
            raise InputError(f"{self.name} has no image processor; give arrays of pixel_values (--images FILE.npz)")
        return ImageEncoder(load_image_processor(self._pretrained), self.name)

    def layer(self, name: str | None = None) -> Attention:
        return self._tap(self.resolve(name)).spec

    def _tap(self, info: LayerInfo) -> Tap:
        if info.name not in self._taps:
            name, call = split_call(info.name)
            module = self.module.get_submodule(name or "")
            adapter = adapter_for(module, self.module)
            assert adapter is not None  # noqa: S101 - resolve returns supported layers only
            self._taps[info.name] = Tap(module, adapter, adapter.spec(module), call)
        return self._taps[info.name]

    def capture(self, layer: str | None, texts: Sequence[TextLine | str]) -> tuple[CapturedInput, ...]:
        """The layer's input tokens for each text by itself (no padding), from the model's own float64 forward pass.

        Raises:
            InputError: No tokenizer, a text without tokens, or one longer than the model's positions.
            UnsupportedModelError: The layer's output inside the model is not what its specification gives.
        """
        lines = [t if isinstance(t, TextLine) else text_line(i, t) for i, t in enumerate(texts, start=1)]
        return tuple(self.capture_layers([layer], line)[0] for line in lines)

    def capture_layers(self, layers: Sequence[str | None], line: TextLine) -> tuple[CapturedInput, ...]:
        """The input tokens of several layers for one text, from one forward pass; otherwise as ``capture``."""
        infos = [self.resolve(layer) for layer in layers]
        inputs, strings = self._encoded(line)
        return self._captured(infos, inputs, line, strings)

    def _encoded(self, line: TextLine) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Arguments of a forward call on one text, and what each token stands for."""
        encoded = self._encoder.encode(line.text)
        longest = longest_input(self.module)
        if not encoded.ids:
            raise InputError(f"text {line.id} gives no tokens: {line.text[:60]!r}")
        if longest is not None and len(encoded.ids) > longest:
            raise InputError(
                f"text {line.id} has {len(encoded.ids)} tokens, the model takes {longest} at most; split it"
            )
        ids = torch.tensor([encoded.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs, encoded.strings

    def word_distance(self, line: TextLine) -> float | None:
        """How far the nearest other word is from a text's tokens (``word_distance``); None without a table of words."""
        table = embedding_table(self.module)
        if table is None:
            return None
        ids = self._encoder.encode(line.text).ids
        return word_distance(table, ids, without=self._encoder.special) if max(ids, default=0) < len(table) else None

    def capture_inputs(
        self, layer: str | None, model_inputs: Mapping[str, Given], *, input_id: str = "0001"
    ) -> CapturedInput:
        """The layer's input tokens for any one input of the model, such as ``{"pixel_values": (1, 3, 224, 224)}``.

        Args:
            layer: As in ``resolve``.
            model_inputs: Keyword arguments of one forward call, batch size 1: tensors, numpy arrays or lists of numbers
                (floating-point ones are taken in float64), options, or mappings of these.
            input_id: The identifier of the input.
        """
        return self._captured([self.resolve(layer)], model_inputs, TextLine(input_id, ""), None)[0]

    def network(
        self,
        given: TextLine | str | Mapping[str, Given],
        *,
        at: str = EMBEDDINGS,
        head: HeadName | None = None,
        row: int | None = None,
        input_id: str = "0001",
    ) -> ReadNetwork:
        """The whole model from a depth on, with the clean tokens there.

        The graph's output and every hidden state on the way are compared with the model's own at this input.

        Args:
            given: A text, or keyword arguments of one forward call as in ``capture_inputs``.
            at: The depth at which tokens move: "embeddings" (what enters block 0) or "block:K" (what enters block K).
            head: "logits" (the model's own head), "states" (last hidden states) or "mean" (their mean); None means its
                own head where it has one, else the states.
            row: The token whose output it is, where there is one per token; None means all (causal models: the last).
            input_id: The identifier of an input that is no text.

        Raises:
            UnsupportedModelError: The model, or a part of it by name, is not modelled; or the states disagree.
            InputError: No tokenizer, an input that does not fit, a head or depth that does not exist.
        """
        plan = self._plan(Wanted(head, row))
        if isinstance(given, Mapping):
            line, strings = TextLine(input_id, ""), None
            inputs = forward_arguments(given, next(self.module.parameters()).device)
        else:
            line = text_line(1, given) if isinstance(given, str) else given
            inputs, strings = self._encoded(line)
        try:
            graph, tokens, info = read_at(self.module, plan, inputs, at=at)
        except UnknownNameError:
            raise
        except InputError as error:
            raise type(error)(f"input {line.id}: {error}") from error
        own = OwnModel(self.module, plan, inputs, self._given_precision)
        return ReadNetwork(graph, _captured_input(line, strings, tokens), info, own)

    def depths(self) -> tuple[str, ...]:
        return self._plan(Wanted("states")).depths

    @property
    def decides(self) -> bool:
        config = getattr(self.module, "config", None)
        names = {type(self.module).__name__, *(getattr(config, "architectures", None) or ())}
        return any("For" in name or "LMHead" in name for name in names & readable_classes())

    def head(self, head: HeadName | None = None, *, row: int | None = None) -> Head:
        """What ``network`` would take as the output; refuses one that the model does not have, before any input."""
        return self._plan(Wanted(head, row)).head

    def word(self, index: int) -> str:
        """What one entry of the vocabulary stands for, for language models."""
        return self._encoder.word(index)

    def _plan(self, wanted: Wanted) -> Plan:
        if wanted not in self._plans:
            plan = plan_of(self.module, wanted)
            refuse_unread(plan, self._pretrained.unread if self._pretrained is not None else ())
            self._plans[wanted] = plan
        return self._plans[wanted]

    def _captured(
        self,
        infos: Sequence[LayerInfo],
        model_inputs: Mapping[str, Given],
        line: TextLine,
        strings: tuple[str, ...] | None,
    ) -> tuple[CapturedInput, ...]:
        taps = [self._tap(info) for info in infos]
        try:
            moved = forward_arguments(model_inputs, taps[0].spec.device)
            found = capture_taps(self.module, taps, moved)
        except InputError as error:
            names = ", ".join(info.name for info in infos)
            raise type(error)(f"input {line.id}, layer {names}: {error}") from error
        return tuple(_captured_input(line, strings, tokens) for tokens in found)


def _captured_input(line: TextLine, strings: tuple[str, ...] | None, tokens: Tensor) -> CapturedInput:
    text = None if strings is None else line.text
    return CapturedInput(id=line.id, text=text, token_strings=strings or (), measure=TokenMeasure(tokens))


def load_model(name: str | Path, *, device: str | torch.device = "cpu", head: bool = False) -> Model:
    """Load a model by name.

    Args:
        name: ``minilm`` (all-MiniLM-L6-v2, extra ``demo``), a Hugging Face directory or hub name (``AutoModel``, no
            remote code), or a ``.safetensors``/``.npz`` file of bare attention weights.
        device: Where the weights go.
        head: Load the model with the head that its configuration names; names of layers then begin with the base model.

    Returns:
        The model in float64: ``layers()`` lists, ``layer(name)`` specifies, ``capture(name, texts)`` gives inputs.

    Raises:
        InputError: Nothing of that name can be loaded; says why and what to give instead.
        UnsupportedModelError: A head that is not read.
    """
    if torch.device(device).type == "meta":
        raise InputError("device 'meta' holds shapes without values; give cpu, or cuda where there is a GPU")
    if Path(name).suffix in SUFFIXES and not Path(name).is_dir():
        return WeightsFile(name, device=device)
    pretrained = load_pretrained(str(name), classes=readable_classes() if head else None)
    module = pretrained.module.to(device)
    return ModuleModel(module, name=str(name), pretrained=pretrained, owned=True)


def _own_copy(module: nn.Module) -> nn.Module:
    """A deep copy; weights that hooks compute before each call (pruning, old weight norm) are copied as they are."""
    computed = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
    try:
        return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # parts of other libraries may raise anything
        raise InputError(
            f"{type(module).__name__} cannot be copied ({first_line(error)}); remove what holds results of earlier "
            "calls, or save the model and give its directory"
        ) from error


def _precision(module: nn.Module) -> str:
    """The precisions of a module's weights, such as "float32"."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()})
    return ", ".join(kinds) or "no weights"


def _exact(module: nn.Module) -> nn.Module:
    """Choose, among implementations of the same function, those that run in float64 and show what a layer takes."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # nested tensors leave the padded tokens out before attention sees them
        if callable(getattr(part, "set_experts_implementation", None)):
            eager_experts(part)
        if type(part).__name__ == "GPTJAttention":
            exact_positions(part)
    return module


def _refused_if_unread(info: LayerInfo, unread: Sequence[str]) -> LayerInfo:
    """A checkpoint weight inside an attention layer that the model has no place for means another computation."""
    inside = [key for key in unread if f".{info.name}." in f".{key}" and not key.endswith("masked_bias")]
    if not info.supported or not inside:
        return info
    reason = f"its checkpoint has weights that the model does not use: {', '.join(inside[:4])}"
    return LayerInfo(name=info.name, kind=info.kind, supported=False, reason=reason)
