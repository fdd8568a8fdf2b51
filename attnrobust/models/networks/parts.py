"""Reading the small parts of a block: linear maps, normalisations, activations; what is not modelled is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.activation_functions import Activation
from attnrobust.layers.graph.affine import Affine
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.models.adapters import LINEAR, class_path, linear_reasons, linear_weights
from attnrobust.models.normalisation import normalisation_from_torch

CONV1D = "transformers.pytorch_utils.Conv1D"

_TORCH = "torch.nn.modules"
_HF = "transformers.activations"

ACTIVATIONS: Mapping[str, Activation] = {
    f"{_TORCH}.activation.ReLU": "relu",
    f"{_TORCH}.activation.SiLU": "silu",
    f"{_TORCH}.activation.Tanh": "tanh",
    f"{_TORCH}.activation.Sigmoid": "sigmoid",
    f"{_TORCH}.linear.Identity": "identity",
    f"{_HF}.GELUActivation": "gelu",
    f"{_HF}.NewGELUActivation": "gelu_tanh",
    f"{_HF}.GELUTanh": "gelu_tanh",
    f"{_HF}.QuickGELUActivation": "quick_gelu",
    f"{_HF}.SiLUActivation": "silu",
    f"{_HF}.LinearActivation": "identity",
}
"""Activation modules by their class."""

GELU = f"{_TORCH}.activation.GELU"

FUNCTIONS: Mapping[Callable[..., Any], Activation] = {
    nn.functional.relu: "relu",
    torch.relu: "relu",
    nn.functional.gelu: "gelu",
    nn.functional.silu: "silu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}
"""Activation functions by identity."""


def refuse_at(path: str, reason: str) -> UnsupportedModelError:
    """An error that names the module's place in its model."""
    return UnsupportedModelError(f"{path or 'the model'}: {reason}")


def require_class(model: nn.Module, path: str, *expected: str) -> nn.Module:
    """The module at a path, which must be of exactly one of these classes (a subclass may compute something else).

    Raises:
        UnsupportedModelError: It is missing or of another class.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise refuse_at(path, f"there is no such module in {type(model).__name__}") from error
    if class_path(module) not in expected:
        wanted = " or ".join(name.rsplit(".", 1)[1] for name in expected)
        raise refuse_at(path, f"is a {class_path(module)}, not exactly {wanted}")
    return module


def attribute(model: nn.Module, path: str) -> Any:
    """What an attribute path leads to, a module or not."""
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def read_affine(model: nn.Module, path: str) -> Affine:
    """A ``Linear`` or ``Conv1D`` as a node; refused with its path where its weight is not a plain parameter."""
    for reason in linear_reasons(model, path, classes=(LINEAR, CONV1D)):
        raise UnsupportedModelError(reason)
    weight, bias = linear_weights(model, path)
    transposed = class_path(model.get_submodule(path)) == CONV1D
    return Affine(weight if transposed else weight.T.contiguous(), bias)


def read_norm(model: nn.Module, path: str) -> LayerNorm | RMSNorm:
    """A LayerNorm or RMSNorm, compared with one call of its own; another class is refused with its path."""
    try:
        return normalisation_from_torch(model.get_submodule(path))
    except UnsupportedModelError as error:
        raise refuse_at(path, str(error)) from error


def read_activation(model: nn.Module, path: str) -> Activation:
    """The activation that an attribute path leads to, a module or a function."""
    found = attribute(model, path)
    name = activation_name(found)
    if name is None:
        shown = type(found).__name__ if isinstance(found, nn.Module) else getattr(found, "__name__", repr(found))
        raise refuse_at(path, f"the activation {shown} is not modelled")
    return name


def activation_name(found: Any) -> Activation | None:
    """The name of an activation module or function; None where it is not modelled."""
    if not isinstance(found, nn.Module):
        return next((name for function, name in FUNCTIONS.items() if found is function), None)
    if class_path(found) == GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(found.approximate))  # type: ignore[return-value]
    return ACTIVATIONS.get(class_path(found))


def refuse_dropout(model: nn.Module) -> None:
    """Refuse dropout layers that are at work; attention refuses its own probability when it is read.

    Raises:
        UnsupportedModelError: The first such layer by its path.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:  # noqa: SLF001
            raise refuse_at(path, f"is in train mode with dropout {module.p:g}; call model.eval()")
