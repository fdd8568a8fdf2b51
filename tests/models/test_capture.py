"""Texts and tokens of a layer, from the model's own forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.models.capture import capture_tokens, read_texts
from attnrobust.models.checks.agreement import disagreement
from attnrobust.models.from_torch import from_torch
from attnrobust.models.listing import adapter_for
from attnrobust.models.model import ModuleModel
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked
from tests.hf_models import HEADS, LAYER, MODELS, D, model_inputs

BERT_STYLE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def inside(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What enters and leaves a module in one forward call, by hooks of the test's own."""
    seen: dict[str, Tensor] = {}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["in"] = (args[0] if args else kwargs["hidden_states"])[0]
        seen["out"] = (output[0] if isinstance(output, tuple) else output)[0]

    handle = model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen["in"], seen["out"]


@pytest.mark.parametrize("family", MODELS)
def test_captured_tokens_give_the_output_inside_the_model(family: str) -> None:
    original, inputs = MODELS[family](), model_inputs(family)
    path = LAYER.get(family, "encoder.layer.1.attention.self")
    entering, leaving = inside(original, path, inputs)
    model = ModuleModel(original)
    captured = model.capture_inputs(path, inputs, input_id="a")
    assert captured.id == "a"
    assert_close(captured.measure.points, entering, rtol=1e-14)
    assert_close(model.layer(path)(captured.measure.points), leaving, rtol=1e-12)


@pytest.mark.parametrize("family", BERT_STYLE)
def test_block_form(family: str) -> None:
    original, inputs = MODELS[family](), model_inputs(family)
    entering, _ = inside(original, "encoder.layer.1.attention", inputs)
    _, leaving = inside(original, "encoder.layer.1.attention.output.dense", inputs)
    model = ModuleModel(original)
    captured = model.capture_inputs("1.attention", inputs)
    assert_close(captured.measure.points, entering, rtol=1e-14)
    assert_close(model.layer("1.attention")(captured.measure.points), leaving, rtol=1e-12)


def test_bert_decoder_runs_with_its_cache() -> None:
    model = ModuleModel(MODELS["bert"](is_decoder=True))
    assert model.resolve("1.attention.self").mask == "causal"
    captured = model.capture_inputs("1.attention.self", model_inputs("bert"))
    assert captured.measure.n == 9


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, HEADS, 20, batch_first=batch_first, norm_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(6, D, dtype=torch.float64)
    captured = ModuleModel(encoder).capture_inputs("1.self_attn", {"src": x[None] if batch_first else x[:, None]})
    with torch.no_grad():
        first = encoder.layers[0](x[None] if batch_first else x[:, None]).reshape(6, D)
        expected = encoder.layers[1].norm1(first)
    assert_close(captured.measure.points, expected, rtol=1e-12)


def test_a_mask_that_only_the_model_knows_is_refused() -> None:
    encoder = nn.TransformerEncoderLayer(D, HEADS, 20, batch_first=True, dtype=torch.float64).eval()
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    inputs = {"src": torch.randn(1, 6, D, dtype=torch.float64), "src_mask": mask}
    with refused(UnsupportedModelError, "adds a causal mask", r"causal=True\)", "self_attn"):
        ModuleModel(encoder).capture_inputs(None, inputs)
    attention = encoder.self_attn
    adapter = adapter_for(attention)
    assert adapter is not None
    tokens = capture_tokens(encoder, attention, adapter, from_torch(attention, causal=True), inputs)
    assert_same_bits(tokens, inputs["src"][0])


