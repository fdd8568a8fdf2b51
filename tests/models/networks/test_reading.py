"""What is not modelled is refused by the module's path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from attnrobust.errors import UnsupportedModelError
from attnrobust.models.model import ModuleModel
from attnrobust.models.networks.plan import Wanted
from attnrobust.models.networks.reading import capture_states, plan_of
from attnrobust.models.read_network import read_network
from tests.assertions import refused
from tests.hf_models import MODELS, OTHERS, model_inputs
from tests.models.networks.models import HEADS, encoder, encoder_layer, inputs_of

BERT = "bert.encoder.layer.1"


def bert(**changes: Any) -> nn.Module:
    return HEADS["bert sequence"](**changes)


def replaced(path: str, part: nn.Module) -> nn.Module:
    model = bert()
    model.set_submodule(path, part)
    return model.to(torch.float64).eval()


def pruned() -> nn.Module:
    model = bert()
    prune.l1_unstructured(model.get_submodule(f"{BERT}.output.dense"), "weight", 0.3)
    return model


def parametrised() -> nn.Module:
    model = bert()
    parametrizations.weight_norm(model.get_submodule("classifier"))
    return model


def with_extra_parameters() -> nn.Module:
    model = bert()
    model.get_submodule(BERT).register_parameter("gain", nn.Parameter(torch.ones(1)))
    return model


class OwnNorm(nn.LayerNorm):
    """A subclass may compute something else."""


class OwnPooler(nn.Module):
    """A head of the user's own."""


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "activation": (lambda: bert(hidden_act="relu6"), ("encoder.layer.0.intermediate.intermediate_act_fn", "ReLU6")),
    "rounded activation": (lambda: bert(hidden_act="gelu_fast"), ("intermediate_act_fn", "FastGELU")),
    "norm": (lambda: replaced(f"{BERT}.output.LayerNorm", OwnNorm(24)), (f"{BERT}.output.LayerNorm", "OwnNorm")),
    "batch norm": (
        lambda: replaced(f"{BERT}.output.LayerNorm", nn.BatchNorm1d(24)),
        (f"{BERT}.output.LayerNorm", "BatchNorm1d"),
    ),
    "pruned": (pruned, (f"{BERT}.output.dense", "pruned")),
    "parametrised": (parametrised, ("classifier", "parametrised")),
    "parameters": (with_extra_parameters, (BERT, "gain")),
    "pooler": (lambda: replaced("bert.pooler", OwnPooler()), ("bert.pooler", "OwnPooler")),
    "linear": (lambda: replaced(f"{BERT}.output.dense", nn.Identity()), (f"{BERT}.output.dense", "Identity")),
    "cross attention": (lambda: bert(is_decoder=True, add_cross_attention=True), ("layer.0", "crossattention")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_its_path(what: str) -> None:
    build, words = REFUSED[what]
    with refused(UnsupportedModelError, *words):
        plan_of(build(), Wanted())


def test_dropout_in_train_mode() -> None:
    with refused(UnsupportedModelError, "bert.embeddings.dropout", r"model\.eval"):
        plan_of(bert().train(), Wanted())
    with refused(UnsupportedModelError, "dropout", r"model\.eval"):
        capture_states(encoder().train(), {"src": torch.randn(1, 3, 8)})
    read_network(bert().train(), inputs_of("bert"))  # a copy in eval mode


@pytest.mark.parametrize("family", sorted(OTHERS.keys() - {"llama"}))
def test_models_without_a_reader(family: str) -> None:
    model = OTHERS[family]()
    if family == "bert decoder":
        with refused(UnsupportedModelError, "crossattention"):
            plan_of(model, Wanted())
        return
    with refused(UnsupportedModelError, type(model).__name__, "not read as a network", "BertModel"):
        plan_of(model, Wanted())


def test_subclasses_of_models() -> None:
    model = MODELS["bert"]()
    model.__class__ = type("OwnBert", (type(model),), {})
    with refused(UnsupportedModelError, "OwnBert"):
        plan_of(model, Wanted())


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (nn.BatchNorm1d(8), ("1: ", "BatchNorm1d")),
        (nn.Conv1d(8, 8, 1), ("1: ", "Conv1d")),
        (nn.LeakyReLU(), ("1: ", "LeakyReLU")),
        (encoder_layer(activation=nn.functional.leaky_relu), (r"1\.activation", "leaky_relu")),
        (nn.Sequential(nn.Linear(8, 8), nn.PReLU()), (r"1\.1: ", "PReLU")),
    ],
)
def test_parts_of_a_sequence(part: nn.Module, words: tuple[str, ...]) -> None:
    with refused(UnsupportedModelError, *words):
        plan_of(nn.Sequential(nn.Linear(5, 8), part).eval(), Wanted())


def test_mixed_layouts() -> None:
    with refused(UnsupportedModelError, "batch_first"):
        plan_of(nn.Sequential(encoder_layer(), encoder_layer(batch_first=False)).eval(), Wanted())


def test_a_checkpoint_with_weights_that_nothing_reads() -> None:
    from attnrobust.models.pretrained import Pretrained

    module = MODELS["bert"]()
    loaded = Pretrained(module, "here", local=True, unread=("bert.encoder.layer.1.attention.self.distance.weight",))
    with refused(UnsupportedModelError, "encoder.layer.1", "distance"):
        ModuleModel(module, pretrained=loaded).network(model_inputs("bert"))
    harmless = Pretrained(module, "here", local=True, unread=("cls.predictions.bias", "classifier.weight"))
    assert ModuleModel(module, pretrained=harmless).network(model_inputs("bert")).info.blocks == 2
