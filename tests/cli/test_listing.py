"""``list``: everything there is, each name one that the commands take; aliases of options; -v anywhere; completion."""

import json

import pytest

from attnrobust.certify.registry import METHODS, ON_REQUEST
from attnrobust.cli import ExitCode, run
from attnrobust.cli.app import verbose_first
from attnrobust.cli.listing import KINDS, THREATS
from attnrobust.threats.parse import KEYS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", kind, "--json"]) == ExitCode.OK
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["about"]) for line in lines] == KINDS[kind]()
    assert all(about and "\n" not in about for _, about in KINDS[kind]())


def test_nothing_is_left_out() -> None:
    assert [name for name, _ in KINDS["certificates"]()] == [m.name for m in (*METHODS, *ON_REQUEST)]
    listed = {name.partition(":")[0] for name, _ in THREATS}
    assert {key.partition(":")[0] for key in KEYS} - {"tokens"} <= listed


def test_a_kind_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "attack"]) == ExitCode.USAGE
    assert "nearest: attacks" in capsys.readouterr().err


def test_verbose_may_stand_anywhere() -> None:
    assert verbose_first(["compare", "x", "-v", "--json"]) == ["-v", "compare", "x", "--json"]
    assert verbose_first(["compare", "--", "-v"]) == ["compare", "--", "-v"]


@pytest.mark.parametrize("options", [("--certificates", "--attack"), ("--methods", "--method")])
def test_both_names_of_an_option_work(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    certificates, attack = options
    asked = ["config", "--model", "m", "--texts", "t", certificates, "displacement", attack, "token-moving"]
    assert run(asked) == ExitCode.OK
    out = capsys.readouterr().out
    assert "- displacement" in out
    assert "method: token-moving" in out


def test_all_certificates_are_asked_for_by_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--model", "m", "--texts", "t", "--all-certificates"]) == ExitCode.OK
    assert "certificates:\n- all\n" in capsys.readouterr().out
    asked = ["config", "--model", "m", "--texts", "t", "--all-certificates", "--certificates", "displacement"]
    assert run(asked) == ExitCode.USAGE
    assert "exclude each other" in capsys.readouterr().err


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_ATTNROBUST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "attnrobust li")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as end:
        run([])
    assert end.value.code == 0
    assert {"list", "list-layers"} <= set(capsys.readouterr().out.split())


def test_a_device_without_float64_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--model", "m", "--texts", "t", "--device", "mps"]) == ExitCode.USAGE
    assert "has no float64" in capsys.readouterr().err
