"""``torch.nn.MultiheadAttention`` against its specification."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.masks import padding_mask
from attnrobust.models.from_torch import from_torch
from attnrobust.models.listing import list_layers
from tests.assertions import assert_close, assert_same_bits, refused

D, HEADS, N = 12, 3, 7
HIDDEN = torch.tensor([False, False, True, False, False, True, True])


def module(**options: Any) -> nn.MultiheadAttention:
    """A layer with biases that are not zero, as they are at initialisation."""
    built = nn.MultiheadAttention(D, HEADS, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.6)
    return built


def outputs(layer: nn.MultiheadAttention, x: Tensor, **call: Any) -> Tensor:
    tokens = x[None] if layer.batch_first else x[:, None]
    with torch.no_grad():
        out = layer(tokens, tokens, tokens, need_weights=False, **call)[0]
    return out[0] if layer.batch_first else out[:, 0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_agrees(batch_first: bool, bias: bool) -> None:
    layer, x = module(batch_first=batch_first, bias=bias), torch.randn(N, D, dtype=torch.float64)
    assert_close(from_torch(layer)(x), outputs(layer, x), rtol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_is_a_mask_of_columns_or_deletion(batch_first: bool) -> None:
    layer, x = module(batch_first=batch_first), torch.randn(N, D, dtype=torch.float64)
    expected = outputs(layer, x, key_padding_mask=HIDDEN[None])
    assert_close(from_torch(layer, mask=padding_mask(HIDDEN))(x), expected, rtol=1e-12)
    assert_close(from_torch(layer)(x[~HIDDEN]), expected[~HIDDEN], rtol=1e-12)


def test_causal_and_additive_masks() -> None:
    layer, x = module(batch_first=True), torch.randn(N, D, dtype=torch.float64)
    causal = torch.zeros(N, N, dtype=torch.float64).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf)
    assert_close(from_torch(layer, causal=True)(x), outputs(layer, x, attn_mask=causal), rtol=1e-12)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    assert_close(from_torch(layer, mask=hidden)(x), outputs(layer, x, attn_mask=hidden), rtol=1e-12)
    bias = torch.randn(N, N, dtype=torch.float64)
    assert_close(from_torch(layer, mask=bias)(x), outputs(layer, x, attn_mask=bias), rtol=1e-12)


def test_single_precision_weights_are_taken_exactly() -> None:
    layer, x = module().float(), torch.randn(N, D, dtype=torch.float64)
    assert_close(from_torch(layer)(x), outputs(copy.deepcopy(layer).double(), x), rtol=1e-12)


def test_owns_its_weights_and_leaves_the_module_alone() -> None:
    layer, x = module(), torch.randn(N, D, dtype=torch.float64)
    layer.out_proj.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in layer.named_parameters()}
    spec = from_torch(layer)
    expected = spec(x)
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad is before[name][0]
        assert_same_bits(parameter.detach(), before[name][1])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    assert_same_bits(spec(x), expected, what="specification after more training of the module")


class _Louder(nn.MultiheadAttention):
    """Same weights, another function."""


def _parametrised() -> nn.MultiheadAttention:
    layer = module()
    torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
    return layer


def _with_a_gate() -> nn.MultiheadAttention:
    layer = module()
    layer.register_parameter("gate", nn.Parameter(torch.ones(1)))
    return layer


def _pruned() -> nn.MultiheadAttention:
    layer = module()
    prune.random_unstructured(layer, "in_proj_weight", 0.5)
    return layer


def _parametrised_input() -> nn.MultiheadAttention:
    layer = module()
    torch.nn.utils.parametrizations.weight_norm(layer, "in_proj_weight")
    return layer


def _old_spectral_norm() -> nn.MultiheadAttention:
    layer = module()
    torch.nn.utils.spectral_norm(layer.out_proj)
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.MultiheadAttention], str]] = {
    "kdim": (lambda: module(kdim=5), "width 5"),
    "vdim": (lambda: module(vdim=5), "width 5"),
    "bias_kv": (lambda: module(add_bias_kv=True), "add_bias_kv"),
    "zero_attn": (lambda: module(add_zero_attn=True), "add_zero_attn"),
    "dropout": (lambda: module(dropout=0.1).train(), "dropout 0.1"),
    "subclass": (lambda: _Louder(D, HEADS).eval(), "_Louder"),
    "parametrised": (_parametrised, "remove_parametrizations"),
    "hook": (_old_spectral_norm, "weight_orig|hook"),
    "pruned": (_pruned, "prune.remove"),
    "parametrised input": (_parametrised_input, "remove_parametrizations"),
    "meta device": (lambda: module().to("meta"), "meta device, without values"),
    "extra parameter": (_with_a_gate, "gate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    build, word = REFUSED[name]
    layer = build()
    with refused(UnsupportedModelError, word):
        from_torch(layer)


def _with_hook() -> nn.MultiheadAttention:
    layer = module()
    layer.register_forward_hook(lambda _, __, out: (3 * out[0], out[1]))
    return layer


def _with_pre_hook() -> nn.MultiheadAttention:
    layer = module()
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    return layer


def _with_own_forward() -> nn.MultiheadAttention:
    layer = module()
    original: Any = layer.forward
    layer.forward = lambda q, k, v, **more: original(q, k, v, **(more | {"attn_mask": torch.eye(len(q)).bool()}))  # type: ignore[method-assign]
    return layer


def _with_breaking_hook() -> nn.MultiheadAttention:
    layer = module()
    layer.register_forward_hook(lambda _, __, out: (out[0].to_no_such_type(), out[1]))
    return layer


def _with_tiny_scores() -> nn.MultiheadAttention:
    """Scores of 1e-20, and a hook that changes nothing but them: only scaled tokens tell."""
    layer = module(bias=False)
    with torch.no_grad():
        layer.in_proj_weight[: 2 * D].mul_(1e-6)
    layer.register_forward_pre_hook(_negative_queries)
    return layer


def _negative_queries(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (-args[0], *args[1:])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_with_hook, ("differs from the specification", "forward hooks", "remove them")),
        (_with_pre_hook, ("differs from the specification", "forward hooks")),
        (_with_own_forward, ("differs from the specification", "replaced forward")),
        (_with_breaking_hook, ("could not be called", "forward hooks")),
        (_with_tiny_scores, ("differs from the specification",)),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_refuses_a_module_whose_call_is_another_function(
    build: Callable[[], nn.MultiheadAttention], words: tuple[str, ...], size: float
) -> None:
    layer = build()
    with torch.no_grad():
        layer.out_proj.weight.mul_(size)
    with refused(UnsupportedModelError, *words):
        from_torch(layer)
    (listed,) = list_layers(layer)
    assert not listed.supported


def test_hooks_that_change_nothing_are_read_and_stay() -> None:
    layer, seen = module(), list[Tensor]()
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    x = torch.randn(N, D, dtype=torch.float64)
    assert_close(from_torch(layer)(x), outputs(layer, x), rtol=1e-12)
    assert len(layer._forward_hooks) == 1


@pytest.mark.parametrize("size", [1e-100, 1e-8, 1e8])
def test_weights_of_any_size_are_read(size: float) -> None:
    layer = module()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(size)
    assert from_torch(layer).heads == HEADS


def test_every_reason_is_named() -> None:
    layer = module(add_bias_kv=True, add_zero_attn=True, dropout=0.5).train()
    torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
    with refused(UnsupportedModelError, "add_bias_kv", "add_zero_attn", "dropout 0.5", "remove_parametrizations"):
        from_torch(layer)


def test_train_mode_without_dropout_is_the_same_function() -> None:
    layer, x = module(), torch.randn(N, D, dtype=torch.float64)
    expected = from_torch(layer)(x)
    assert layer.train().training
    assert_same_bits(from_torch(layer)(x), expected)
    assert layer.training


def test_equal_widths_given_by_name_are_self_attention() -> None:
    assert isinstance(from_torch(module(kdim=D, vdim=D)), Attention)


def test_padding_mask_refuses() -> None:
    with refused(InputError, "every token"):
        padding_mask(torch.tensor([True, True]))
    with refused(InputError, "one boolean per token"):
        padding_mask(torch.tensor([0.0, 1.0]))
