"""Rows of what a user has at hand in Python: models, texts, tokens and goals that are in no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnrobust.errors import InputError, one_line
from attnrobust.goals import Goal
from attnrobust.layers.attention import Attention
from attnrobust.models.capture import CapturedInput, TextLine, read_texts, read_tokens, text_line
from attnrobust.models.listing import LayerInfo, describe
from attnrobust.models.model import FILE_LAYER, Model, ModuleModel
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.sources import Image, Source, read_images
from attnrobust.runs.work import Workbench
from attnrobust.tokens import TokenMeasure, as_tensor

IN_MEMORY = "(in memory)"
"""Stands in a configuration for a file or a model that is none."""


class OneLayer(Model):
    """An attention layer that is at hand, as a model of one layer.

    Args:
        layer: The layer.
    """

    name = "layer"

    def __init__(self, layer: Attention) -> None:
        self._layer = layer

    def layers(self) -> tuple[LayerInfo, ...]:
        return (describe(FILE_LAYER, type(self._layer).__name__, self._layer),)

    def layer(self, name: str | None = None) -> Attention:
        self.resolve(name)
        return self._layer

    def capture(self, layer: str | None, texts: Sequence[TextLine | str]) -> tuple[CapturedInput, ...]:
        raise InputError("an attention layer has no tokenizer; give its input by tokens=")


class GivenBench(Workbench):
    """A workbench whose model, inputs and goals may be objects.

    Args:
        config: The configuration; where an object is given its place is taken.
        model: The model, or None: the configuration names it.
        sources: The inputs.
        goals: Goals by their place in the configuration, in place of those there.
    """

    def __init__(
        self, config: RunConfig, model: Model | None, sources: Sequence[Source], goals: Mapping[int, Goal]
    ) -> None:
        super().__init__(config)
        if model is not None:
            self.model = model
        self.sources = sources
        if goals:
            self.goals = tuple(goals.get(i) or one.make() for i, one in enumerate(config.goals))


@dataclass(frozen=True, eq=False)
class Asked:
    """What ``given_bench`` was asked for, before it is read; fields as the arguments of ``attnrobust.evaluate``."""

    model: object
    texts: object = None
    tokens: object = None
    images: object = None


def given_bench(asked: Asked, goals: Sequence[Any], values: Mapping[str, Any]) -> GivenBench:
    """The workbench of models, inputs and goals that are objects or names of files.

    Args:
        asked: The model and the inputs.
        goals: Goals, or what a configuration takes in their place.
        values: The rest of the configuration.

    Raises:
        InputError: What cannot be read, and what a configuration refuses.
    """
    model = given_model(asked.model)
    kind, sources = given_sources(asked)
    objects = {i: goal for i, goal in enumerate(goals) if isinstance(goal, Goal)}
    spelled = ["10%" if i in objects else goal for i, goal in enumerate(goals)]
    name = IN_MEMORY if model is not None else str(asked.model)
    config = make_config(dict(values) | {"model": name, kind: Path(IN_MEMORY), "goals": spelled})
    return GivenBench(config, model, sources, objects)


def given_model(model: object) -> Model | None:
    """The model where it is an object; None where it is a name or a file."""
    if isinstance(model, str | Path):
        return None
    if isinstance(model, Model):
        return model
    if isinstance(model, Attention):
        return OneLayer(model)
    if isinstance(model, nn.Module):
        return ModuleModel(model, name=type(model).__name__)
    raise InputError(
        f"the model is {one_line(model)}; give a name, a directory, load_model(...), a torch module or an Attention "
        "layer (other layers: compare(Problem(layer, tokens, threat, goal)))"
    )


def given_sources(asked: Asked) -> tuple[str, tuple[Source, ...]]:
    """The kind of the inputs and the inputs.

    Raises:
        InputError: None or several kinds, no input, or one that cannot be read.
    """
    readers = {"texts": _texts, "tokens": _tokens, "images": _images}
    there = [kind for kind in readers if getattr(asked, kind) is not None]
    if len(there) != 1:
        raise InputError("give the inputs by exactly one of texts=, tokens= and images=")
    sources = readers[there[0]](getattr(asked, there[0]))
    if not sources:
        raise InputError(f"{there[0]} is empty; give at least one input")
    return there[0], sources


def _texts(given: object) -> tuple[Source, ...]:
    if isinstance(given, Path):
        return read_texts(given)
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else None
    if texts is None or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"texts is {one_line(given)}; give a text, a list of texts, or a pathlib.Path of a file")
    return tuple(text_line(number, text) for number, text in enumerate(texts, start=1))


def _tokens(given: object) -> tuple[Source, ...]:
    if isinstance(given, str | Path):
        return read_tokens(given)
    named = _named("tokens", given, dimensions=2)
    return tuple(CapturedInput(name, None, (), _measure(name, one)) for name, one in named.items())


def _measure(name: str, given: object) -> TokenMeasure:
    if isinstance(given, TokenMeasure):
        return given
    points = as_tensor("tokens", given)
    if points.ndim != 2:
        raise InputError(f"the tokens of input {name} have shape {tuple(points.shape)}; give (tokens, width)")
    return TokenMeasure(points)


def _images(given: object) -> tuple[Source, ...]:
    if isinstance(given, str | Path):
        return read_images(Path(given))
    images = {name: as_tensor("images", one) for name, one in _named("images", given, dimensions=3).items()}
    for name, pixels in images.items():
        if pixels.ndim != 3 or not bool(torch.isfinite(pixels).all()):
            shape = tuple(pixels.shape)
            raise InputError(f"image {name} has shape {shape}; give finite (channels, height, width)")
    return tuple(Image(name, pixels.double()) for name, pixels in images.items())


def _named(what: str, given: object, *, dimensions: int) -> dict[str, Any]:
    """Inputs by name: those of a mapping, or numbered from 0001; an array with one dimension more is several."""
    if isinstance(given, Mapping):
        return {str(name): one for name, one in given.items()}
    if isinstance(given, TokenMeasure):
        return {"0001": given}
    first = given[0] if isinstance(given, list | tuple) and given else None
    if isinstance(given, list | tuple) and (isinstance(first, TokenMeasure) or getattr(first, "ndim", 0) == dimensions):
        several = list(given)
    else:
        whole = as_tensor(what, given)
        several = list(whole) if whole.ndim == dimensions + 1 else [whole]
    return {f"{number:04d}": one for number, one in enumerate(several, start=1)}
