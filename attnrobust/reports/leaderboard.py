"""Results of one protocol side by side: ranked over the same inputs, grouped otherwise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnrobust.errors import InputError
from attnrobust.runs.protocol_result import read_document
from attnrobust.text import rounded, shown_bound

if TYPE_CHECKING:
    from rich.table import Table

HEADING = ("rank", "model", "layer", "inputs", "median certified", "median attack", "median gap", "failed", "unsound")
CAPTION = (
    "Medians over all inputs, as shares of the norm of what moves (per-token, any-token: of the median token norm). "
    "Rank by the median certified share; a line with an unsound input has none. "
    "Digests show edits, not who wrote a file."
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One layer of one result. ``rank`` is None where an input is unsound; medians are None where infinite."""

    rank: int | None
    file: str
    model: str
    layer: str
    inputs: int
    median_certified: float
    median_attack: float | None
    median_gap: float | None
    failed: int
    unsound: int


@dataclass(frozen=True)
class Group:
    """Lines that compare: the same inputs, threat and goal."""

    inputs: str
    threat: str
    goal: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Leaderboard:
    """Groups of one protocol."""

    protocol: str
    version: int
    groups: tuple[Group, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Every ``.json`` file of a folder, each checked.

    Raises:
        InputError: No such folder, no file in it, or a file that ``read_document`` refuses.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory; name one with results of attnrobust bench --protocol")
    found = {path.name: read_document(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise InputError(f"{folder} has no .json file; write one by attnrobust bench --protocol standard --out")
    return found


def leaderboard(documents: Mapping[str, Mapping[str, Any]]) -> Leaderboard:
    """Rank results.

    Args:
        documents: By the name of the file.

    Raises:
        InputError: Results of several protocols or versions of one.
    """
    by_version: dict[tuple[str, int], str] = {}
    for file, document in documents.items():
        by_version.setdefault((document["protocol"]["name"], document["protocol"]["version"]), file)
    if len(by_version) > 1:
        told = ", ".join(f"{name} {version} ({file})" for (name, version), file in by_version.items())
        raise InputError(f"results of different protocols do not compare: {told}; keep one in the folder")
    ((name, version),) = by_version
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for file, document in documents.items():
        for entry in document["summary"]:
            key = (document["inputs"]["digest"], entry["threat"], entry["goal"])
            groups.setdefault(key, []).append(_line(file, document["model"]["name"], entry))
    return Leaderboard(name, version, tuple(Group(*key, _ranked(lines)) for key, lines in groups.items()))


def _line(file: str, model: str, entry: Mapping[str, Any]) -> Line:
    taken = ("layer", "inputs", "median_certified", "median_attack", "median_gap", "failed", "unsound")
    return Line(rank=None, file=file, model=model, **{name: entry[name] for name in taken})


def _ranked(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The largest certified share first; equal ones share a rank; unsound lines last and without one."""
    ordered = sorted(lines, key=lambda line: (line.unsound > 0, -line.median_certified, line.model, line.layer))
    better = {line.median_certified: 0 for line in lines}
    for value in better:
        better[value] = sum(line.median_certified > value for line in lines if not line.unsound)
    return tuple(
        Line(**(asdict(line) | {"rank": None if line.unsound else 1 + better[line.median_certified]}))
        for line in ordered
    )


def tables(board: Leaderboard) -> Iterator["Table"]:
    """One table a group, for the terminal."""
    from attnrobust.reports.layout import lay_out, numbers, words

    columns = [*numbers(HEADING[0]), *words(*HEADING[1:3]), *numbers(*HEADING[3:])]
    for group in board.groups:
        yield lay_out(columns, map(_cells, group.lines), title=_title(board, group), caption=CAPTION)


def page(board: Leaderboard, *, html: bool) -> str:
    """The tables as one page, HTML or Markdown."""
    title = f"Protocol {board.protocol}, version {board.version}"
    parts = [_html_table(board, g) if html else _markdown_table(board, g) for g in board.groups]
    if not html:
        return "\n\n".join([f"# {title}", CAPTION, *parts]) + "\n"
    style = "body{font:16px sans-serif;margin:2em}td,th{padding:.2em .6em;text-align:right}div{overflow-x:auto}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = f"<h1>{escape(title)}</h1><p>{escape(CAPTION)}</p>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>{body}</body></html>\n'


def _html_table(board: Leaderboard, group: Group) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in HEADING)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in _cells(line)) for line in group.lines]
    rows = "".join(f"<tr>{cells}</tr>" for cells in (heads, *lines))
    return f"<h2>{escape(_title(board, group))}</h2><div><table>{rows}</table></div>"


def _markdown_table(board: Leaderboard, group: Group) -> str:
    lines = [HEADING, ("---",) * len(HEADING), *map(_cells, group.lines)]
    rows = [" | ".join(escape(cell).replace("|", "\\|") for cell in cells) for cells in lines]
    return "\n".join([f"## {escape(_title(board, group))}", "", *(f"| {row} |" for row in rows)])


def _title(board: Leaderboard, group: Group) -> str:
    return f"{board.protocol} {board.version}: {group.threat}, {group.goal}, inputs {group.inputs[:12]}"


def _cells(line: Line) -> tuple[str, ...]:
    shares = (_percent(line.median_certified, up=False), _percent(line.median_attack, up=True))
    return (
        *("-" if line.rank is None else str(line.rank), line.model, line.layer, str(line.inputs), *shares),
        *(shown_bound(line.median_gap, up=True, digits=3), str(line.failed), str(line.unsound)),
    )


def _percent(value: float | None, *, up: bool) -> str:
    """A share rounded to the safe side."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{rounded(100 * value, up=up, digits=4):g} %" if value else "0 %"
