"""Many inputs from Python, as the command line asks about them: rows that show, tabulate and draw themselves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError, one_line
from attnrobust.figure import png
from attnrobust.notebook import Picture, Shown, html_table
from attnrobust.reports.data import read_report_data
from attnrobust.reports.plots import curve_plot, gap_plot
from attnrobust.reports.units import run_verdicts
from attnrobust.runs.given import Asked, given_bench
from attnrobust.runs.reading import DEFAULT_ATTACK, DEFAULT_TOLERANCE
from attnrobust.runs.rows import LISTS, Row
from attnrobust.runs.run import rows_in_memory
from attnrobust.status import Status
from attnrobust.text import shown_bound
from attnrobust.threats.base import Threat

SHOWN_ROWS = 20
"""Rows in the table of a notebook; more are counted."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Shown):
    """Rows: every input on every layer or depth, threat and goal; see ``attnrobust.runs.rows.Row``.

    ``certified radius <= robust radius <= attack radius`` holds in each row whose status is not ``unsound``.

    Args:
        rows: The rows.
        title: What was asked.
    """

    rows: tuple[Row, ...]
    title: str

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def unsound(self) -> tuple[Row, ...]:
        """Rows whose verified attack lies inside a certified radius: one of the two is wrong; please report them."""
        return tuple(row for row in self.rows if row.status == Status.UNSOUND)

    def select(self, *, layer: str | None = None, threat: str | None = None, goal: str | None = None) -> "Evaluation":
        """The rows of one layer (or depth), threat or goal, by the names that they have there.

        Raises:
            InputError: No such row.
        """
        wanted = {name: value for name, value in (("layer", layer), ("threat", threat), ("goal", goal)) if value}
        rows = tuple(row for row in self.rows if all(getattr(row, n) == value for n, value in wanted.items()))
        if not rows:
            there = {name: sorted({getattr(row, name) for row in self.rows}) for name in wanted}
            raise InputError(f"no row has {wanted}; there are {there}")
        return Evaluation(rows, self.title)

    def summary(self) -> str:
        """How the rows ended, and one sentence for each layer, threat and goal."""
        statuses = list(dict.fromkeys(str(row.status) for row in self.rows))
        ended = ", ".join(f"{sum(row.status == s for row in self.rows)} {s}" for s in statuses)
        return "\n".join([f"{self.title}: {len(self.rows)} rows, {ended}", *run_verdicts(self.rows)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON; rows as ``--json`` prints them."""
        return {"title": self.title, "rows": [row.as_dict() for row in self.rows]}

    def records(self) -> list[dict[str, Any]]:
        """One line a row: its plain fields, then the radius of every certificate as ``certified:NAME``."""
        return [
            {name: value for name, value in row.as_dict().items() if name not in _NESTED}
            | {f"certified:{name}": entry.radius for name, entry in row.certificates.items()}
            for row in self.rows
        ]

    def plot(self, kind: str = "gap") -> Picture:
        """Draw the rows of one threat and goal.

        Args:
            kind: "gap", both radii of every input; or "curve", the share of inputs certified and broken at each size.

        Raises:
            InputError: Several threats or goals, whose radii have no common axis; or another kind.
        """
        keys = list(dict.fromkeys((row.threat, row.goal) for row in self.rows))
        if len(keys) > 1:
            raise InputError(
                f"radii of {len(keys)} threats and goals have no common axis; select(threat=..., goal=...)"
            )
        if kind == "gap":
            return Picture(gap_plot(self.rows, title=self.title), self.title)
        if kind == "curve":
            return Picture(png(*curve_plot(self.rows)), f"{self.title}, by size")
        raise InputError(f"kind is {one_line(kind)}; give 'gap' or 'curve'")

    def __repr__(self) -> str:
        """One line."""
        return f"<Evaluation: {self.summary().splitlines()[0]}>"

    def _repr_html_(self) -> str:
        """The verdicts and a table for a notebook; certified radii are rounded down, attack radii and gaps up."""
        lines = "".join(f"<p>{escape(line)}</p>" for line in self.summary().splitlines())
        more = len(self.rows) - SHOWN_ROWS
        rest = f"<p>{more} more rows: to_pandas() has all</p>" if more > 0 else ""
        return lines + html_table([_shown(row) for row in self.rows[:SHOWN_ROWS]]) + rest


_NESTED = frozenset({"certificates", "skipped", *LISTS})


def evaluate(
    model: object,
    *,
    texts: object = None,
    tokens: object = None,
    images: object = None,
    layer: str | Sequence[str] | None = None,
    at: str | Sequence[str] | None = None,
    threat: str | Threat | Sequence[str | Threat] = "frobenius",
    goal: Any = DEFAULT_TOLERANCE,
    certificates: str | Sequence[str] | None = None,
    attack: str | None = DEFAULT_ATTACK,
    restarts: int = 8,
    steps: int = 60,
    token_radii: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Evaluation:
    """Certify and attack many inputs, in memory; what ``attnrobust compare`` does, and with the same numbers.

    Args:
        model: What the command line takes (a name, a directory, a file), ``load_model(...)``, a torch module, or an
            ``Attention`` layer.
        texts: A text, a list of texts, or a ``pathlib.Path`` of a file with one a line.
        tokens: Tokens (n, d) of a layer, several of them as a list, as one array (inputs, n, d) or as a mapping from
            their names: numpy arrays, tensors, ``TokenMeasure``, nested lists; or a file.
        images: Images (channels, height, width) as the model's processor gives them; several as for tokens; or a file.
        layer: Names, unique suffixes or globs of layers; None means the only one.
        at: Depths of the whole model; then every goal is one of the whole model.
        threat: Threats or their spellings.
        goal: Goals or what a run configuration takes: "10%", "decision", {"goal": "hidden", "tolerance": "5%"}.
        certificates: Names; None means those that can win, "all" every one that applies, () none.
        attack: Its name; None means none.
        restarts: As in ``AttackBudget``.
        steps: As in ``AttackBudget``.
        token_radii: Also attack every token alone.
        seed: Seed of the run.
        device: Where a model that is loaded by its name goes.

    Returns:
        One row an input, layer or depth, threat and goal. A row that failed says so in its status and message; an
        ``unsound`` one is among ``unsound``.

    Raises:
        InputError: What the command line would refuse before the first row.
    """
    goals = list(goal) if isinstance(goal, list | tuple) else [goal]
    threats = list(threat) if isinstance(threat, list | tuple) else [threat]
    values = {
        "layers": layer, "at": at, "threats": [one.key if isinstance(one, Threat) else one for one in threats],
        "certificates": certificates, "seed": seed, "device": device,
        "attack": {"method": attack, "restarts": restarts, "steps": steps, "token_radii": token_radii},
    }  # fmt: skip
    bench = given_bench(Asked(model, texts=texts, tokens=tokens, images=images), goals, values)
    bench.refuse_hopeless()
    rows = tuple(rows_in_memory(bench))
    return Evaluation(rows, f"{bench.model.name}, {', '.join(bench.places)}")


def read_results(directory: str | Path) -> Evaluation:
    """The rows of a run's directory, or of what ``compare --out`` wrote.

    Raises:
        InputError: Neither is there, or the files are damaged.
    """
    data = read_report_data(Path(directory).expanduser())
    return Evaluation(tuple(data.rows), data.title)


def _shown(row: Row) -> Mapping[str, Any]:
    return {
        "input": row.input_id, "layer": row.layer, "threat": row.threat, "goal": row.goal,
        "certified": shown_bound(row.certified_radius, up=False), "certificate": row.certificate or "-",
        "attacked": shown_bound(row.attack_radius, up=True), "gap": shown_bound(row.gap, up=True),
        "status": str(row.status),
    }  # fmt: skip
