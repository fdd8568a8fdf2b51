"""What a user gives as the input of a model's forward call, as tensors on the model's device in float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnrobust.errors import InputError

Given = Tensor | np.ndarray | list[Any] | tuple[Any, ...] | Mapping[str, Any] | bool | int | float | str | None
"""A value of a forward call: numbers in any form, options, or mappings of these."""


def forward_arguments(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a forward call.

    Args:
        inputs: Tensors, numpy arrays and (nested) lists of numbers become tensors, floating-point ones in float64;
            nested mappings are followed; None, booleans, single numbers and strings stay as they are.
        device: Where the tensors go.

    Raises:
        InputError: No mapping of names to values, or a value that is not numbers.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"the model's input is a {type(inputs).__name__}; give its arguments by name, as in "
            "{'input_ids': tensor of shape (1, n)}"
        )
    unnamed = [name for name in inputs if not isinstance(name, str)]
    if unnamed:
        raise InputError(f"the model's input has the name {unnamed[0]!r}; names of arguments are strings")
    return {name: _value(name, value, device) for name, value in inputs.items()}


def _value(name: str, value: Any, device: torch.device) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _value(f"{name}.{key}", part, device) for key, part in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor | Mapping) for part in value):
        return type(value)(_value(f"{name}.{place}", part, device) for place, part in enumerate(value))
    tensor = value if isinstance(value, Tensor) else _tensor(name, value)
    return tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        array = np.asarray(value)  # Python floats stay float64
        return torch.from_numpy(np.array(array))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"the model's input {name!r} is a {type(value).__name__} that is no array of numbers (rows of one length)"
        ) from error
