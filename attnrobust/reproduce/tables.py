"""Rows of an experiment as CSV and Markdown, and its verdict as a page."""

import csv
import io
from collections.abc import Sequence

from attnrobust.reproduce.experiment import Experiment, Row, Setting, Size, Value, Verdict
from attnrobust.text import shown


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column, in the order of first use."""
    return list(dict.fromkeys(name for row in rows for name in row))


def csv_text(rows: Sequence[Row]) -> str:
    """All rows; an empty field is a number that does not exist."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def markdown_table(rows: Sequence[Row]) -> str:
    """All rows, numbers with four digits."""
    names = columns(rows)
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Value) -> str:
    if value is None or isinstance(value, float):
        return shown(value)
    return str(value).replace("|", "/")


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """What agrees, as a Markdown table."""
    return markdown_table(
        [
            {"statement": v.claim, "paper": v.paper, "measured": v.ours, "verdict": v.word, "why": v.reason}
            for v in verdicts
        ]
    )


def summary(
    experiment: Experiment, setting: Setting, verdicts: Sequence[Verdict], violations: Sequence[str], seconds: float
) -> str:
    """A page: the statement, the figure, and what agrees."""
    full = " --full" if setting.size is Size.FULL else ""
    sound = "Every bound is above everything that was found below it." if not violations else "\n".join(violations)
    if not experiment.sides:
        sound = "No bound is compared here."
    return f"""# {experiment.name}

{experiment.statement} ({experiment.paper})

    attnrobust reproduce {experiment.name}{full}

![figure](figure.png)

{verdict_table(verdicts)}
{sound} {shown(seconds, 2)} s of processor time, seed {setting.seed}.
"""
