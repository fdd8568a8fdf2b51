"""An experiment's directory: what is computed once, what is refused, and what is unsound."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attnrobust.errors import InputError, SoundnessError
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column
from attnrobust.reproduce.run import run_experiment

SETTING = Setting(seed=3)


def toy(calls: list[str], *, factor: float = 2.0, broken: bool = False) -> Experiment:
    """Two parts of one row each; the bound is ``factor`` times what is found."""

    def compute(name: str, n: int) -> list[Row]:
        calls.append(name)
        if broken and name == "b":
            raise RuntimeError("interrupted")
        return [{"name": name, "n": n, "found": float(n), "upper": factor * n, "nothing": None}]

    def parts(setting: Setting) -> list[Part]:
        return [
            Part(name=name, config={"n": n, "factor": factor}, compute=lambda name=name, n=n: compute(name, n))  # type: ignore[misc]
            for name, n in (("a", 1), ("b", 4))
        ]

    return Experiment(
        name="toy",
        paper="nobody",
        statement="two is more than one",
        minutes=(0, 0),
        parts=parts,
        panels=lambda rows: [
            Panel(title="t", x="n", y="y", curves=[Curve(label="", x=column(rows, "n"), y=[1.0, 2.0])])
        ],
        verdicts=lambda rows: [Verdict(claim="c", paper="1", ours=str(len(rows)), agrees=True, reason="r|s")],
        sides=(("found", "upper"),),
    )


def test_finished_parts_are_not_computed_again(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError):
        run_experiment(toy(calls, broken=True), tmp_path, setting=SETTING)
    assert calls == ["a", "b"]
    outcome = run_experiment(toy(calls), tmp_path, setting=SETTING)
    assert calls == ["a", "b", "b"]
    again = run_experiment(toy(calls), tmp_path, setting=SETTING)
    assert calls == ["a", "b", "b"]
    assert again.rows == outcome.rows


def test_the_files(tmp_path: Path) -> None:
    outcome = run_experiment(toy([]), tmp_path, setting=SETTING)
    outcome.require_sound()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["experiment"], manifest["violations"]) == (3, "toy", [])
    assert manifest["config"]["b"] == {"n": 4, "factor": 2.0}
    assert {"attnrobust", "torch"} <= set(manifest["versions"])
    assert (tmp_path / "table.csv").read_text() == "name,n,found,upper,nothing\na,1,1.0,2.0,\nb,4,4.0,8.0,\n"
    assert (tmp_path / "table.md").read_text().splitlines()[2] == "| a | 1 | 1 | 2 | - |"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "figure.svg").read_bytes()
    assert "| c | 1 | 2 | agrees | r/s |" in (tmp_path / "summary.md").read_text()


def test_another_seed_or_configuration_is_refused(tmp_path: Path) -> None:
    run_experiment(toy([]), tmp_path, setting=SETTING)
    for experiment, setting in ((toy([]), Setting(seed=4)), (toy([], factor=3.0), SETTING)):
        with pytest.raises(InputError, match="another job"):
            run_experiment(experiment, tmp_path, setting=setting)
    calls: list[str] = []
    outcome = run_experiment(toy(calls, factor=3.0), tmp_path, setting=SETTING, overwrite=True)
    assert calls == ["a", "b"]
    assert outcome.rows[0]["upper"] == 3.0


def test_a_higher_version_computes_again(tmp_path: Path) -> None:
    calls: list[str] = []
    run_experiment(toy(calls), tmp_path, setting=SETTING)
    run_experiment(replace(toy(calls), version=2), tmp_path, setting=SETTING, overwrite=True)
    assert calls == ["a", "b"] * 2


def test_a_violated_bound_is_unsound_and_written(tmp_path: Path) -> None:
    outcome = run_experiment(toy([], factor=1.0 - 1e-15), tmp_path, setting=SETTING)
    with pytest.raises(SoundnessError, match="is above"):
        outcome.require_sound()
    assert len(json.loads((tmp_path / "manifest.json").read_text())["violations"]) == 2
    run_experiment(toy([], factor=1.0), tmp_path / "equal", setting=SETTING).require_sound()
