"""``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` as specifications."""

import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.models.adapters import own_float64, refuse


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
        return RMSNorm(weight=weight, eps=default if module.eps is None else module.eps)
    bias: Tensor | None = module.bias
    return LayerNorm(weight=weight, bias=None if bias is None else own_float64(bias), eps=module.eps)
