"""How results show themselves in a notebook and as plain values; no library is needed for it."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from attnrobust.text import shown

Values = Mapping[str, Any]


class Shown:
    """A record with ``to_dict``; its summary, its short ``repr`` and its table in a notebook follow from that."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON: None where a number is not finite, no tensors."""
        raise NotImplementedError

    def summary(self) -> str:
        """The record in one line."""
        told = ", ".join(f"{name} {_told(value)}" for name, value in self.to_dict().items() if _short(value))
        return f"{type(self).__name__}: {told}"

    def _repr_html_(self) -> str:
        """A table for a notebook; lists of records are tables of their own."""
        values = self.to_dict()
        own = {name: value for name, value in values.items() if _short(value)}
        parts = [_table([own])] if own else []
        parts += [f"<p>{escape(n)}</p>{_table(v)}" for n, v in values.items() if isinstance(v, list) and v]
        return "".join(parts)


def number(value: float | None) -> float | None:
    """A number for JSON: None where it is not finite."""
    return None if value is None or not math.isfinite(value) else value


def _short(value: object) -> bool:
    return value is not None and not isinstance(value, list | dict)


def _told(value: object) -> str:
    return shown(value) if isinstance(value, float) else str(value)


def _table(lines: list[Values]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_told(line.get(name, '')))}</td>" for name in names) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
