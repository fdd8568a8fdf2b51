"""Hidden states before the norm of a block: found, compared with the model's own forward pass, refused elsewhere."""

import pytest
import torch

from attnrobust.errors import UnknownNameError, UnsupportedModelError
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.models.model import ModuleModel
from tests.assertions import assert_close
from tests.models.networks.models import HEADS, inputs_of

LAYERS = {
    "llama next word": "model.layers.1.self_attn",
    "qwen2 next word": "model.layers.1.self_attn",
    "gpt2 next word": "transformer.h.1.attn",
    "vit image": "vit.layers.1.attention",
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_tokens_are_the_blocks_own_hidden_states(name: str) -> None:
    model, inputs = ModuleModel(HEADS[name]()), inputs_of(name)
    layer = next(info.name for info in model.layers() if info.name.startswith(LAYERS[name]))
    hidden = model.capture_inputs(f"{layer}@residual", inputs).measure.points
    normed = model.capture_inputs(layer, inputs).measure.points
    found = model.specification(f"{layer}@residual")
    assert isinstance(found, PreNormAttention)
    assert_close(found.norm(hidden), normed, rtol=1e-12, what="what enters the attention")
    assert torch.equal(found(hidden), model.layer(layer)(found.norm(hidden)))
    summed = model.specification(f"{layer}@residual-sum")
    assert torch.equal(hidden, model.capture_inputs(f"{layer}@residual-sum", inputs).measure.points)
    assert_close(summed(hidden) - hidden, found(hidden), rtol=1e-9, what="the sum")


def test_blocks_with_the_norm_behind_are_refused() -> None:
    model = ModuleModel(HEADS["bert sequence"]())
    with pytest.raises(UnsupportedModelError, match="no norm is known in front of"):
        model.specification(f"{model.layers()[0].name}@residual")


def test_a_norm_that_the_attention_does_not_take_is_refused() -> None:
    """The names propose, the forward pass decides."""
    module = HEADS["llama next word"]()
    block = module.model.layers[1]
    block.input_layernorm, block.post_attention_layernorm = block.post_attention_layernorm, block.input_layernorm
    name = "model.layers.1.self_attn@residual"
    model = ModuleModel(module)
    assert model.capture_inputs(name, inputs_of("llama")).measure.n > 1  # the same block with other weights
    own = model.module.model.layers[1]
    own.input_layernorm.register_forward_hook(lambda _, __, output: 1.5 * output)
    with pytest.raises(UnsupportedModelError, match="is not what"):
        model.capture_inputs(name, inputs_of("llama"))


def test_places_that_do_not_exist_are_named() -> None:
    model = ModuleModel(HEADS["llama next word"]())
    with pytest.raises(UnknownNameError, match="residual"):
        model.resolve("model.layers.1.self_attn@resid")