@pytest.mark.parametrize("size", [1e-10, 1e-200, 1e10])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_mask_is_noticed_at_any_size_of_the_output(size: float, offset: float) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(D, HEADS, 20, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        encoder.self_attn.out_proj.weight.mul_(size)
        encoder.self_attn.out_proj.bias.fill_(offset * size * 1e4)  # hides the mask from a bound on the whole output
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    inputs = {"src": torch.randn(1, 6, D, dtype=torch.float64), "src_mask": hidden}
    with refused(UnsupportedModelError, "adds a causal mask"):
        ModuleModel(encoder).capture_inputs(None, inputs)
    assert ModuleModel(encoder).capture_inputs(None, {"src": inputs["src"]}).measure.n == 6


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_a_mask_is_noticed_among_tokens_that_are_nearly_alike(shift: float) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(1, 1, D, dtype=torch.float64) * shift + 1e-3 * torch.randn(1, 6, D, dtype=torch.float64)
    spec, hidden = from_torch(attention), torch.ones(6, 6, dtype=torch.bool).triu(1)
    with torch.no_grad():
        plain, masked = (attention(x, x, x, attn_mask=m, need_weights=False)[0][0] for m in (None, hidden))
    assert disagreement(spec, x[0], plain) is None
    assert disagreement(spec, x[0], masked) is not None


def test_an_output_that_is_zero_agrees_with_zero_only() -> None:
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        attention.out_proj.weight.zero_()
    spec, x = from_torch(attention), torch.randn(4, D, dtype=torch.float64)
    assert disagreement(spec, x, torch.zeros(4, D, dtype=torch.float64)) is None
    assert disagreement(spec, x, torch.full((4, D), 1e-300, dtype=torch.float64)) == 1.0
    assert disagreement(spec, x, torch.full((4, D), torch.nan, dtype=torch.float64)) == torch.inf


def test_padding_is_refused() -> None:
    inputs = model_inputs("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -2:] = 0
    with refused(UnsupportedModelError, "adds a mask"):
        ModuleModel(MODELS["bert"]()).capture_inputs("1.attention.self", inputs)


def test_batches_are_refused() -> None:
    inputs = {"input_ids": model_inputs("bert")["input_ids"].expand(2, -1)}
    with refused(UnsupportedModelError, "not on one input"):
        ModuleModel(MODELS["bert"]()).capture_inputs("1.attention.self", inputs)


class Shared(nn.Module):
    """One attention layer applied as often as asked, to itself or to another sequence."""

    def __init__(self, times: int, *, cross: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.times, self.cross = times, cross

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            other = x.flip(1) if self.cross else x
            x = self.attention(x, other, other)[0]
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_is_not_called_once_is_refused(times: int) -> None:
    with refused(UnsupportedModelError, f"called {times} times"):
        ModuleModel(Shared(times)).capture_inputs("attention", {"x": torch.randn(1, 4, D)})


def test_a_call_of_a_shared_layer_has_its_own_tokens() -> None:
    model = ModuleModel(Shared(3))
    x = torch.randn(1, 4, D, dtype=torch.float64)
    first, second, third = (model.capture_inputs(f"attention#{call}", {"x": x}).measure.points for call in range(3))
    assert_same_bits(first, x[0])
    spec = model.layer("attention#1")
    assert_close(second, spec(first), rtol=1e-13)
    assert_close(third, spec(second), rtol=1e-13)
    assert model.resolve("attention#1").name == "attention#1"
    with refused(InputError, "called 3 times", "no call #3"):
        model.capture_inputs("attention#3", {"x": x})


def test_cross_attention_is_refused() -> None:
    with refused(UnsupportedModelError, "cross attention"):
        ModuleModel(Shared(1, cross=True)).capture_inputs("attention", {"x": torch.randn(1, 4, D)})
    assert ModuleModel(Shared(1)).capture_inputs("attention", {"x": torch.randn(1, 4, D)}).measure.n == 4


def test_eager_models_are_captured_without_their_rounding_and_hooks_are_gone() -> None:
    captured = []
    for implementation in ("sdpa", "eager"):
        original: Any = MODELS["vit"]()
        original.set_attn_implementation(implementation)
        model = ModuleModel(original)
        captured.append(model.capture_inputs("1.attention", model_inputs("vit")).measure.points)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())
    assert_close(captured[0], captured[1], rtol=1e-13)


def test_the_given_module_stays_as_it_is() -> None:
    original = MODELS["bert"]().float().train()
    next(original.parameters()).requires_grad_(False)
    state = {name: (p.dtype, p.requires_grad, p.detach().clone()) for name, p in original.named_parameters()}
    model = ModuleModel(original)
    model.layers()
    model.capture_inputs("1.attention.self", model_inputs("bert"))
    assert all(module.training for module in original.modules())
    for name, parameter in original.named_parameters():
        dtype, gradient, value = state[name]
        assert (parameter.dtype, parameter.requires_grad) == (dtype, gradient)
        assert_same_bits(parameter.detach(), value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [0, 2])
def test_padding_of_a_torch_encoder(padded: int) -> None:
    layer = nn.TransformerEncoderLayer(D, 4, 20, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    assert encoder.use_nested_tensor
    hidden = torch.arange(6)[None] >= 6 - padded
    inputs = {"src": torch.randn(1, 6, D, dtype=torch.float64), "src_key_padding_mask": hidden}
    if padded:
        with refused(UnsupportedModelError, "adds a mask", "delete the padded tokens"):
            ModuleModel(encoder).capture_inputs("0.self_attn", inputs)
    else:
        captured = ModuleModel(encoder).capture_inputs("0.self_attn", inputs)
        assert_same_bits(captured.measure.points, inputs["src"][0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    class Nested(Shared):
        def forward(self, x: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor([x[0], x[0, :2]])
            out: Tensor = self.attention(nested, nested, nested)[0]
            return out

    with refused(UnsupportedModelError, "nested tensors", "enable_nested_tensor=False"), shapes_unchecked():
        ModuleModel(Nested(1)).capture_inputs("attention", {"x": torch.randn(1, 4, D)})


IDS = model_inputs("bert")["input_ids"]


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS.tolist()},
        {"input_ids": IDS.numpy()},
        {"input_ids": IDS, "attention_mask": None, "return_dict": False},
        {"input_ids": IDS, "options": {"one": IDS, "two": [IDS, {"three": 3}]}},
    ],
)
def test_inputs_in_any_form(inputs: Any) -> None:
    model = ModuleModel(MODELS["bert"]())
    expected = model.capture_inputs("1.attention.self", {"input_ids": IDS}).measure.points
    assert_same_bits(model.capture_inputs("1.attention.self", inputs).measure.points, expected)


def test_numbers_in_lists_keep_every_bit() -> None:
    x = torch.randn(1, 4, D, dtype=torch.float64)
    for given in (x.tolist(), x.numpy(), x):
        assert_same_bits(ModuleModel(Shared(1)).capture_inputs("attention", {"x": given}).measure.points, x[0])


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        (IDS, "is a Tensor; give its arguments by name"),
        ([IDS], "is a list; give its arguments by name"),
        ({"input_ids": [[1, 2], [3]]}, "'input_ids' is a list that is no array"),
        ({"input_ids": {"deep": np.array(["word"])}}, "'input_ids.deep' is a ndarray that is no array"),
        ({3: IDS}, "names of arguments are strings"),
        ({"input_ids": "words"}, "cannot be run"),
        ({"input_ids": torch.tensor([[10_000]])}, "vocab_size 30"),
    ],
)
def test_inputs_that_are_none_say_so(inputs: Any, word: str) -> None:
    with shapes_unchecked(), refused(InputError, word, "layer encoder.layer.1.attention.self"):
        ModuleModel(MODELS["bert"]()).capture_inputs("1.attention.self", inputs)


def test_weights_that_hooks_compute_can_be_copied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), Shared(1)).eval()
    prune.random_unstructured(model[0], "weight", 0.5)
    torch.nn.utils.spectral_norm(model[1])
    x = torch.randn(1, 5, D)
    model(x)  # now the computed weights hang on a graph
    captured = ModuleModel(model).capture_inputs("2.attention", {"input": x})
    assert_close(captured.measure.points, model[1](model[0](x)).detach()[0].double(), rtol=1e-5)


