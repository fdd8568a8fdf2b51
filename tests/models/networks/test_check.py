"""Every family and head: the graph is the model, at every depth, and what is not is refused by the first state."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.models.checks.true_float64 import TrueFloat64
from attnrobust.models.model import ModuleModel
from attnrobust.models.networks.plan import HeadName
from attnrobust.models.networks.reading import capture_states
from tests.assertions import assert_close, assert_same_bits, refused
from tests.hf_models import MODELS, randomised
from tests.models.networks.models import HEADS, TORCH, encoder_layer, inputs_of, torch_inputs, torch_model

IMPLEMENTATIONS = ("eager", "sdpa")
ROUNDING = ("vit", "deit")  # their eager attention rounds to float32


def own_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model itself gives, rows (r, e), by the test's own reading of its output."""
    rounding = type(model).__name__.startswith(("Llama", "Mistral", "Qwen2"))  # inside, in any precision
    with torch.no_grad(), TrueFloat64() if rounding else nullcontext():
        output: Any = model(**inputs)
    tensor = output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]
    assert isinstance(tensor, Tensor)
    return tensor[0] if tensor.ndim == 3 else tensor


def own_states(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The hidden states that enter every block, as transformers itself records them, and one after the last."""
    with torch.no_grad():
        found: Any = model(**inputs, output_hidden_states=True)
    return tuple(state[0] for state in found.hidden_states)


def row_of(name: str) -> int | None:
    return 2 if name.endswith("words") else None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.one_in(2)
def test_the_logits_of_every_head(name: str, implementation: str) -> None:
    model, inputs, row = HEADS[name](attn_implementation=implementation), inputs_of(name), row_of(name)
    if implementation == "eager" and name.startswith(ROUNDING):
        with refused(UnsupportedModelError, "state block:1", "float32", "sdpa"):
            ModuleModel(model).network(inputs)
        return
    read = ModuleModel(model).network(inputs, row=row)
    expected = own_output(model, inputs)
    if row is not None or name.endswith("next word"):
        expected = expected[-1 if row is None else row][None]
    assert_close(read.graph(read.input.measure.points), expected, rtol=1e-12)
    assert read.info.labels == (() if "word" in name else ("LABEL_0", "LABEL_1", "LABEL_2"))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_hidden_states_and_their_mean(name: str) -> None:
    model, inputs = MODELS[name](), inputs_of(name)
    expected = own_output(model, inputs)
    wrapped = ModuleModel(model)
    states, mean = wrapped.network(inputs), wrapped.network(inputs, head="mean")
    assert_close(states.graph(states.input.measure.points), expected, rtol=1e-12)
    assert_close(mean.graph(mean.input.measure.points), expected.mean(dim=0)[None], rtol=1e-12)
    one = wrapped.network(inputs, head="states", row=1)
    assert_close(one.graph(one.input.measure.points), expected[1][None], rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_depths_are_the_states_that_enter_the_blocks(name: str) -> None:
    model, inputs = MODELS[name](), inputs_of(name)
    wrapped, expected = ModuleModel(model), own_output(model, inputs)
    captured, own = capture_states(wrapped.module, inputs), own_states(model, inputs)
    for depth, (name_of, state) in enumerate(zip(("embeddings", "block:1"), own, strict=False)):
        read = wrapped.network(inputs, at=f"block:{depth}")
        assert (read.info.at, read.info.blocks, read.info.depths) == (name_of, 2, ("embeddings", "block:1"))
        assert_same_bits(captured[name_of], read.input.measure.points)
        assert_close(read.input.measure.points, state, rtol=1e-14)
        assert_close(read.graph(state), expected, rtol=1e-12)


@pytest.mark.parametrize("head", ["states", "mean"])
@pytest.mark.parametrize("name", ["bert sequence", "gpt2 next word", "vit image"])
def test_hidden_states_of_models_with_a_head(name: str, head: HeadName) -> None:
    model, inputs = HEADS[name](), inputs_of(name)
    read = ModuleModel(model).network(inputs, head=head)
    base: Any = model
    expected = own_output(base.base_model, inputs)
    expected = expected if head == "states" else expected.mean(dim=0)[None]
    assert_close(read.graph(read.input.measure.points), expected, rtol=1e-12)


def test_a_causal_bert() -> None:
    model, inputs = HEADS["bert tokens"](is_decoder=True), inputs_of("bert")
    read = ModuleModel(model).network(inputs)
    assert_close(read.graph(read.input.measure.points), own_output(model, inputs), rtol=1e-12)
    moved = read.input.measure.points.clone()
    moved[-1] += 1.0
    assert_same_bits(read.graph(moved)[:-1], read.graph(read.input.measure.points)[:-1])


@pytest.mark.parametrize("name", TORCH)
def test_torch_encoders(name: str) -> None:
    model, inputs = torch_model(name), torch_inputs(name)
    expected = own_output(model, inputs) if name != "batch second" else model(**inputs).detach()[:, 0]
    read = ModuleModel(model).network(inputs)
    assert_close(read.graph(read.input.measure.points), expected, rtol=1e-12)
    assert read.info.blocks == {"sequential": 3}.get(name, 1 if name.endswith("layer") else 2)
    if name == "sequential":
        assert read.info.depths == ("input", "embeddings", "block:1", "block:2")
        whole = ModuleModel(model).network(inputs, at="input")
        assert_close(whole.graph(inputs["input"][0]), expected, rtol=1e-12)


# ---- what the model does besides -------------------------------------------------------------------------------------


def nudge(scale: float) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output) * (1.0 + scale)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("bert.encoder.layer.0", "block:1"),
        ("bert.encoder.layer.1.attention.output", "block:2"),
        ("bert.encoder.layer.1.output.dense", "block:2"),
        ("bert.pooler", "head.classifier"),
        ("classifier", "head.classifier"),
    ],
)
def test_a_hook_is_refused_by_the_first_state_that_it_changes(path: str, state: str) -> None:
    model = ModuleModel(HEADS["bert sequence"]())
    model.module.get_submodule(path).register_forward_hook(nudge(1e-6))
    with refused(UnsupportedModelError, f"state {state} "):
        model.network(inputs_of("bert"))


def test_a_hook_inside_attention_is_refused_when_it_is_read() -> None:
    model = ModuleModel(HEADS["bert sequence"]())
    model.module.get_submodule("bert.encoder.layer.1.attention.self").register_forward_hook(nudge(1e-6))
    with refused(UnsupportedModelError, "bert.encoder.layer.1.attention: ", "hooks"):
        model.network(inputs_of("bert"))


def test_a_fast_path_that_computes_another_function_is_refused() -> None:
    """Without hooks and gradients torch's encoder layer takes the tanh form of GELU for the exact one."""
    model = randomised(encoder_layer(activation=nn.GELU(approximate="tanh")))
    with refused(UnsupportedModelError, "state block:1", "fast path"):
        ModuleModel(model).network(torch_inputs("post-norm layer"))
    slow = randomised(encoder_layer(activation=nn.GELU(approximate="tanh"), batch_first=False))
    inputs = torch_inputs("batch second")
    read = ModuleModel(slow).network(inputs)
    assert_close(read.graph(read.input.measure.points), slow(**inputs).detach()[:, 0], rtol=1e-12)


def test_what_happens_between_two_blocks_is_refused() -> None:
    model = ModuleModel(HEADS["bert sequence"]())
    model.module.get_submodule("bert.encoder.layer.1").register_forward_pre_hook(
        lambda _, args: (args[0] * (1 + 1e-6), *args[1:])
    )
    with refused(UnsupportedModelError, "state block:1", "bert.encoder.layer.1", "between"):
        model.network(inputs_of("bert"))


def test_rounding_to_float32_is_refused() -> None:
    model = ModuleModel(HEADS["bert sequence"]())
    model.module.get_submodule("classifier").register_forward_hook(lambda _, __, y: y.float().double())
    with refused(UnsupportedModelError, "state head.classifier"):
        model.network(inputs_of("bert"))


def test_padding_is_refused() -> None:
    inputs = inputs_of("bert")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    with refused(UnsupportedModelError, "state block:1", "padding"):
        ModuleModel(HEADS["bert sequence"]()).network(inputs | {"attention_mask": mask})


def test_a_mask_given_to_a_torch_encoder_is_refused() -> None:
    inputs = torch_inputs("post-norm encoder")
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    with refused(UnsupportedModelError, "state block:1", "causal mask"):
        ModuleModel(torch_model("post-norm encoder")).network(inputs | {"mask": mask})


def test_a_batch_is_refused() -> None:
    ids = inputs_of("bert")["input_ids"]
    with refused(UnsupportedModelError, "2 inputs"):
        ModuleModel(HEADS["bert sequence"]()).network({"input_ids": torch.cat([ids, ids])})


def test_a_classifier_that_reads_another_token_is_refused() -> None:
    """GPT-2 classifies the last token that is not padding."""
    model = HEADS["gpt2 sequence"](pad_token_id=4)
    ids = torch.tensor([[3, 5, 7, 4]])
    with refused(UnsupportedModelError, "state head.score"):
        ModuleModel(model).network({"input_ids": ids})


# ---- questions that have no answer -----------------------------------------------------------------------------------


def test_questions() -> None:
    model = ModuleModel(HEADS["bert sequence"]())
    with refused(UnknownNameError, "block:7", "block:1"):
        model.network(inputs_of("bert"), at="block:7")
    with refused(InputError, "row=1"):
        model.network(inputs_of("bert"), row=1)
    with refused(InputError, "no head of its own"):
        ModuleModel(MODELS["bert"]()).network(inputs_of("bert"), head="logits")
    with refused(InputError, "row="):
        ModuleModel(HEADS["bert words"]()).network(inputs_of("bert"))
    with refused(InputError, "row 40"):
        ModuleModel(HEADS["bert words"]()).network(inputs_of("bert"), row=40)
