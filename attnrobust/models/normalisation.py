"""``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` as specifications."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError, first_line
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.models.adapters import own_float64, refuse
from attnrobust.models.checks.agreement import call_in_float64, float64_twin


def normalisation_from_torch(module: nn.Module) -> LayerNorm | RMSNorm:
    """Read an ``nn.LayerNorm`` or ``nn.RMSNorm`` over the last axis; the class must be exactly one of the two.

    Raises:
        UnsupportedModelError: Another class, or a norm over several axes.
    """
    if type(module) is not nn.LayerNorm and type(module) is not nn.RMSNorm:
        raise UnsupportedModelError(f"{type(module).__name__} is not exactly torch.nn.LayerNorm or torch.nn.RMSNorm")
    if len(module.normalized_shape) != 1:
        raise refuse(module, f"normalises over {len(module.normalized_shape)} axes; only one token's is modelled")
    given: Tensor | None = module.weight
    weight = torch.ones(module.normalized_shape, dtype=torch.float64) if given is None else own_float64(given)
    if isinstance(module, nn.RMSNorm):
        # Where no eps is given torch takes the machine epsilon of the input's type, in use that of the weights.
        default = torch.finfo(torch.get_default_dtype() if given is None else given.dtype).eps
        norm: LayerNorm | RMSNorm = RMSNorm(weight=weight, eps=default if module.eps is None else module.eps)
    else:
        bias: Tensor | None = module.bias
        norm = LayerNorm(weight=weight, bias=None if bias is None else own_float64(bias), eps=module.eps)
    _check(norm, module)
    return norm


def _check(norm: LayerNorm | RMSNorm, module: nn.Module) -> None:
    """One float64 call of the module, hooks included, must give the specification's values."""
    twin: Any = float64_twin(module)
    twin.eps = norm.eps  # where torch takes it from the input's type
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, norm.width, generator=generator, dtype=torch.float64).to(norm.weight.device)
    try:
        actual = call_in_float64(twin, (tokens,), {})
    except Exception as error:  # hooks may raise anything
        raise refuse(module, f"could not be called to check its specification: {first_line(error)}") from error
    size = math.sqrt(norm.width) * norm.weight.abs() + (0.0 if norm.bias is None else norm.bias.abs())
    if not bool(((norm(tokens) - actual).abs() <= 1e-12 * size).all()):  # float64 agrees to ~1e-15 of the terms
        raise refuse(module, "its own forward call differs from the specification; remove its hooks or own forward")
