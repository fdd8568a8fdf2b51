"""The run configuration: what is written is what is meant, and what is misspelt is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from attnrobust.attacks import ATTACKS as EVERY_ATTACK
from attnrobust.attacks import DEFAULT_ATTACK as OWN_ATTACK
from attnrobust.attacks import AttackBudget
from attnrobust.certify.registry import METHODS, ON_REQUEST
from attnrobust.errors import InputError
from attnrobust.runs.config import AttackConfig, RunConfig, load_config, make_config
from attnrobust.runs.reading import ATTACKS, CERTIFICATES, DEFAULT_ATTACK, is_known_move
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.threats.parse import parse_threat

BASE = {"model": "m", "texts": "x.txt"}


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_defaults() -> None:
    config = make_config(BASE)
    assert config.layers == ("*",)
    assert config.threats == ("frobenius",)
    assert [goal.tolerance for goal in config.goals] == ["10%"]
    assert config.attack.method == "default"
    assert config.certifies
    assert config.execution.workers == 0


def test_one_value_stands_for_a_list_and_numbers_for_texts() -> None:
    config = make_config(BASE | {"layers": "a", "threats": "any-token", "goals": 0.5})
    assert config.layers == ("a",)
    assert config.threats == ("any-token",)
    assert [goal.tolerance for goal in config.goals] == ["0.5"]
    mixed = make_config(BASE | {"goals": ["1%", {"tolerance": 2, "pool": "mean"}]})
    assert [(goal.tolerance, goal.pool) for goal in mixed.goals] == [("1%", None), ("2", "mean")]


def test_the_effective_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", BASE | {"goals": ["1%", 3], "attack": {"steps": 5}}))
    (tmp_path / "again.yaml").write_text(config.as_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    (tmp_path / "again.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(tmp_path / "again.json") == config


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "readout.npz", weight=np.eye(3))
    path = write(tmp_path / "c.yaml", BASE | {"output": "out", "goals": [{"readout": "readout.npz"}]})
    config = load_config(path)
    assert config.texts == tmp_path / "x.txt"
    assert config.output == tmp_path / "out"
    assert config.goals[0].readout == tmp_path / "readout.npz"
    assert config.goals[0].tolerance is None


def test_flags_go_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "c.yaml", BASE | {"seed": 1, "attack": {"steps": 5, "restarts": 2}})
    changes = {"seed": 2, "model": None, "attack": {"steps": 7, "restarts": None}, "tokens": Path("t.npz")}
    config = load_config(path, changes=changes)
    assert (config.seed, config.model) == (2, "m")
    assert (config.attack.steps, config.attack.restarts) == (7, 2)
    assert config.texts is None
    assert config.tokens == tmp_path / "t.npz"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"modl": "m"}, "unknown key modl; did you mean model"),
        ({"attack": {"restart": 3}}, "unknown key attack.restart; did you mean restarts?"),
        ({"goals": [{"tolerence": "1%"}]}, "unknown key goals.0.tolerence; did you mean tolerance?"),
        ({"execution": {"worker": 3}}, "did you mean workers?"),
        ({"zzz": 1}, "unknown key zzz; known: model,"),
        ({"attack": {"steps": 0}}, "attack.steps: "),
        ({"seed": "x"}, "seed: "),
        ({"threats": []}, "threats is empty"),
        ({"threats": "frobenious"}, "nearest: frobenius"),
        ({"goals": "0%"}, "tolerance must be a positive number"),
        ({"certificates": ["nonsense"]}, "unknown certificate 'nonsense'"),
        ({"attack": {"method": "nonsense"}}, "unknown attack 'nonsense'"),
        ({"certificates": [], "attack": {"method": None}}, "nothing to do"),
        ({"tokens": "y.npz"}, "exactly one of texts, tokens, images and dataset"),
        ({"execution": {"timeout": 3}}, "set workers to 1 or more"),
        ({"execution": {"engine": "rey"}}, "execution.engine: "),
        ({"goals": [{"label": 1}]}, "readout"),
        ({"goals": [{"pool": "median"}]}, "give all, mean or row:I"),
        ({"attack": {"epsilon": 0}}, "attack.epsilon: "),
        ({"attack": {"epsilon": float("inf")}}, "attack.epsilon: "),
        ({"layers": []}, "layers is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path / "c.yaml", BASE | values))
    assert says in str(caught.value)
    assert str(tmp_path / "c.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(InputError, match="model is missing"):
        make_config({"texts": "x"})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.yaml", "a: [", "is not valid"),
        ("c.json", "{", "is not valid"),
        ("c.yaml", "- a\n- b\n", "keys and values"),
        ("c.yaml", "", "keys and values"),
        ("c.yaml", "1: x\n", "keys and values"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        load_config(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")


def test_no_certificates_and_no_attack_are_told_apart() -> None:
    assert not make_config(BASE | {"certificates": []}).certifies
    only_certificates = make_config(BASE | {"attack": {"method": None}})
    assert only_certificates.certifies
    assert only_certificates.attack.method is None


def test_the_defaults_are_those_of_the_library() -> None:
    """They are written down again, so that a configuration is read without torch."""
    assert AttackConfig().budget() == AttackBudget()
    assert DEFAULT_ATTACK == OWN_ATTACK
    every = (*METHODS, *ON_REQUEST)
    assert {method.name for method in every if FrobeniusBall in method.threats} | {"margin-one-token"} == CERTIFICATES
    moving = {attack.name for attack in EVERY_ATTACK if isinstance(FrobeniusBall(), attack.threats)}
    assert moving | {OWN_ATTACK} == ATTACKS


@pytest.mark.parametrize(
    "text", ["frobenius", "per-token-l1:0,3", "any-token", "token:3", "tokens:1,2", "tokens", "token:1,2", "per-tokens"]
)
def test_threats_that_count_as_known_are_read_and_no_other(text: str) -> None:
    try:
        parse_threat(text)
    except InputError:
        assert not is_known_move(text)
    else:
        assert is_known_move(text)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_that_no_file_can_hold_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match="seed: "):
        make_config(BASE | {"seed": seed})
    assert make_config(BASE | {"seed": 2**63 - 1}).seed == 2**63 - 1


def test_threats_on_measures_have_their_own_methods() -> None:
    make_config(BASE | {"threats": ["wasserstein:2:within:4"], "certificates": ["measure-ball"]})
    with pytest.raises(InputError, match="displacement"):
        make_config(BASE | {"threats": ["wasserstein:2:within:4"], "certificates": ["displacement"]})
    with pytest.raises(InputError, match="mass-splitting"):
        make_config(BASE | {"threats": ["coupling:inf"], "attack": {"method": "foolbox:DDN"}})


def test_the_budget_reaches_the_attack() -> None:
    budget = make_config(BASE | {"attack": {"restarts": 3, "steps": 4, "queries": 5}}).attack.budget()
    assert (budget.restarts, budget.steps, budget.queries) == (3, 4, 5)


def test_configurations_are_frozen() -> None:
    config = RunConfig(**BASE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
