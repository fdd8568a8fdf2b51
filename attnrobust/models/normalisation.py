"""``torch.nn.LayerNorm``, ``torch.nn.RMSNorm`` and transformers' RMSNorms as specifications."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError, first_line
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.models.adapters import class_path, own_float64, refuse
from attnrobust.models.checks.agreement import call_in_float64, float64_twin

RMS_NORMS = frozenset(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}RMSNorm"
    for name in ("Llama", "Mistral", "Qwen2")
)
"""Classes that compute ``weight x (mean x^2 + variance_epsilon)^(-1/2)``."""


def normalisation_from_torch(module: nn.Module) -> LayerNorm | RMSNorm:
    """Read a normalisation over the last axis; what transformers' classes round to float32 inside is left out.

    Raises:
        UnsupportedModelError: A class that is not exactly ``nn.LayerNorm``, ``nn.RMSNorm`` or one of ``RMS_NORMS``, or
            a norm over several axes.
    """
    norm = _transformers_norm(module) if class_path(module) in RMS_NORMS else _torch_norm(module)
    _check(norm, module)
    return norm


def _transformers_norm(module: nn.Module) -> RMSNorm:
    given: Any = module
    return RMSNorm(weight=own_float64(given.weight), eps=float(given.variance_epsilon))


def _torch_norm(module: nn.Module) -> LayerNorm | RMSNorm:
    if type(module) is not nn.LayerNorm and type(module) is not nn.RMSNorm:
        raise UnsupportedModelError(f"{type(module).__name__} is not exactly torch.nn.LayerNorm or torch.nn.RMSNorm")
    if len(module.normalized_shape) != 1:
        raise refuse(module, f"normalises over {len(module.normalized_shape)} axes; only one token's is modelled")
    given: Tensor | None = module.weight
    weight = torch.ones(module.normalized_shape, dtype=torch.float64) if given is None else own_float64(given)
    if isinstance(module, nn.LayerNorm):
        bias: Tensor | None = module.bias
        return LayerNorm(weight=weight, bias=None if bias is None else own_float64(bias), eps=module.eps)
    # Where no eps is given torch takes the machine epsilon of the input's type, in use that of the weights.
    default = torch.finfo(torch.get_default_dtype() if given is None else given.dtype).eps
    return RMSNorm(weight=weight, eps=default if module.eps is None else module.eps)


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
