"""Hugging Face attention modules against their specifications."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.masks import padding_mask
from attnrobust.models.from_transformers import BLOCKS, LAYOUTS, from_transformers
from tests.assertions import assert_close, assert_same_bits, refused
from tests.hf_models import COMMON, HEADS, MODELS, OTHERS, TEXT, D, call, model_inputs, second_layer

N = 7
HIDDEN = torch.tensor([False, False, True, False, False, True, True])
BERT_STYLE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def tokens(n: int = N) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64)


def causal_mask(n: int = N) -> Tensor:
    return torch.zeros(n, n, dtype=torch.float64).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)


def test_the_table_of_models_has_every_layout() -> None:
    found = {type(second_layer(family, build())).__qualname__ for family, build in MODELS.items()}
    assert found == {path.rsplit(".", 1)[1] for path in LAYOUTS}
    assert len(BLOCKS) == len(BERT_STYLE)


@pytest.mark.parametrize("family", MODELS)
def test_agrees(family: str) -> None:
    module, x = second_layer(family, MODELS[family]()), tokens()
    spec = from_transformers(module)
    assert (spec.heads, spec.width, spec.causal) == (HEADS, D, family == "gpt2")
    assert_close(spec(x), call(module, x, causal_mask() if family == "gpt2" else None), rtol=1e-12)


@pytest.mark.parametrize("family", MODELS)
def test_padding_is_a_mask_of_columns_or_deletion(family: str) -> None:
    module, x = second_layer(family, MODELS[family]()), tokens()
    spec = from_transformers(module)
    mask = padding_mask(HIDDEN)
    expected = call(module, x, mask + causal_mask() if spec.causal else mask)
    assert_close(replace(spec, mask=mask)(x), expected, rtol=1e-12)
    assert_close(spec(x[~HIDDEN]), expected[~HIDDEN], rtol=1e-12)


@pytest.mark.parametrize("family", BERT_STYLE)
def test_block_is_attention_and_output_projection(family: str) -> None:
    block, x = MODELS[family]().get_submodule("encoder.layer.1.attention"), tokens()
    spec = from_transformers(block)
    inside: list[Tensor] = []
    block.get_submodule("output.dense").register_forward_hook(lambda _, __, out: inside.append(out))
    after = call(block, x)
    assert_close(spec(x), inside[0][0], rtol=1e-12, what="W_O before the residual")
    norm = block.get_submodule("output.LayerNorm")
    with torch.no_grad():
        assert_close(norm(spec(x) + x), after, rtol=1e-12, what="residual and LayerNorm outside of the specification")


def test_bert_decoder_is_causal() -> None:
    module, x = second_layer("bert", MODELS["bert"](is_decoder=True)), tokens()
    spec = from_transformers(module)
    assert spec.causal
    assert_close(spec(x), call(module, x, causal_mask()), rtol=1e-12)
    block = from_transformers(MODELS["bert"](is_decoder=True).get_submodule("encoder.layer.1.attention"))
    assert block.causal


@pytest.mark.parametrize("options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2_scales(options: dict[str, bool]) -> None:
    module, x = second_layer("gpt2", MODELS["gpt2"](**options)), tokens()
    spec = from_transformers(module)
    assert spec.factor == pytest.approx(1.0 if "scale_attn_weights" in options else (D / HEADS) ** -0.5 / 2, rel=1e-15)
    assert_close(spec(x), call(module, x, causal_mask()), rtol=1e-12)


def test_gpt2_upcast_changes_rounding_only() -> None:
    module, x = second_layer("gpt2", MODELS["gpt2"](reorder_and_upcast_attn=True)), tokens()
    assert_close(from_transformers(module)(x), call(module, x, causal_mask()), rtol=1e-12)


def test_vit_without_biases_and_with_another_head_width() -> None:
    module, x = second_layer("vit", MODELS["vit"](qkv_bias=False, head_dim=5)), tokens()
    spec = from_transformers(module)
    assert (spec.b_q, spec.key_width, spec.out_width) == (None, 5, D)
    assert_close(spec(x), call(module, x), rtol=1e-12)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_eager_models_are_read_exactly(family: str) -> None:
    model: Any = MODELS[family]()
    x = tokens()
    expected = from_transformers(second_layer(family, model))(x)
    model.set_attn_implementation("eager")
    assert_same_bits(from_transformers(second_layer(family, model))(x), expected)
    assert model.config._attn_implementation == "eager"


def test_single_precision_weights_are_taken_exactly() -> None:
    model = MODELS["bert"]().float()
    spec = from_transformers(second_layer("bert", model))
    x = tokens()
    assert_close(spec(x), call(second_layer("bert", model.double()), x), rtol=1e-12)


def test_owns_its_weights_and_leaves_the_module_alone() -> None:
    model, x = MODELS["bert"](), tokens()
    module = second_layer("bert", model)
    next(module.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.detach().clone()) for p in module.parameters()]
    spec = from_transformers(module)
    expected = spec(x)
    for parameter, (gradient, value) in zip(module.parameters(), before, strict=True):
        assert parameter.requires_grad is gradient
        assert_same_bits(parameter.detach(), value)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert_same_bits(spec(x), expected, what="specification after more training of the module")


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_refuses_train_mode(family: str) -> None:
    probability = {"distilbert": "attention_dropout", "gpt2": "attn_pdrop"}.get(family, "attention_probs_dropout_prob")
    module = second_layer(family, MODELS[family](**{probability: 0.25})).train()
    with refused(UnsupportedModelError, "train mode with dropout 0.25"):
        from_transformers(module)
    without = {probability: 0.0} | ({"resid_pdrop": 0.0} if family == "gpt2" else {})
    assert from_transformers(second_layer(family, MODELS[family](**without)).train()).heads == HEADS


def test_refuses_gpt2_residual_dropout_in_train_mode() -> None:
    module = second_layer("gpt2", MODELS["gpt2"](attn_pdrop=0.0, resid_pdrop=0.5)).train()
    with refused(UnsupportedModelError, "resid_dropout"):
        from_transformers(module)


def test_refuses_relative_positions_of_an_old_checkpoint() -> None:
    model = MODELS["bert"](position_embedding_type="relative_key")
    with refused(UnsupportedModelError, "relative_key"):
        from_transformers(second_layer("bert", model))
    with refused(UnsupportedModelError, "relative_key"):
        from_transformers(model.get_submodule("encoder.layer.1.attention"))


def test_refuses_cross_attention() -> None:
    model = OTHERS["bert decoder"]()
    for name in ("encoder.layer.0.crossattention", "encoder.layer.0.crossattention.self"):
        with refused(UnsupportedModelError, "cross attention|no adapter"):
            from_transformers(model.get_submodule(name))
    gpt2 = MODELS["gpt2"](add_cross_attention=True)
    with refused(UnsupportedModelError, "cross attention"):
        from_transformers(gpt2.get_submodule("h.0.crossattention"))


def test_refuses_subclasses_and_changed_parts() -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    class Louder(BertSelfAttention):
        """Same weights, another function."""

    louder: Any = Louder
    with refused(UnsupportedModelError, "a subclass of BertSelfAttention"):
        from_transformers(louder(BertConfig(**COMMON, **TEXT)).eval())

    class Adapted(nn.Linear):
        """As low-rank adapters and quantisation do it."""

    module: Any = second_layer("bert", MODELS["bert"]())
    module.query = Adapted(D, D)
    with refused(UnsupportedModelError, "query is a .*Adapted"):
        from_transformers(module)

    module = second_layer("bert", MODELS["bert"]())
    module.q_norm = nn.LayerNorm(D)
    with refused(UnsupportedModelError, "q_norm.weight"):
        from_transformers(module)

    module = second_layer("bert", MODELS["bert"]())
    torch.nn.utils.parametrizations.spectral_norm(module.value)
    with refused(UnsupportedModelError, "remove_parametrizations"):
        from_transformers(module)


def test_refuses_a_module_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    module = second_layer("bert", MODELS["bert"]())
    original = type(module).forward

    def capped(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(self, hidden_states, *args, **kwargs)
        return out + 1e-6 * hidden_states, weights

    monkeypatch.setattr(type(module), "forward", capped)
    with refused(UnsupportedModelError, "differs from the specification"):
        from_transformers(module)


@pytest.mark.parametrize("family", MODELS)
def test_refuses_hooks_that_change_the_function(family: str) -> None:
    module = second_layer(family, MODELS[family]())
    module.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with refused(UnsupportedModelError, "differs from the specification", "forward hooks"):
        from_transformers(module)


@pytest.mark.parametrize("part", ["", "self", "self.query", "output.dense"])
def test_refuses_hooks_inside_and_on_a_block(part: str) -> None:
    block = MODELS["bert"]().get_submodule("encoder.layer.1.attention")
    block.get_submodule(part).register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with refused(UnsupportedModelError, "differs from the specification", f"forward hooks.*{part}"):
        from_transformers(block)
    block.get_submodule(part)._forward_pre_hooks.clear()
    assert from_transformers(block).heads == HEADS
    assert not any(m._forward_hooks for m in block.modules())


def test_refuses_contradicting_masks() -> None:
    module: Any = second_layer("gpt2", MODELS["gpt2"]())
    module.config = copy.copy(module.config)
    module.config.is_causal = False
    with refused(UnsupportedModelError, "is_causal"):
        from_transformers(module)


def test_the_models_of_this_file_run() -> None:
    for family, build in MODELS.items():
        with torch.no_grad():
            build()(**model_inputs(family))
