"""What trackers are told of a run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from attnrobust.cli import run as cli
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.runs.loggers import log_run, metrics, require_tracker
from attnrobust.runs.run import run
from tests.runs.storage.test_files import EMPTY, FULL
from tests.runs.test_run import NO_SHARD, configured, write_files


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    write_files(tmp_path)
    config = configured(tmp_path)
    run(config, shard=NO_SHARD)
    return Path(config.output)


def test_figures_of_layers_threats_and_goals_are_not_pooled() -> None:
    other = replace(FULL, threat="per-token", certified_radius=2.0, gap=None)
    found = metrics([FULL, replace(FULL, certified_radius=3 * (FULL.certified_radius or 0.0)), other, EMPTY])
    places = {name.rsplit("/", 1)[0] for name in found}
    assert len(places) == 3
    mine = next(place for place in places if "frobenius" in place and f"{place}/gap_largest" in found)
    assert found[f"{mine}/certified_smallest"] == FULL.certified_radius
    assert found[f"{mine}/certified_median"] == pytest.approx(2 * (FULL.certified_radius or 0.0))
    assert found[f"{mine}/rows_{FULL.status}"] == 2.0
    assert all(name.replace("/", "").replace("_", "").replace(".", "").replace("-", "").isalnum() for name in found)


def test_a_tracker_is_told_everything_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, object]] = []

    class Run:
        def log(self, values: object) -> None:
            told.append(("metrics", values))

        def finish(self) -> None:
            told.append(("finished", None))

    def init(*, project: str, name: str, config: dict[str, str]) -> Run:
        told.append((f"{project} {name}", config))
        return Run()

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert cli(["export", str(finished), "--log-to", "wandb"]) == 0
    (name, config), (_, values), (last, _) = told
    assert name == f"attnrobust {finished.name}"
    assert isinstance(config, dict)
    assert {"model", "run"} <= set(config)
    assert isinstance(values, dict)
    assert any(key.endswith("/certified_median") for key in values)
    assert last == "finished"


def test_what_is_missing_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="mlflow"):
        require_tracker("ml-flow")
    monkeypatch.setattr("attnrobust.runs.loggers.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="pip install wandb"):
        log_run(finished, "wandb")


def test_mlflow_keeps_the_run_in_its_own_files(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_run(finished, "mlflow")
    (found,) = mlflow.search_runs(experiment_names=["attnrobust"], output_format="list")
    assert found.info.run_name == finished.name
    assert any(name.endswith("/certified_median") for name in found.data.metrics)
    assert found.data.params["run"]
    text = mlflow.artifacts.load_text(f"{found.info.artifact_uri}/rows.jsonl")
    assert len(text.splitlines()) == sum(v for k, v in found.data.metrics.items() if "/rows_" in k)


def test_tensorboard_reads_the_figures(finished: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_run(finished, "tensorboard")
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert any(name.endswith("/certified_median") for name in events.Tags()["scalars"])
