"""Which layers a model has, and how a name finds one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.models.listing import LayerInfo, find_layer, list_layers
from attnrobust.models.model import ModuleModel
from tests.assertions import assert_same_bits, refused
from tests.hf_models import HEADS, LAYERS, MODELS, OTHERS, D

BERT_STYLE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


@pytest.mark.parametrize("family", MODELS)
def test_lists_every_layer_of_a_family(family: str) -> None:
    layers = list_layers(MODELS[family]())
    assert len(layers) == LAYERS * (2 if family in BERT_STYLE else 1)
    for layer in layers:
        assert layer.supported
        assert layer.reason == ""
        assert (layer.heads, layer.d, layer.k, layer.v, layer.e) == (HEADS, D, D // HEADS, D // HEADS, D)
        assert layer.mask == ("causal" if family == "gpt2" else "none")


def test_bert_names_and_kinds() -> None:
    first, second, *_ = list_layers(MODELS["bert"]())
    assert (first.name, second.name) == ("encoder.layer.0.attention", "encoder.layer.0.attention.self")
    assert first.kind == "BertAttention, with W_O, without residual and LayerNorm"
    assert second.kind == "BertSelfAttention, heads concatenated"


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("t5", "relative position"),
        ("mpnet", "relative position.*no adapter"),
        ("bloom", "ALiBi.*no adapter"),
        ("mpt", "ALiBi"),
        ("falcon", "rotary"),
        ("llama", "rotary.*shared by 3 query heads.*no adapter"),
    ],
)
def test_unsupported_layers_are_listed_with_the_reason(model: str, word: str) -> None:
    layers = list_layers(OTHERS[model]())
    assert layers
    for layer in layers:
        with refused(UnsupportedModelError, word):
            find_layer(layers, layer.name)
        assert not layer.supported
        assert layer.heads is None
        assert layer.mask == "unknown"


def test_the_positions_that_a_model_uses_are_named() -> None:
    (layer,) = list_layers(OTHERS["falcon"](alibi=True))
    assert "ALiBi" in layer.reason
    assert "rotary" not in layer.reason


def test_every_reason_of_a_model_without_supported_layers_is_named() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(D, HEADS, add_zero_attn=True), "b": OTHERS["mpnet"]()})
    with refused(UnsupportedModelError, "a: .*add_zero_attn", "b.*relative position"):
        find_layer(list_layers(model.eval()), None)


def test_weights_without_values_are_a_reason() -> None:
    with torch.device("meta"):
        model = nn.TransformerEncoderLayer(D, HEADS, 20).eval()
    (layer,) = list_layers(model)
    assert "meta device" in layer.reason
    assert "load the model" in layer.reason
    (layer,) = ModuleModel(model).layers()
    assert "meta device" in layer.reason


def test_decoder_with_cross_attention_is_partly_supported() -> None:
    layers = {layer.name: layer for layer in list_layers(OTHERS["bert decoder"]())}
    assert layers["encoder.layer.0.attention.self"].mask == "causal"
    assert "cross attention" in layers["encoder.layer.0.crossattention"].reason
    assert "cross attention" in layers["encoder.layer.0.crossattention.self"].reason


def test_torch_layers_inside_any_model() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, HEADS, batch_first=True), 2, enable_nested_tensor=False
    )
    assert [layer.supported for layer in list_layers(encoder.eval())] == [True, True]
    assert [layer.name for layer in list_layers(encoder)] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all("train mode" in layer.reason for layer in list_layers(encoder.train()))


class Pooled(nn.Module):
    """A learnt probe that asks the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, D))
        self.pool = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.own = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.positions = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x, key=x, value=x, need_weights=False)[0]
        q = k = x + 1.0
        x = self.positions(q, k, value=x)[0]
        pooled: Tensor = self.pool(self.probe.expand(len(x), -1, -1), x, x)[0]
        return pooled


