"""Which parts of a layer's formula are in use: what methods must know of, or refuse the layer."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields

from torch import Tensor

PLAIN = ""
"""The feature name of fields that every layer of the class has: they are its formula."""


def used_features(layer: object, names: Mapping[str, str]) -> frozenset[str]:
    """The features of a layer: names of the optional parts of its formula that are there.

    A field that ``names`` does not know (of a subclass, or added later) is a feature of its own name wherever it is
    there, so that every method that does not declare it refuses the layer.

    Args:
        layer: A dataclass.
        names: The feature of each field; ``PLAIN`` for none.
    """
    there = {names.get(field.name, field.name) for field in fields(layer) if _is_there(layer, field)}  # type: ignore[arg-type]
    return frozenset(there - {PLAIN})


def features_of(layer: object) -> frozenset[str]:
    """The features that a layer states; one that states none has a feature of its class's name, which nothing knows."""
    stated = getattr(layer, "features", None)
    return stated if isinstance(stated, frozenset) else frozenset({type(layer).__name__})


def _is_there(layer: object, field: "Field[object]") -> bool:
    value = getattr(layer, field.name)
    if value is None or value is False:
        return False
    if isinstance(value, Tensor) or field.default is MISSING:
        return True
    # 0 or an empty text as the default says "not there"; another default is part of the formula
    return bool(field.default) or bool(value != field.default)
