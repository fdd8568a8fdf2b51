"""What is plainly wrong is refused before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from attnrobust.attacks import ATTACKS as EVERY_ATTACK
from attnrobust.attacks import DEFAULT_ATTACK
from attnrobust.certify.registry import METHODS, ON_REQUEST
from attnrobust.errors import InputError, UnknownNameError
from attnrobust.models.pretrained import MINILM, SMOLLM2
from attnrobust.runs import early
from attnrobust.runs.reading import ATTACKS, CERTIFICATES
from attnrobust.runs.storage.files import JSON_NAME, MANIFEST
from attnrobust.threats.parse import BALLS, KEYS, MOVES
from tests.assertions import refused


def test_the_lists_are_those_of_the_registries() -> None:
    named = {method.name for method in (*METHODS, *ON_REQUEST)}
    assert named == CERTIFICATES | early.CERTIFICATES_OF_MEASURES
    assert {DEFAULT_ATTACK, *(attack.name for attack in EVERY_ATTACK)} == ATTACKS | early.ATTACKS_OF_MEASURES
    assert set(early.THREAT_KEYS) == set(KEYS)
    assert {*MOVES, *BALLS, "copies"} == early.THREAT_NAMES
    assert (MANIFEST, JSON_NAME) == early.RESULTS
    assert (MINILM, SMOLLM2) == early.MODELS


@pytest.mark.parametrize(
    ("asked", "near"),
    [({"threats": ["frobenus"]}, "frobenius"), ({"threats": [], "certificates": ["displacemnt"]}, "displacement"),
     ({"threats": [], "attack": "pgd"}, "token-moving")],
)  # fmt: skip
def test_names_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], near: str) -> None:
    early.refuse_unknown_names(**asked)  # type: ignore[arg-type]  # the registries are there, and refuse themselves
    monkeypatch.setattr(early, "_registries_are_there", lambda: False)
    with pytest.raises(UnknownNameError) as caught:
        early.refuse_unknown_names(**asked)  # type: ignore[arg-type]
    assert caught.value.nearest[0] == near


def test_models_and_results_that_are_not_there(tmp_path: Path) -> None:
    for name, why in (("absent.npz", "there is no file"), ("some/where/else", "there is no directory"), (" ", "empty")):
        with refused(InputError, why):
            early.require_model(name)
    for name in ("minilm", "bert-base-uncased", "org/model", str(tmp_path)):
        early.require_model(name)
    with refused(InputError, "no such directory"):
        early.require_results(tmp_path / "nowhere")
    with refused(InputError, "manifest.json is missing"):
        early.require_results(tmp_path)
    (tmp_path / JSON_NAME).write_text("{}")
    early.require_results(tmp_path)
    with refused(InputError, "manifest.json is missing"):
        early.require_results(tmp_path, run=True)


WRONG = (
    "compare minilm --texts nowhere.txt",
    "compare minilm --texts here.txt --threat frobenus",
    "certify minilm --texts here.txt --certificates displacemnt",
    "attack minilm --texts here.txt --attack pgd",
    "bench minilm --attacks pgd --texts here.txt",
    "scan minilm --texts nowhere.txt",
    "run nowhere.yaml",
    "report nowhere",
    "resume nowhere",
    "check nowhere --min-certified 1",
    "curve nowhere",
    "list-layers absent.npz",
)


def test_commands_refuse_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("A sentence.\n")
    script = (
        "import sys\nfrom attnrobust.cli import run\n"
        f"for line in {WRONG!r}:\n"
        "    assert run(line.split()) == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(WRONG)
