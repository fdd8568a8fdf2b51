"""Heads behind the last block: what they share over the families."""

from collections.abc import Callable
from typing import Any

from torch import nn

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.node import Node
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import PoolMean, PoolRow
from attnrobust.models.networks.parts import read_activation, read_affine, read_norm
from attnrobust.models.networks.plan import Head, Wanted

HeadReader = Callable[[nn.Module, int | None], Head]
"""Reads a model's own head, for one row where its output has one per token."""

SEQUENCE, TOKEN, IMAGE = "sequence classification", "token classification", "image classification"
MASKED, CAUSAL = "masked language model", "causal language model"
STATES, MEAN = "last hidden states", "mean of the last hidden states"

LOGITS, HIDDEN = "logits", "last_hidden_state"

CURE = "ask for hidden states: head='states' or head='mean'"
"""What a model without a head of its own, or with one that is not read, has all the same."""

Nodes = tuple[tuple[str, Node], ...]


def choose_head(model: nn.Module, wanted: Wanted, logits: HeadReader | None, *, base: str, attribute: str) -> Head:
    """The head that is asked for.

    Args:
        model: The model.
        wanted: Which.
        logits: The reader of the model's own head; None where it has none.
        base: Path of the module that gives the last hidden states.
        attribute: Their name in its output.

    Raises:
        InputError: The model has no head of its own; a row where the output has only one.
    """
    name = wanted.head or ("states" if logits is None else "logits")
    if name == "logits":
        if logits is None:
            raise InputError(f"{type(model).__name__} has no head of its own; {CURE}")
        return logits(model, wanted.row)
    if name == "mean":
        refuse_row(MEAN, wanted.row)
        return Head(MEAN, (("mean", PoolMean()),), base, attribute, "mean")
    if name != "states":
        raise UnknownNameError("head", str(name), ("logits", "states", "mean"))
    return Head(STATES, *picked(wanted.row, (), base, attribute))


def picked(row: int | None, nodes: Nodes, module: str, attribute: str) -> tuple[Nodes, str, str, Any]:
    """Nodes of an output with one row per token, at one row or at all."""
    before: Nodes = () if row is None else (("row", PoolRow(row)),)
    return (*before, *nodes), module, attribute, "all" if row is None else row


def refuse_row(kind: str, row: int | None) -> None:
    """Refuse a row for an output that has only one."""
    if row is not None:
        raise InputError(f"the output '{kind}' has one row; leave out row={row}")


def labels(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classes."""
    config: Any = model.config
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def classify_first(model: nn.Module, row: int | None, nodes: Nodes, kind: str = SEQUENCE) -> Head:
    """A classification head on the first token."""
    refuse_row(kind, row)
    return Head(kind, (("first", PoolRow(0)), *nodes), attribute=LOGITS, labels=labels(model))


def next_word(model: nn.Module, row: int | None) -> Head:
    """Scores of the word after a token, by default after the last one, by the linear map ``lm_head``."""
    row = -1 if row is None else row
    return Head(CAUSAL, *picked(row, affine(model, "lm_head"), "", LOGITS))


def classify_last(model: nn.Module, row: int | None) -> Head:
    """A linear map ``score`` of the last token; where the model takes another one (padding), the check refuses."""
    refuse_row(SEQUENCE, row)
    nodes = (("last", PoolRow(-1)), *affine(model, "score"))
    return Head(SEQUENCE, nodes, attribute=LOGITS, labels=labels(model))


def classify_tokens(model: nn.Module, row: int | None) -> Head:
    """A linear classifier ``classifier`` on every token."""
    return Head(TOKEN, *picked(row, affine(model, "classifier"), "", LOGITS), labels=labels(model))


def masked_words(row: int | None, nodes: Nodes) -> Head:
    """Scores of all words at one token; for all tokens there would be (n, vocabulary) of them."""
    if row is None:
        raise InputError(f"a {MASKED} scores words at one token; give row= (--row), the position of the masked one")
    return Head(MASKED, *picked(row, nodes, "", LOGITS))


def affine(model: nn.Module, path: str) -> Nodes:
    """A linear layer, named by its path."""
    return ((path, read_affine(model, path)),)


def activate(model: nn.Module, path: str) -> Nodes:
    """An activation, named by its path."""
    return ((path, Activate(read_activation(model, path))),)


def normalise(model: nn.Module, path: str) -> Nodes:
    """A normalisation, named by its path."""
    return ((path, Normalise(read_norm(model, path))),)
