"""Competing attacks: one run each on disk, scores by hand, resumption, budgets, bad input, the command."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnrobust.runs.bench
from attnrobust.attacks import registry
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.cli import ExitCode
from attnrobust.cli.bench import parse_budget, parse_epsilons
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.results import Status
from attnrobust.runs.bench import Benchmark, InputWinner, attack_config, bench, default_epsilons
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.rows import Row
from attnrobust.runs.run import run
from attnrobust.runs.storage.store import RunStore
from tests.cli.test_compare import Run, Said, said_by
from tests.layer_files import write_layer


class Second(TokenMoving):
    """Token moving under another name: another seed, and therefore other starts."""

    name = "second"


class Refusing(TokenMoving):
    """An attack that handles nothing."""

    name = "refusing"

    def refuses(self, problem: object, epsilon: float | None) -> str | None:
        return "it handles nothing"


@pytest.fixture(autouse=True)
def more_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ATTACKS", (TokenMoving(), Second(), Refusing()))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_layer(tmp_path, np.random.default_rng(0), x2=2, x3=3)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], files: Path) -> Run:
    common = ("bench", files / "layer.npz", "--tokens", files / "x.npz", "--out", files / "out", "-q")
    small = ("--restarts", 1, "--steps", 3)

    def call(*arguments: object) -> Said:
        return said_by(capsys, *common, *small, *arguments)

    return call


def configured(files: Path, **changes: Any) -> RunConfig:
    values = {
        "model": str(files / "layer.npz"),
        "tokens": files / "x.npz",
        "attack": {"restarts": 1, "steps": 3},
        "output": files / "out",
    }
    return make_config(values | changes)


def made(radii: dict[str, list[float | None]], *, status: Status = Status.FOUND) -> Benchmark:
    """A benchmark with given radii, attack by attack, input by input."""
    rows = {
        name: tuple(
            Row(f"x{i}", "layer", 3, "frobenius", "g", attack=name, attack_radius=r, queries=10 * (i + 1),
                seconds_attack=0.5, status=status if r is not None else Status.NOT_FOUND, row_id=str(i))
            for i, r in enumerate(values)
        )
        for name, values in radii.items()
    }  # fmt: skip
    return Benchmark(tuple(radii), rows, 0)


def test_scores_by_hand() -> None:
    found = made({"a": [1.0, 2.0, None, 4.0], "b": [2.0, 2.0, None, 1.0], "c": [None, 8.0, None, 1.0 + 1e-9]})
    a, b, c = found.scores((1.0, 2.0, 5.0))
    assert (a.wins, b.wins, c.wins) == (2, 2, 1)
    assert (a.found, b.found, c.found) == (3, 3, 2)
    assert a.success == {1.0: 0.25, 2.0: 0.5, 5.0: 0.75}
    assert b.success == {1.0: 0.25, 2.0: 0.75, 5.0: 0.75}
    assert (a.median_radius, b.median_radius, c.median_radius) == (2.0, 2.0, 8.0)
    assert (a.optimality, a.worst_optimality) == (1.0, 0.25)
    assert (b.optimality, b.worst_optimality) == (1.0, 0.5)
    assert (c.optimality, c.worst_optimality) == (0.25, 0.0)
    assert (a.queries, a.seconds, a.rows) == (25, 0.5, 4)
    assert a.statuses == {"found": 3, "not_found": 1}
    third = found.winners()[2]
    assert third.best is None
    assert third.winners == ()
    assert found.winners()[1].winners == ("a", "b")


def test_success_is_counted_around_the_best_radii() -> None:
    (score,) = made({"a": [1.0, 2.0, 3.0]}).scores()
    assert list(score.success) == [2.0, 2.2, 3.0, 4.0]
    (nothing,) = made({"a": [None]}).scores()
    assert nothing.success == {}
    assert nothing.median_radius is None
    assert nothing.optimality is None


def test_inputs_that_fail_without_a_move_do_not_count() -> None:
    found = made({"a": [0.0, 1.0]})
    first, second = found.rows["a"]
    both = Benchmark(("a",), {"a": (replace(first, status=Status.MISCLASSIFIED), second)}, 0)
    (score,) = both.scores((1.0,))
    assert (score.rows, score.found) == (1, 1)
    assert score.statuses == {"found": 1, "misclassified": 1}
    alone = Benchmark(("a",), {"a": (replace(first, status=Status.MISCLASSIFIED),)}, 0)
    assert [(s.rows, s.success) for s in alone.scores((1.0,))] == [(0, {})]


def test_each_attack_has_its_own_run(files: Path) -> None:
    found = bench(configured(files), ["token-moving", "second"])
    for name in ("token-moving", "second"):
        store = RunStore.open(files / "out" / name)
        assert {row.attack for row in store.rows()} == {name}
        assert {row.certified_radius for row in store.rows()} == {None}
        assert found.rows[name] == tuple(store.rows())
    assert [w.input_id for w in found.winners()] == ["x2", "x3"]
    assert attack_config(configured(files), "foolbox:L2PGD", {}).output == files / "out" / "foolbox-L2PGD"


def test_what_is_on_disk_is_not_computed_again(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watch(rows: Iterator[Row], total: int) -> Iterator[Row]:
        for row in rows:
            seen.append(f"{row.attack} {row.input_id}")
            yield row

    first = bench(configured(files), ["token-moving"], watch=watch)
    assert seen == ["token-moving x2", "token-moving x3"]
    seen.clear()
    again = bench(configured(files), ["second", "token-moving"], watch=watch)
    assert seen == ["second x2", "second x3"]
    assert again.rows["token-moving"] == first.rows["token-moving"]
    with pytest.raises(InputError, match="steps was 3, is 4"):
        bench(configured(files, attack={"restarts": 1, "steps": 4}), ["token-moving"])


def test_budgets_of_single_attacks(files: Path) -> None:
    budgets = {"second": {"queries": 7, "seconds": 30.0}}
    found = bench(
        configured(files, attack={"restarts": 1, "queries": 500}), ["token-moving", "second"], budgets=budgets
    )
    stored = RunStore.open(files / "out" / "second").manifest.config["attack"]
    assert (stored["queries"], stored["seconds"], stored["method"]) == (7, 30.0, "second")
    first, second = found.scores()
    assert first.queries is not None
    assert second.queries is not None
    assert second.queries < first.queries <= 500


def test_an_attack_that_refuses_does_not_end_the_others(cli: Run, files: Path) -> None:
    said = cli("--attacks", "refusing,token-moving", "--json")
    values = json.loads(said.out)
    refusing, moving = values["scores"]
    assert refusing["statuses"] == {"error": 2}
    assert refusing["found"] == 0
    assert refusing["worst_optimality"] == 0.0
    assert moving["found"] == 2
    assert said.code == ExitCode.OK
    assert "it handles nothing" in said.err


def test_the_default_sizes_do_not_leave_out_the_median_itself() -> None:
    winner = InputWinner("x", "l", "t", "g", {"a": 0.123456}, 0.123456, ("a",))
    sizes = default_epsilons([winner])
    assert sizes == (0.1235, 0.1358, 0.1852, 0.2469)
    assert default_epsilons([]) == ()


def test_the_command(cli: Run) -> None:
    said = cli(
        "--attacks", "token-moving, second", "--epsilons", "0.0012345,100", "--budget", "second seconds=20 queries=900"
    )
    assert said.code == ExitCode.OK
    for word in (
        "token-moving",
        "second",
        "<= 0.0012345",
        "<= 100",
        "100%",
        "optimality",
        "2/2",
        "smallest radius by input",
    ):
        assert word in said.out
    values = json.loads(
        cli("--attacks", "token-moving,second", "--budget", "second seconds=20 queries=900", "--json").out
    )
    for entry in values["inputs"]:
        assert entry["best"] == min(entry["radii"].values())
    assert sum(score["wins"] for score in values["scores"]) >= 2
    assert all(0.0 < score["optimality"] <= 1.0 for score in values["scores"])
    assert values["scores"][0]["success"][-1]["share"] <= 1.0


def test_interruption_says_how_to_go_on(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    true = run

    def stopped(config: RunConfig, *, stop: Any, watch: Callable[..., Any]) -> Any:
        def one(rows: Iterator[Row], total: int) -> Iterator[Row]:
            for row in watch(rows, total):
                stop.set()
                yield row

        return true(config, stop=stop, watch=one)

    with monkeypatch.context() as patched:
        patched.setattr(attnrobust.runs.bench, "run", stopped)
        said = cli("--attacks", "token-moving,second", "--json")
    assert said.code == ExitCode.INTERRUPTED
    assert "3 rows are left; give the same command again" in said.err
    assert json.loads(said.out)["remaining"] == 3
    assert json.loads(cli("--attacks", "token-moving,second", "--json").out)["remaining"] == 0


def test_wrong_usage_is_one_line(cli: Run, files: Path) -> None:
    assert "unknown attack 'moving'" in cli("--attacks", "moving").refusal()
    assert "named twice" in cli("--attacks", "second,second").refusal()
    assert "name at least one attack" in cli("--attacks", ",").refusal()
    assert "second, which is not among" in cli("--attacks", "token-moving", "--budget", "second steps=2").refusal()
    assert "unknown key attack.stops" in cli("--attacks", "second", "--budget", "second stops=2").refusal()
    assert "positive numbers" in cli("--attacks", "second", "--epsilons", "0.1,-2").refusal()
    assert "give a name and numbers" in cli("--attacks", "second", "--budget", "second steps").refusal()
    assert "threat" in cli("--attacks", "second", "--threat", "everything").refusal()
    assert not (files / "out").exists()


def test_options_are_read() -> None:
    assert parse_epsilons("2, 1,2") == (1.0, 2.0)
    assert parse_budget("foolbox:DDN queries=5 seconds=1.5") == ("foolbox:DDN", {"queries": 5, "seconds": 1.5})
    for text in ("", "a", "a steps", "a steps=x", "a steps=1.5"):
        with pytest.raises(InputError, match="give a name and numbers"):
            parse_budget(text)
    for text in ("", "x", "0", "nan", "1,inf"):
        with pytest.raises(InputError, match="positive numbers"):
            parse_epsilons(text)


def test_library_refuses_too(files: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown attack 'moving'; nearest: token-moving"):
        bench(configured(files), ["moving"])
    with pytest.raises(InputError, match="name at least one attack"):
        bench(configured(files), [])


@pytest.mark.parametrize("name", ["foolbox:L2PGD", "foolbox:DDN"])
def test_foolbox_attacks_compete(files: Path, name: str) -> None:
    pytest.importorskip("foolbox")
    found = bench(configured(files, attack={"restarts": 1, "steps": 20}), ["token-moving", name])
    moving, other = found.scores()
    assert other.statuses == {"found": 2}
    assert moving.median_radius is not None
    assert other.median_radius is not None
    assert moving.median_radius <= other.median_radius * 1.02
