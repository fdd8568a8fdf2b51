"""Rows of a run in an experiment tracker: MLflow, Weights & Biases, TensorBoard."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.runs.rows import Row, median
from attnrobust.runs.storage.export import jsonl_text
from attnrobust.runs.storage.store import RunStore

PROJECT = "attnrobust"
ROWS = "rows.jsonl"
TENSORBOARD = "tensorboard"
"""Folder in the run's directory."""


@dataclass(frozen=True)
class Record:
    """What a tracker is told of a run.

    Args:
        name: The directory's name.
        parameters: The configuration, and the digest of what the run is.
        metrics: Per layer, threat and goal: medians, the smallest certified and the largest gap, and how rows ended.
        rows: Every row, as JSON lines.
        directory: Where the run is.
    """

    name: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    rows: str
    directory: Path


def log_run(directory: Path, tracker: str) -> None:
    """Tell a tracker about the finished rows of a run.

    Where the tracker is, is the tracker's own setting (``MLFLOW_TRACKING_URI``, ``WANDB_MODE``); TensorBoard's files go
    into the run's directory.

    Args:
        directory: The run's output directory.
        tracker: ``mlflow``, ``wandb`` or ``tensorboard``.

    Raises:
        InputError: An unknown tracker, one whose package is missing, or no run.
    """
    require_tracker(tracker)
    store = RunStore.open(directory)
    rows = store.rows()
    config = {key: str(value) for key, value in store.manifest.config.items() if value is not None}
    record = Record(
        name=directory.resolve().name,
        parameters={**config, "run": store.manifest.digest},
        metrics=metrics(rows),
        rows=jsonl_text(rows),
        directory=directory,
    )
    TRACKERS[tracker](record)


def require_tracker(tracker: str) -> None:
    """Refuse a tracker that does not exist or is not installed.

    Raises:
        InputError: See ``log_run``.
    """
    if tracker not in TRACKERS:
        raise UnknownNameError("tracker", tracker, TRACKERS)
    if tracker not in sys.modules and find_spec(tracker) is None:
        raise InputError(f"--log-to {tracker} needs the package {tracker}; pip install {tracker}")


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Figures of every layer, threat and goal, which are never pooled; only finite ones."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("/".join(map(_plain, (row.layer, row.threat, row.goal))), []).append(row)
    found: dict[str, float | None] = {}
    for place, group in groups.items():
        certified = [row.certified_radius for row in group if row.certified_radius is not None]
        gaps = [row.gap for row in group if row.gap is not None]
        found |= {
            f"{place}/certified_median": median(certified),
            f"{place}/certified_smallest": min(certified, default=None),
            f"{place}/attack_median": median(row.attack_radius for row in group),
            f"{place}/gap_median": median(gaps),
            f"{place}/gap_largest": max(gaps, default=None),
        }
        for row in group:
            name = f"{place}/rows_{_plain(str(row.status))}"
            found[name] = (found.get(name) or 0.0) + 1.0
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _plain(name: str) -> str:
    """Letters that every tracker takes."""
    return re.sub(r"[^\w.-]+", "_", name.replace("%", " percent")).strip("_")


def _mlflow(record: Record) -> None:
    import mlflow

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=record.name):
        mlflow.log_params(dict(record.parameters))
        mlflow.log_metrics(dict(record.metrics))
        mlflow.log_text(record.rows, ROWS)


def _wandb(record: Record) -> None:
    import wandb

    run = wandb.init(project=PROJECT, name=record.name, config=dict(record.parameters))
    run.log(dict(record.metrics))
    run.finish()


def _tensorboard(record: Record) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(record.directory / TENSORBOARD)) as writer:
        for name, value in record.metrics.items():
            writer.add_scalar(name, value, 0)
        writer.add_text("parameters", "\n".join(f"* {name}: {value}" for name, value in record.parameters.items()))


TRACKERS: Mapping[str, Callable[[Record], None]] = {"mlflow": _mlflow, "wandb": _wandb, "tensorboard": _tensorboard}