class Listed(nn.Module):
    """Self and cross attention in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.MultiheadAttention(D, HEADS) for _ in range(2))
        self.cross = nn.ModuleList(nn.MultiheadAttention(D, HEADS) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for own, cross in zip(self.own, self.cross, strict=True):
            x = own(x, x, x)[0]
            x = cross(x, memory, memory)[0]
        return x


@pytest.mark.parametrize(
    ("model", "supported", "refused_layers"),
    [
        (Pooled(), {"own"}, {"pool", "positions"}),
        (Listed(), {"own.0", "own.1"}, {"cross.0", "cross.1"}),
        (nn.TransformerDecoderLayer(D, HEADS, 20), {"self_attn"}, {"multihead_attn"}),
        (nn.TransformerEncoderLayer(D, HEADS, 20), {"self_attn"}, set()),
    ],
)
def test_cross_attention_is_refused_by_the_way_it_is_called(
    model: nn.Module, supported: set[str], refused_layers: set[str]
) -> None:
    layers = list_layers(model.eval())
    assert {layer.name for layer in layers if layer.supported} == supported
    for name in refused_layers:
        with refused(UnsupportedModelError, "cross attention", "not its query"):
            find_layer(layers, name)


def test_the_pooling_head_of_siglip_is_cross_attention() -> None:
    layers = {layer.name.rsplit("head.", 1)[-1]: layer for layer in list_layers(OTHERS["siglip"]())}
    assert not layers["attention"].supported
    assert "cross attention" in layers["attention"].reason


def test_a_module_without_source_is_left_to_the_capture() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n  def forward(self, x): return self.a(x, -x, x)[0]", space)  # noqa: S102 - a class without a file
    made = space["Made"]()
    made.a = nn.MultiheadAttention(D, HEADS)
    model = ModuleModel(made)
    assert model.resolve(None).supported
    with refused(UnsupportedModelError, "cross attention"):
        model.capture_inputs(None, {"x": torch.zeros(4, 1, D)})


def test_a_single_module_is_one_layer() -> None:
    (layer,) = list_layers(nn.MultiheadAttention(D, HEADS).eval())
    assert find_layer((layer,), None) is layer


def test_subclasses_and_own_attention_are_named() -> None:
    class Louder(nn.MultiheadAttention):
        """A subclass."""

    class HouseAttention(nn.Module):
        """Anything."""

    own = nn.ModuleDict({"a": Louder(D, HEADS), "b": HouseAttention(), "c": nn.Linear(2, 2)})
    first, second = list_layers(own)
    assert (first.name, second.name) == ("a", "b")
    assert "subclass of MultiheadAttention" in first.reason
    assert "HouseAttention" in second.reason


def test_weights_that_are_not_finite_are_a_reason() -> None:
    layer = nn.MultiheadAttention(D, HEADS).eval()
    with torch.no_grad():
        layer.in_proj_weight[0, 0] = torch.nan
    (listed,) = list_layers(layer)
    assert not listed.supported
    assert "NaN" in listed.reason


def test_listing_changes_nothing() -> None:
    model = MODELS["bert"]().float().train()
    next(model.parameters()).requires_grad_(False)
    state = {name: (p.dtype, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    list_layers(model)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        dtype, gradient, value = state[name]
        assert (parameter.dtype, parameter.requires_grad) == (dtype, gradient)
        assert_same_bits(parameter.detach(), value)


# ---- names -----------------------------------------------------------------------------------------------------------

NAMES = [f"encoder.layer.{i}.attention{part}" for i in (0, 1, 11) for part in ("", ".self")]
INFOS = tuple(LayerInfo(name=name, kind="x", supported=True) for name in NAMES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.1.attention", "encoder.layer.1.attention"),
        ("1.attention", "encoder.layer.1.attention"),
        ("11.attention.self", "encoder.layer.11.attention.self"),
        ("layer.0.attention.self", "encoder.layer.0.attention.self"),
    ],
)
def test_unique_suffix(name: str, expected: str) -> None:
    assert find_layer(INFOS, name).name == expected


def test_ambiguous_suffix_lists_the_candidates() -> None:
    with refused(InputError, "ambiguous", "encoder.layer.0.attention.self", "encoder.layer.11.attention.self"):
        find_layer(INFOS, "attention.self")


@pytest.mark.parametrize("name", ["encoder.layer.1.atention", "encoder.layer.12.attention", "1.attention.sel", ""])
def test_wrong_name_gives_the_nearest(name: str) -> None:
    with refused(UnknownNameError, "unknown layer", "nearest: .*encoder.layer"):
        find_layer(INFOS, name)


def test_no_name() -> None:
    with refused(InputError, "6 layers; name one"):
        find_layer(INFOS, None)
    bad = LayerInfo(name="a", kind="x", supported=False, reason="rotary")
    assert find_layer((bad, INFOS[0]), None) is INFOS[0]
    with refused(UnsupportedModelError, "rotary"):
        find_layer((bad,), None)
    with refused(InputError, "no attention layer"):
        find_layer((), "a")


def test_long_candidate_lists_are_shortened() -> None:
    many = tuple(LayerInfo(name=f"layer.{i}.attn", kind="x", supported=True) for i in range(40))
    with refused(InputError, "and 28 more"):
        find_layer(many, "attn")
