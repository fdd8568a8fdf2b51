"""What an attention module hands to transformers' attention interface, seen by an attention function of our own.

Nothing is imported: a module's file holds the table of attention functions, and the module's configuration names one.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import first_line
from attnrobust.models.adapters import CONV1D, LINEAR, class_path, refuse
from attnrobust.models.checks.agreement import call_in_float64, float64_twin

NAME = "attnrobust"
_TABLE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of the interface.

    Args:
        query: Queries (h, n, k), after positions.
        key: Keys (g, n, k), after positions; h / g heads one after the other share one.
        value: Values (g, n, v).
        scale: Factor on the scores.
        mask: What the module itself adds to the scores, (h or 1, n, n); None for nothing.
        extra: Every further argument by name, without those that are None or False.
        output: What the module put out for the payload.
    """

    query: Float[Tensor, "h n k"]
    key: Float[Tensor, "g n k"]
    value: Float[Tensor, "g n v"]
    scale: float
    mask: Tensor | None
    extra: Mapping[str, Any]
    output: Any


class Looker:
    """A module whose calls of the interface are looked at.

    Args:
        module: The attention module; it is not changed.
        part: The submodule whose output counts; "" for the module itself.
    """

    def __init__(self, module: nn.Module, part: str = "") -> None:
        self.module = module
        self._twin = float64_twin(module, implementation=NAME)
        self._linear = float64_twin(module, implementation=NAME)
        for owner in self._linear.modules():
            bias = owner._parameters.get("bias")  # noqa: SLF001 - the twin's own table
            if bias is not None and class_path(owner) in (LINEAR, CONV1D):
                owner._parameters = {**owner._parameters, "bias": nn.Parameter(torch.zeros_like(bias), False)}  # noqa: SLF001
        self._part = part

    def look(
        self,
        tokens: Float[Tensor, "n d"],
        arguments: Mapping[str, Any],
        *,
        payload: Float[Tensor, "n h v"] | None = None,
        without_biases: bool = False,
    ) -> Seen:
        """One call on tokens, with everything the interface is given.

        Args:
            tokens: The tokens.
            arguments: Further arguments of the module's forward.
            payload: What the interface returns; None means zeros.
            without_biases: Leave the biases of all linear maps out, so that a row of the identity gives a row of the
                weights to the last bit.

        Raises:
            UnsupportedModelError: The module does not call the interface exactly once.
        """
        twin = self._linear if without_biases else self._twin
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Any] = []

        def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            calls.append((args, kwargs))
            return _averages(kwargs, args, payload), None

        handle = twin.get_submodule(self._part).register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            with _registered(self.module, attend):
                call_in_float64(twin, (tokens[None],), arguments)
        except Exception as error:  # hooks and forwards may raise anything
            raise refuse(self.module, f"could not be called to read it: {first_line(error)}") from error
        finally:
            handle.remove()
        if len(calls) != 1 or len(outputs) != 1:
            raise refuse(self.module, f"hands queries and keys to the attention interface {len(calls)} times, not once")
        output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        return _seen(*calls[0], output)


_NAMES = ("module", "query", "key", "value", "attention_mask")


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def _averages(kwargs: Mapping[str, Any], args: tuple[Any, ...], payload: Tensor | None) -> Tensor:
    given = _named(args, kwargs)
    query: Tensor = given["query"]
    value: Tensor = given["value"]
    if payload is not None:
        return payload[None]
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _seen(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Seen:
    given = _named(args, kwargs)
    query = given["query"][0]
    scale, mask = given.get("scaling"), given.get("attention_mask")
    known = {*_NAMES, "scaling"}
    extra = {name: value for name, value in given.items() if name not in known and _is_there(value)}
    return Seen(
        query=query,
        key=given["key"][0],
        value=given["value"][0],
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        mask=None if mask is None else mask[0],
        extra=extra,
        output=output[0] if isinstance(output, Tensor) else output,
    )


def _is_there(value: Any) -> bool:
    return isinstance(value, Tensor) or (value is not None and value is not False and value != 0.0)


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's file has the table of attention functions."""
    return hasattr(sys.modules.get(type(module).__module__), _TABLE)


@contextmanager
def _registered(module: nn.Module, function: Any) -> Iterator[None]:
    table: Any = getattr(sys.modules[type(module).__module__], _TABLE)
    table[NAME] = function
    try:
        yield
    finally:
        del table[NAME]