def test_arguments_that_the_model_does_not_take_are_told() -> None:
    with refused(InputError, "cannot be run", "its forward takes x"):
        ModuleModel(Shared(1)).capture_inputs("attention", {"y": torch.zeros(1, 4, D)})


def test_parts_of_a_model_without_values_are_refused() -> None:
    model = nn.Sequential(nn.Linear(D, D, device="meta"), Shared(1)).eval()
    with refused(UnsupportedModelError, "0.weight is on the meta device"):
        ModuleModel(model).capture_inputs("1.attention", {"input": torch.zeros(1, 4, D)})


def test_an_eager_mask_and_an_own_mask_are_told_apart() -> None:
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64).eval()
    for mask in (torch.ones(4, 4, dtype=torch.bool).triu(1), torch.randn(4, 4, dtype=torch.float64)):

        class Masked(Shared):
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.attention(x, x, x, attn_mask=mask)[0]  # noqa: B023 - used inside the loop only
                return out

        masked = Masked(1)
        masked.attention = attention
        with pytest.raises(UnsupportedModelError) as caught:
            ModuleModel(masked).capture_inputs("attention", {"x": torch.randn(1, 4, D)})
        assert "sdpa" not in str(caught.value)


def test_a_model_that_cannot_be_run_says_so() -> None:
    model = ModuleModel(MODELS["bert"]())
    with refused(InputError, "cannot be run"):
        model.capture_inputs("1.attention.self", {"input_ids": torch.tensor([[10_000]])})
    with refused(InputError, "cannot be run", "exactly one of"):
        model.capture_inputs("1.attention.self", {"surprise": torch.tensor([[1]])})
    with refused(InputError, "no tokenizer", "--tokens"):
        model.capture("1.attention.self", ["hello"])


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_read_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\r\n\n  two words \u2028 here\n \t\none".encode())
    texts = read_texts(path)
    assert [line.text for line in texts] == ["one", "  two words \u2028 here", "one"]
    assert [line.id[:5] for line in texts] == ["0001-", "0003-", "0005-"]
    assert texts[0].id[5:] == texts[2].id[5:] != texts[1].id[5:]
    assert all(len(line.id) == 13 for line in texts)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no text"), (b"\n \r\n", "no text"), (b"caf\xe9\n", "not UTF-8"), (None, "cannot read")]
)
def test_read_texts_refuses(tmp_path: Path, content: bytes | None, word: str) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with refused(InputError, word, "texts.txt"):
        read_texts(path)
