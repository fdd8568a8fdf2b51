"""Whole networks from the command line: what is asked, what is refused, and what every surface says about it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnrobust.cli import ExitCode
from attnrobust.cli.goals import many_goals, one_goal
from attnrobust.errors import InputError
from attnrobust.runs.storage.files import REPORT_NAME
from tests.cli.test_compare import Run, Said, said_by
from tests.models.networks.models import HEADS
from tests.models.test_model import saved, word_tokenizer

TEXTS = "w3 w5 w7\nw4\n"
FAST = ("--method", "token-moving", "-q")


def with_head(folder: Path, name: str) -> Path:
    model: Any = HEADS[name]()
    model.save_pretrained(folder)
    if not name.startswith("vit"):
        word_tokenizer(folder, model.config.vocab_size)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(tmp_path_factory.mktemp("classifier"), "bert sequence")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS, encoding="utf-8")
    return path


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.txt"
    path.write_text("w3 w4 w9\n\nw11 w12\n", encoding="utf-8")
    return path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Said:
        capsys.readouterr()  # saving a model shows a bar
        return said_by(capsys, *arguments)

    return call


# ---- what can be asked -----------------------------------------------------------------------------------------------


def test_the_models_own_decision(cli: Run, classifier: Path, texts: Path) -> None:
    said = cli("compare", classifier, "--at", "block:1", "--goal", "decision", "--texts", texts, "--json", "-q")
    assert said.code == ExitCode.OK
    for row, count in zip(said.rows, (3, 1), strict=True):  # a text of one token has a decision too
        assert (row["layer"], row["goal"], row["n"], row["status"]) == ("block:1", "decision", count, "found")
        assert row["goal_scope"] == "the model's own decision; the tokens move at block:1"
        assert row["label"] == "LABEL_0"
        assert row["attack_label"] in ("LABEL_1", "LABEL_2")
        assert row["attack_radius"] > 0
        assert row["margin"] > 0
        assert row["certified_radius"] <= row["attack_radius"]


def test_nothing_certified_is_said_with_the_first_reason_by_name(cli: Run, classifier: Path, texts: Path) -> None:
    asked = ("--at", "block:1", "--goal", "decision", "--texts", texts, "--methods", "castin2024-reported", *FAST)
    said = cli("compare", classifier, *asked)
    (line,) = said.err.splitlines()
    assert "and 1 more row: no certificate: castin2024-reported: it speaks about" in line
    for part in ("class", "LABEL_0 > LABEL_", "of |x|", "norm of all tokens at that depth"):
        assert part in " ".join(said.out.split())


def test_block_0_is_the_embeddings_and_a_goal_alone_means_them(cli: Run, classifier: Path, texts: Path) -> None:
    asked = ("certify", classifier, "--goal", "decision", "--texts", texts, "--methods", "castin2024-reported")
    alone, named, zero = (
        cli(*asked, "--json", "-q", *at).rows for at in ((), ("--at", "embeddings"), ("--at", "block:0"))
    )
    assert {row["layer"] for row in alone} == {"embeddings"}
    problems = [[row["problem"] for row in rows] for rows in (alone, named, zero)]
    assert problems[0] == problems[1] == problems[2]
    deeper = cli(*asked, "--json", "-q", "--at", "block:1").rows
    assert not {row["problem"] for row in deeper} & set(problems[0])


@pytest.mark.parametrize(("goal", "key"), [("hidden", "hidden 1%"), ("pooled", "pooled 1%")])
def test_hidden_states(cli: Run, encoder: Path, texts: Path, goal: str, key: str) -> None:
    asked = ("--at", "block:1", "--goal", goal, "--tolerance", "1%", "--texts", texts)
    rows = cli("attack", encoder, *asked, "--json", *FAST).rows
    assert [(row["goal"], row["status"], row["label"]) for row in rows] == [(key, "found", None)] * 2
    assert all("last hidden states" in row["goal_scope"] for row in rows)
    assert all(0 < row["attack_radius"] < row["input_norm"] for row in rows)


def test_the_nearest_anchor(cli: Run, encoder: Path, texts: Path, anchors: Path) -> None:
    rows = cli("attack", encoder, "--goal", "nearest", "--anchors", anchors, "--texts", texts, "--json", *FAST).rows
    for row in rows:
        assert {row["label"], row["attack_label"]} == {"w3 w4 w9", "w11 w12"}
        assert row["status"] == "found"


def test_images(cli: Run, tmp_path: Path) -> None:
    model, random = with_head(tmp_path / "vit", "vit image"), np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", a=random.normal(size=(1, 8, 8)), wrong=random.normal(size=(1, 9, 9)))
    asked = ("--at", "block:1", "--goal", "decision", "--images", tmp_path / "x.npz", "--json", *FAST)
    right, wrong = cli("attack", model, *asked).rows
    assert (right["status"], right["n"], right["text"]) == ("found", 5, None)
    assert wrong["status"] == "error"
    assert wrong["message"].startswith("input wrong: ")
    layer = cli("attack", model, "--layer", "1.attention", "--images", tmp_path / "x.npz", "--json", *FAST).rows
    assert [row["status"] for row in layer] == ["found", "error"]


@pytest.mark.parametrize("name", ["bert words", "bert tokens"])
def test_outputs_with_a_row_per_token_need_one(cli: Run, tmp_path: Path, texts: Path, name: str) -> None:
    model = with_head(tmp_path / "model", name)
    asked = ("attack", model, "--at", "block:1", "--goal", "decision", "--texts", texts, "--json", *FAST)
    assert "--row" in cli(*asked).refusal()
    one, other = cli(*asked, "--row", "-1").rows
    assert (one["status"], other["status"]) == ("found", "found")
    assert one["goal"] == "decision row:-1"
    assert cli(*asked, "--row", 2).rows[1]["status"] == "error"  # the second text has one token


def test_the_next_token_is_named_by_its_word(cli: Run, tmp_path: Path, texts: Path) -> None:
    model = with_head(tmp_path / "model", "gpt2 next word")
    row, _ = cli("attack", model, "--goal", "decision", "--texts", texts, "--json", *FAST).rows
    assert row["label"].startswith(("w", "["))
    assert row["attack_label"] != row["label"]


def test_a_decoder_has_an_attack_and_the_reason_why_no_certificate(cli: Run, tmp_path: Path, texts: Path) -> None:
    model = with_head(tmp_path / "model", "llama next word")
    asked = ("compare", model, "--at", "block:1", "--goal", "decision", "--texts", texts)
    row, _ = cli(*asked, "--json", *FAST).rows
    assert (row["status"], row["certified_radius"], row["certificate"]) == ("found", 0.0, None)
    assert row["attack_radius"] > 0.0
    assert row["attack_label"] != row["label"]
    assert "no certificate: network-" in row["message"]
    assert "Attention.rotary" in row["message"]
    table = " ".join(cli(*asked, *FAST).out.split())
    assert re.search(r"│ - │ [\d.]+ │ [\d.]+% │ - │ found", table)  # certified is "-": 0 would be a claim


def test_bench_takes_decisions(cli: Run, classifier: Path, texts: Path, tmp_path: Path) -> None:
    asked = ("--at", "block:1", "--goal", "decision", "--texts", texts, "--attacks", "token-moving")
    assert "block:1, frobenius, decision" in cli("bench", classifier, *asked, "--out", tmp_path / "b", "-q").out


def test_list_layers_says_what_can_be_asked_about_the_whole(cli: Run, classifier: Path, encoder: Path) -> None:
    assert "--at embeddings | block:1; --goal decision, hidden, pooled" in cli("list-layers", classifier).out
    assert "it has no head" in cli("list-layers", encoder).out


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--at", "block:2", "--goal", "decision"), "the model has block:0 (the embeddings) to block:1"),
        (("--at", "embedings", "--goal", "decision"), "unknown depth 'embedings'; nearest: embeddings"),
        (("--at", "block:1"), "every goal at a depth is one of decision, hidden, pooled, nearest"),
        (("--at", "block:1", "--layer", "1.attention", "--goal", "decision"), "exclude each other"),
        (("--layer", "1.attention", "--goal", "decision"), "exclude each other"),
        (("--goal", "decison"), "unknown goal 'decison'; nearest: decision"),
        (("--goal", "decision", "--tolerance", "1%"), "leave out --tolerance"),
        (("--goal", "decision", "--readout", "x.npz"), "leave out one of them"),
        (("--goal", "hidden", "--label", "1"), "leave out --label"),
        (("--goal", "hidden", "--pool", "mean"), "ask for the goal pooled"),
        (("--goal", "pooled", "--row", "1"), "leave out --row"),
        (("--goal", "nearest"), "--anchors FILE"),
        (("--goal", "hidden", "--anchors", "x.txt"), "--goal nearest"),
        (("--anchors", "x.txt"), "--goal nearest"),
        (("--row", "1"), "--goal decision"),
        (("--label", "1"), "--goal decision"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    cli: Run, classifier: Path, texts: Path, arguments: tuple[str, ...], says: str
) -> None:
    assert says in cli("compare", classifier, "--texts", texts, *arguments).refusal()


def test_a_model_without_a_head_says_what_it_has(cli: Run, encoder: Path, texts: Path) -> None:
    line = cli("compare", encoder, "--goal", "decision", "--texts", texts).refusal()
    assert "BertModel has no head of its own" in line
    assert "--goal hidden or pooled" in line
    assert "head=" not in line


def test_states_of_a_file_are_refused(cli: Run, classifier: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones((3, 24)))
    line = cli("compare", classifier, "--goal", "decision", "--tokens", tmp_path / "x.npz").refusal()
    assert "give texts or images" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds 0 anchor sentences; write at least two"),
        ("w3 w4\n\n", "holds 1 anchor sentence; write at least two"),
        ("w3 w4\nw5\nw3  w4\n", "has the anchor 'w3 w4' twice"),
        ("w3 w99\nw3 w98\n", "anchors 0 and 1 give the same direction"),  # both words are unknown to the model
    ],
)
def test_anchors_between_which_nothing_decides(
    cli: Run, encoder: Path, texts: Path, tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    asked = ("--goal", "nearest", "--anchors", tmp_path / "a.txt", "--texts", texts)
    assert says in cli("compare", encoder, *asked).refusal()


def test_anchors_that_cannot_be_read(cli: Run, encoder: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"w3\n\xff\n")
    asked = ("compare", encoder, "--goal", "nearest", "--texts", texts, "--anchors")
    assert "is not UTF-8" in cli(*asked, tmp_path / "a.txt").refusal()
    assert "cannot read the anchors" in cli(*asked, tmp_path / "absent.txt").refusal()


# ---- honesty ---------------------------------------------------------------------------------------------------------


def test_a_readout_names_the_models_own_decision(
    cli: Run, classifier: Path, encoder: Path, texts: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "head.npz", weight=np.random.default_rng(0).normal(size=(3, 24)))
    asked = (
        "--layer", "1.attention", "--readout", tmp_path / "head.npz", "--texts", texts, "-q", "--methods",
        "castin2024-derived",
    )  # fmt: skip
    instead = "it is not the decision of the model, which has a head: give --at block:1 --goal decision"
    out = tmp_path / "out"
    said = cli("certify", classifier, *asked, "--out", out, "--fail-under", 1e9)
    assert said.code == ExitCode.BELOW
    assert instead in " ".join(said.out.split())
    assert instead in said.err  # the message of --fail-under
    assert instead in cli("certify", classifier, *asked, "--json").rows[0]["goal_scope"]
    cli("report", out)
    assert instead in (out / REPORT_NAME).read_text(encoding="utf-8")
    assert instead in cli("check", out, "--min-certified", 0).err
    assert cli("certify", encoder, *asked, "--json").rows[0]["goal_scope"].endswith("not the decision of the model")


# ---- options to goals ------------------------------------------------------------------------------------------------


def test_every_goal_gets_the_options_that_it_takes() -> None:
    found = many_goals(["decision", "hidden", "nearest"], ["1%", "5%"], Path("a.txt"), 2)
    assert found is not None
    told = [{name: value for name, value in goal.items() if value is not None} for goal in found]
    assert told == [
        {"goal": "decision", "row": 2},
        {"goal": "hidden", "tolerance": "1%", "row": 2},
        {"goal": "hidden", "tolerance": "5%", "row": 2},
        {"goal": "nearest", "anchors": Path("a.txt")},
    ]
    assert many_goals(None, None, None, None) is None
    assert many_goals(None, ["1%"], None, None) == [one_goal(None, None, "1%", None, None, None, None)]


def test_an_option_that_no_goal_takes_is_refused() -> None:
    for arguments in (
        (["decision"], ["1%"], None, None),
        (["pooled"], None, Path("a.txt"), None),
        (["nearest"], None, Path("a.txt"), 3),
        (None, None, None, 3),
    ):
        with pytest.raises(InputError):
            many_goals(*arguments)
