"""Run one experiment: its parts, its checks, its files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attnrobust.errors import SoundnessError
from attnrobust.reports.curves import curve_figure
from attnrobust.reproduce.experiment import Experiment, Row, Setting, Verdict, number
from attnrobust.reproduce.store import FORMAT, ExperimentStore, job_digest, part_digest
from attnrobust.reproduce.tables import csv_text, markdown_table, summary
from attnrobust.runs.storage.files import MANIFEST, json_text, versions

CSV, TABLE, SUMMARY = "table.csv", "table.md", "summary.md"
MOST_SHOWN = 3
"""Violations in the message of an unsound experiment."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment gave.

    Args:
        rows: The table.
        verdicts: What agrees with the paper.
        violations: Rows in which a lower bound is above an upper bound; empty where all is sound.
        seconds: Processor time of all parts, also those that were computed earlier.
        directory: Where the files are.
    """

    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    violations: tuple[str, ...]
    seconds: float
    directory: Path

    def require_sound(self) -> None:
        """Refuse an outcome in which a bound is violated.

        Raises:
            SoundnessError: Which one.
        """
        if self.violations:
            raise SoundnessError("; ".join(self.violations[:MOST_SHOWN]))


def run_experiment(
    experiment: Experiment,
    directory: Path,
    *,
    setting: Setting,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Compute what is missing, and write table, figure, summary and manifest.

    Args:
        experiment: What is computed.
        directory: Where; parts that are finished there are not computed again.
        setting: Size and seed.
        overwrite: Whether results of another configuration may be replaced.
        tell: Takes one line for each part.

    Returns:
        The outcome; whoever calls decides about its violations, all files are written.

    Raises:
        InputError: The directory cannot be written, or holds results of another configuration.
    """
    parts = experiment.parts(setting)
    job = job_digest(experiment, setting, parts)
    store = ExperimentStore(directory, job, overwrite=overwrite)
    rows: list[Row] = []
    times: dict[str, float] = {}
    for place, part in enumerate(parts, start=1):
        digest = part_digest(experiment, setting, part)
        there = store.rows(part, digest)
        tell(f"{experiment.name}: part {place} of {len(parts)}, {part.name}{' (finished earlier)' * bool(there)}")
        if there is None:
            start = time.process_time()
            made = part.compute()
            there = made, time.process_time() - start
            store.keep(part, digest, *there)
        rows += there[0]
        times[part.name] = there[1]
    violations = tuple(_violations(experiment, rows))
    verdicts = tuple(experiment.verdicts(rows))
    seconds = sum(times.values())
    manifest = {
        "format": FORMAT,
        "job": job,
        "experiment": experiment.name,
        "experiment_version": experiment.version,
        "paper": experiment.paper,
        "size": str(setting.size),
        "seed": setting.seed,
        "config": {part.name: dict(part.config) for part in parts},
        "seconds": {name: round(value, 3) for name, value in times.items()},
        "versions": versions(),
        "verdicts": [asdict(verdict) | {"verdict": verdict.word} for verdict in verdicts],
        "violations": list(violations),
    }
    figures = curve_figure(experiment.panels(rows), title=f"{experiment.name}: {experiment.statement}")
    texts = {
        CSV: csv_text(rows),
        TABLE: markdown_table(rows),
        SUMMARY: summary(experiment, setting, verdicts, violations, seconds),
        MANIFEST: json_text(manifest, indent=1) + "\n",
    }
    pictures = {f"figure.{kind}": content for kind, content in figures.items()}
    store.write(pictures | {name: text.encode() for name, text in texts.items()})
    return Outcome(tuple(rows), verdicts, violations, seconds, directory)


def _violations(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Every lower bound that is above its upper bound; no tolerance, since both are rounded outwards."""
    found = []
    for row in rows:
        for low, high in experiment.sides:
            below, above = number(row, low), number(row, high)
            if below > above:  # false where one of the two does not exist
                about = ", ".join(f"{name} {value}" for name, value in row.items() if isinstance(value, str | int))
                found.append(f"UNSOUND {experiment.name} ({about}): {low} {below!r} is above {high} {above!r}")
    return found
