"""A model's forward pass with every rounding to a shorter type inside it left out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SHORT = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class TrueFloat64(TorchFunctionMode):
    """While it is active, what would be computed or stored in a shorter floating-point type is in float64.

    Models of any precision round to float32 inside: tables of rotary positions, RMSNorm, the softmax of the eager code,
    and some cast queries and keys. Those roundings (4e-9 to 7e-7 of the output of a rotary layer) are no part of the
    function that a specification states; without them a model in float64 agrees with it to about 1e-15.

    ``x.float()`` and its kin become ``x.double()``; every argument, positional or by name, that is a short type becomes
    ``torch.float64``. What is already stored in a short type keeps its values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            return Tensor.double(args[0])
        return func(*map(_longer, args), **{name: _longer(value) for name, value in (kwargs or {}).items()})


def _longer(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORT else value
