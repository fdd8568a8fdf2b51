"""Whether what a module puts out is what its specification says, relative to the terms of the output itself."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from attnrobust.layers.attention import Attention
from attnrobust.models.checks.true_float64 import TrueFloat64

AGREEMENT = 1e-10  # of the part that depends on the tokens; float64 forwards agree to ~1e-14, wrong masks to ~1e-1
EPS = torch.finfo(torch.float64).eps
SPREAD = 4.0  # of the check's scores: neither all alike (any score function would pass) nor one-hot
LONGEST_SCALE = 1e8
CHECK_SIZES = (4, 7)  # tokens of the two forward calls


def disagreement(
    spec: Attention, tokens: Float[Tensor, "n d"], actual: Float[Tensor, "n e"], *, mask: Tensor | None = None
) -> float | None:
    """How far an output is from the specification, or None if it agrees up to the rounding of float64.

    Entry by entry the difference may be ``1e-10 sum_h P_h |v_h - mean v_h| |w_o^h|``, the size of the part that a wrong
    mask or score would change, plus the rounding of all terms of the sums: ``4 (n + d + h v) eps`` times the same
    expression with every factor by its absolute value, and ``8 eps |b_o|``. Nothing in it is absolute, so that layers
    with outputs of any size are held to the same.

    Args:
        spec: The specification.
        tokens: What went in.
        actual: What came out.
        mask: An additive mask to apply in place of the specification's own.

    Returns:
        The largest difference, relative to the larger of the two outputs at that entry's column (1 or more: nothing in
        common; infinite for NaN), or None.
    """
    layer = spec if mask is None else replace(spec, mask=mask)
    expected = layer(tokens)
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.to(expected) - expected).abs()
    wrong = ~(difference <= _allowed(layer, tokens))
    if not bool(wrong.any()):
        return None
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    size = torch.maximum(actual.abs(), expected.abs()).amax(dim=0).to(expected)
    return float((difference / size.clamp_min(torch.finfo(torch.float64).tiny))[wrong].max())


def _allowed(spec: Attention, tokens: Tensor) -> Tensor:
    weights = spec.weights(tokens)
    values = spec.values(tokens)
    depends = _combined(spec, weights @ (values - values.mean(dim=-2, keepdim=True)).abs())
    terms = torch.einsum("nd,hdv->hnv", tokens.abs(), spec.w_v.abs())
    if spec.b_v is not None:
        terms = terms + spec.b_v.abs()[:, None, :]
    additions = tokens.shape[0] + spec.width + spec.heads * spec.value_width
    allowed = AGREEMENT * depends + 4 * additions * EPS * _combined(spec, weights @ terms)
    return allowed if spec.b_o is None else allowed + 8 * EPS * spec.b_o.abs()


def _combined(spec: Attention, heads: Float[Tensor, "h n v"]) -> Float[Tensor, "n e"]:
    if spec.w_o is None:
        return spec.combine(heads)
    return torch.einsum("hnv,hve->ne", heads, spec.w_o.abs())


def check_tokens(spec: Attention) -> tuple[Float[Tensor, "n d"], ...]:
    """Two fixed inputs: standard normal tokens, and tokens scaled until the scores spread by about ``SPREAD``.

    Without the second one, tiny query and key weights would make the softmax uniform whatever the scores are.
    """
    generator = torch.Generator().manual_seed(0)
    plain, scaled = (
        torch.randn(n, spec.width, generator=generator, dtype=torch.float64).to(spec.device) for n in _sizes(spec)
    )
    scale = 1.0
    for _ in range(6):  # the spread is between linear and quadratic in the scale, so the exponent halves its error
        scores = scale * scaled
        spread = _spread(spec.factor * spec.queries(scores) @ spec.keys(scores).transpose(-1, -2))
        if not 0.0 < spread < float("inf"):
            break
        scale = min(LONGEST_SCALE, max(1.0 / LONGEST_SCALE, scale * (SPREAD / spread) ** 0.5))
    return plain, scale * scaled


def _sizes(spec: Attention) -> tuple[int, ...]:
    """Token counts of the check; positions that are given token by token fix them."""
    fixed = [getattr(part, "length", None) for part in (spec.rotary, spec.head_bias)]
    return next(((length, length) for length in fixed if length is not None), CHECK_SIZES)


def _spread(scores: Float[Tensor, "h n n"]) -> float:
    return float((scores.amax(dim=-1) - scores.amin(dim=-1)).max())


# ---- calling a module ------------------------------------------------------------------------------------------------


def float64_twin(module: nn.Module, *, implementation: str = "sdpa") -> nn.Module:
    """A copy of a module's structure, with its hooks and own ``forward``, that shares the weights.

    Hugging Face configurations name one implementation of attention, in the copy only; a compiled forward is left out,
    as it is the same function.
    """
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: None if part is None else float64_twin(part, implementation=implementation)
        for name, part in module._modules.items()  # noqa: SLF001
    }
    twin.__dict__["_compiled_call_impl"] = None
    config = getattr(module, "config", None)
    if hasattr(config, "_attn_implementation"):
        own: Any = copy.copy(config)
        own._attn_implementation = implementation  # noqa: SLF001
        twin.config = own
    return twin


def call_in_float64(twin: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One forward call of a ``float64_twin`` with float64 copies of its weights; nothing is changed."""
    state = {
        name: value.detach().to(torch.float64) if value.is_floating_point() else value
        for name, value in (*twin.named_parameters(), *twin.named_buffers())
    }
    with torch.no_grad(), TrueFloat64():
        return functional_call(twin, state, args, dict(kwargs))
