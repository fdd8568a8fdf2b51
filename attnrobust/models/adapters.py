"""What every adapter shares: reading plain linear maps, splitting heads, and refusing what is not modelled."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention


class Adapter(ABC):
    """Reads one kind of attention module into an ``Attention`` specification, or refuses it by name."""

    @abstractmethod
    def reads(self, module: nn.Module) -> bool:
        """Whether this adapter is for exactly the module's class (subclasses may compute something else)."""

    @abstractmethod
    def kind(self, module: nn.Module) -> str:
        """The module's class and what the specification covers, for listings."""

    @abstractmethod
    def spec(self, module: nn.Module) -> Attention:
        """The specification; raises UnsupportedModelError where the module is not exactly that."""

    def output_module(self, module: nn.Module) -> nn.Module:
        """The submodule whose output is the specification's output."""
        return module

    @abstractmethod
    def input_tokens(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Float[Tensor, "b n d"]:
        """The tokens that enter the module, from the arguments of one forward call."""

    def output_tokens(self, module: nn.Module, output: Any) -> Float[Tensor, "b n e"]:
        """The tokens that leave ``output_module``, from the value of one forward call."""
        tokens = output[0] if isinstance(output, tuple) else output
        if not isinstance(tokens, Tensor):
            raise refuse(module, "did not put out a tensor")
        return tokens


def class_path(module: nn.Module) -> str:
    """Full dotted name of the module's class; the identity that adapters compare (no import needed)."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def refuse(module: nn.Module, reason: str) -> UnsupportedModelError:
    """An error that names the module's class and the reason."""
    return UnsupportedModelError(f"{type(module).__name__}: {reason}")


def refuse_foreign_parameters(module: nn.Module, linears: Iterable[str], *, own: Iterable[str] = ()) -> None:
    """Refuse parameters other than ``own`` and those of the named linear maps, so that nothing is left unread."""
    expected = {f"{name}.{part}" for name in linears for part in ("weight", "bias")} | set(own)
    foreign = sorted({name for name, _ in module.named_parameters()} - expected)
    if foreign:
        raise refuse(module, f"has parameters that are not modelled: {', '.join(foreign[:6])}")


def refuse_active_dropout(module: nn.Module, dropouts: Iterable[str]) -> None:
    """Refuse train mode with a dropout probability above 0 (attributes are ``nn.Dropout`` modules or numbers)."""
    for name in dropouts:
        found: Any = getattr(module, name)
        probability = float(found.p if isinstance(found, nn.Dropout) else found)
        training = bool(found.training if isinstance(found, nn.Dropout) else module.training)
        if training and probability > 0:
            raise refuse(module, f"is in train mode with dropout {probability:g} ({name}); call model.eval()")


def linear_weights(
    owner: nn.Module, name: str, *, classes: tuple[str, ...] = ("torch.nn.modules.linear.Linear",)
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "out"] | None]:
    """Weight (in its own layout) and bias of a plain linear submodule, copied to float64.

    Args:
        owner: The attention module, for the message.
        name: Attribute of the linear map.
        classes: Class paths that compute exactly ``x weight^T + bias``.

    Raises:
        UnsupportedModelError: Another class (quantised, adapted, parametrised), or a weight that is not a parameter.
    """
    linear = owner.get_submodule(name)
    if parametrize.is_parametrized(linear):
        raise refuse(owner, f"{name} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    if class_path(linear) not in classes:
        raise refuse(owner, f"{name} is a {class_path(linear)}, not a plain linear map")
    parameters = dict(linear.named_parameters(recurse=False))
    if "weight" not in parameters:
        raise refuse(owner, f"{name}.weight is computed by a hook (old weight or spectral norm); remove it first")
    bias = parameters.get("bias")
    return own_float64(parameters["weight"]), None if bias is None else own_float64(bias)


def own_float64(value: Tensor) -> Float[Tensor, "..."]:
    """A detached float64 copy that later training of the module cannot change."""
    return value.detach().to(torch.float64, copy=True)


def split_input_heads(
    owner: nn.Module, weight: Float[Tensor, "hk d"], bias: Float[Tensor, "hk"] | None, heads: int
) -> tuple[Float[Tensor, "h d k"], Float[Tensor, "h k"] | None]:
    """Cut ``y = x weight^T + bias`` whose outputs are the heads one after the other into per-head maps."""
    if heads < 1 or weight.shape[0] % heads:
        raise refuse(owner, f"{weight.shape[0]} projection rows do not divide into {heads} heads")
    per_head = weight.reshape(heads, -1, weight.shape[1]).transpose(1, 2).contiguous()
    return per_head, None if bias is None else bias.reshape(heads, -1)


def split_output_heads(owner: nn.Module, weight: Float[Tensor, "e hv"], heads: int) -> Float[Tensor, "h v e"]:
    """Cut an output projection that reads the concatenated heads into per-head maps."""
    if heads < 1 or weight.shape[1] % heads:
        raise refuse(owner, f"an output projection of {weight.shape[1]} columns does not divide into {heads} heads")
    return weight.T.reshape(heads, -1, weight.shape[0]).contiguous()
