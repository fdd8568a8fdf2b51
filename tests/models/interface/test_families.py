"""Every family's layers against what the model itself computes, in float64 without roundings inside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.models.checks.true_float64 import TrueFloat64
from attnrobust.models.from_transformers import from_transformers
from attnrobust.models.model import ModuleModel
from tests.assertions import assert_close, refused
from tests.hf_families import GROUPED, READ, REFUSED, family, forward_inputs

N = 9  # longer than the windows of the small models

FAST = (
    "opt", "clip text", "albert", "gpt_bigcode", "llama, yarn", "mistral", "qwen2", "phi", "cohere", "modernbert",
    "t5", "swin", "gpt_neo", "gptj", "falcon, alibi", "bloom", "mpt", "mpnet",
)  # fmt: skip
"""One family for every kind of positions, shared keys and layout."""


def inside(model: nn.Module, path: str, output: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What enters a module and leaves its part ``output`` in one forward call."""
    seen: dict[str, Tensor] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["in"] = (args[0] if args else kwargs["hidden_states"])[0]

    def after(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
        seen["out"] = (out[0] if isinstance(out, tuple) else out)[0]

    module = model.get_submodule(path)
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.get_submodule(output).register_forward_hook(after)
    with torch.no_grad(), TrueFloat64():
        model(**inputs)
    return seen["in"], seen["out"]


def check(name: str) -> None:
    model = ModuleModel(READ[name]())
    listed = [layer for layer in model.layers() if layer.supported]
    others = [layer.reason for layer in model.layers() if not layer.supported]
    assert len(listed) >= 2
    assert all("cross attention" in reason for reason in others)
    inputs = forward_inputs(model.module, N)
    for layer in (listed[0], listed[-1]):
        output = {"albert": "dense", "bloom": "dense"}.get(name, "")
        entering, leaving = inside(model.module, layer.name, output, inputs)
        if entering.ndim == 2 and not (name == "swin" and layer is listed[0]):  # that one is called on four windows
            assert_close(model.layer(layer.name)(entering), leaving, rtol=1e-12, what=f"{name}: {layer.name}")


@pytest.mark.parametrize("name", FAST)
def test_a_family_agrees_with_the_model(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(READ.keys() - set(FAST)))
def test_every_other_family_agrees_with_the_model(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "deberta", "deepseek_v3", "olmo, clip_qkv"])
def test_what_is_not_modelled_is_refused_by_name(name: str) -> None:
    refuses(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_family_is_refused_by_name(name: str) -> None:
    refuses(name)


def refuses(name: str) -> None:
    build, words = REFUSED[name]
    layers = ModuleModel(build()).layers()
    assert layers
    assert not any(layer.supported for layer in layers)
    assert all(word in layer.reason for word in words for layer in layers)


# ---- what a layer says of itself -------------------------------------------------------------------------------------


def test_positions_windows_and_shared_keys_are_listed() -> None:
    first, second = ModuleModel(READ["qwen2"]()).layers()
    assert (first.heads, first.kv_heads, first.rotary, first.window) == (4, 2, "half, 6 of 6", None)
    assert second.window == 5
    layers = ModuleModel(READ["phi"]()).layers()
    assert layers[0].rotary == "half, 2 of 6"
    assert ModuleModel(READ["bloom"]()).layers()[0].bias == "slopes"
    assert ModuleModel(READ["t5"]()).layers()[0].bias == "table"


def test_frequencies_are_the_models_own() -> None:
    model: Any = READ["llama, llama3 scaling"]()
    spec: Any = ModuleModel(model).layer("0.self_attn")
    assert torch.equal(spec.rotary.frequencies, model.rotary_emb.inv_freq.double())
    with torch.no_grad():
        model.rotary_emb.inv_freq.mul_(1.01)
    changed: Any = ModuleModel(model).layer("0.self_attn")
    assert torch.equal(changed.rotary.frequencies, model.rotary_emb.inv_freq.double())
    assert spec.digest != changed.digest


def test_weights_are_read_to_the_last_bit() -> None:
    model: Any = READ["qwen2"]()
    spec: Any = ModuleModel(model).layer("0.self_attn")
    attention = model.layers[0].self_attn
    assert torch.equal(spec.w_q, attention.q_proj.weight.reshape(4, 6, 24).transpose(1, 2))
    assert torch.equal(spec.w_v[1], attention.v_proj.weight.reshape(2, 6, 24)[0].T)
    assert torch.equal(spec.b_k[3], attention.k_proj.bias.reshape(2, 6)[1])
    assert torch.equal(spec.w_o, attention.o_proj.weight.T.reshape(4, 6, 24))


def test_a_layer_that_takes_positions_needs_its_model() -> None:
    model = READ["llama"]()
    module = model.get_submodule("layers.0.self_attn")
    with refused(UnsupportedModelError, "give the whole model"):
        from_transformers(module)
    assert from_transformers(module, model=model).rotary is not None


# ---- what the interface shows ----------------------------------------------------------------------------------------


def test_an_unknown_argument_of_the_interface_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = READ["opt"]()
    kind: Any = type(model.get_submodule("decoder.layers.0.self_attn"))
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: original(self, *args, softcap=30.0, **kwargs))
    with refused(UnsupportedModelError, "soft-cap", "softcap", "not modelled"):
        from_transformers(model.get_submodule("decoder.layers.0.self_attn"))


def test_queries_that_are_not_affine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def clamped(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return original(q.clamp(-50.0, 50.0), k, *args, **kwargs)

    model = READ["llama"]()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", clamped)
    (first, _) = ModuleModel(model).layers()
    assert "query vectors are not affine" in first.reason


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (first, _) = ModuleModel(family("Llama", GROUPED, rope_parameters=scaling)()).layers()
    assert "depend on the number of tokens" in first.reason


def test_a_layer_that_contradicts_its_configuration_is_refused() -> None:
    model: Any = READ["qwen2"]()
    model.layers[1].self_attn.sliding_window = None  # the model's masks have a window
    first, second = ModuleModel(model).layers()
    assert first.supported
    assert "calls it sliding_attention" in second.reason


def test_a_window_of_another_size_is_noticed_in_the_model() -> None:
    model = ModuleModel(READ["qwen2"]())
    attention: Any = model.module.get_submodule("layers.1.self_attn")
    attention.sliding_window = 6  # the model's masks stay at 5
    assert model.resolve("1.self_attn").window == 6
    with refused(UnsupportedModelError, "differs from the specification"):
        model.capture_inputs("1.self_attn", forward_inputs(model.module, N))
