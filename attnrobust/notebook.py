"""How results show themselves in a notebook and as plain values; no library is needed for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError
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

    def to_pandas(self) -> Any:
        """A pandas DataFrame of ``records``; a missing number is NaN, or None in a column without any.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``to_pandas``: here one, the plain values without lists and mappings."""
        return [{name: value for name, value in self.to_dict().items() if not isinstance(value, list | dict)}]

    def _repr_html_(self) -> str:
        """A table for a notebook; lists of records are tables of their own."""
        values = self.to_dict()
        own = {name: value for name, value in values.items() if _short(value)}
        parts = [html_table([own])] if own else []
        parts += [f"<p>{escape(n)}</p>{html_table(v)}" for n, v in values.items() if isinstance(v, list) and v]
        return "".join(parts)


@dataclass(frozen=True, repr=False)
class Picture:
    """A drawn picture: a notebook shows it, ``save`` writes it.

    Args:
        png: The bytes of a PNG.
        title: What it shows, in one line.
    """

    png: bytes
    title: str

    def save(self, path: str | Path) -> Path:
        """Write the picture to a ``.png`` file; returns its path."""
        target = Path(path).expanduser()
        if target.suffix.lower() != ".png":
            raise InputError(f"{target}: the picture is a PNG; give a name that ends in .png")
        target.write_bytes(self.png)
        return target

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"<Picture: {self.title}, {len(self.png)} bytes of PNG>"


def data_frame(records: Sequence[Values]) -> Any:
    """A pandas DataFrame with one line a record.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise InputError("pandas is not installed; pip install pandas, or use to_dict()") from error
    return pd.DataFrame(list(records))


def number(value: float | None) -> float | None:
    """A number for JSON: None where it is not finite."""
    return None if value is None or not math.isfinite(value) else value


def _short(value: object) -> bool:
    return value is not None and not isinstance(value, list | dict)


def _told(value: object) -> str:
    return shown(value) if isinstance(value, float) else str(value)


def html_table(lines: Sequence[Values]) -> str:
    """An HTML table, its text escaped."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_told(line.get(name, '')))}</td>" for name in names) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
