"""What every adapter shares: reading plain linear maps, splitting heads, and refusing what is not modelled."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnrobust.errors import UnsupportedModelError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.models.checks.agreement import call_in_float64, check_tokens, disagreement, float64_twin

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one forward call."""


class Adapter(ABC):
    """Reads one kind of attention module into an ``Attention`` specification, or refuses it by name."""

    takes_query_key_value = False
    """Whether the module is called with query, key and value, so that its caller decides if it is self-attention."""

    @abstractmethod
    def reads(self, module: nn.Module) -> bool:
        """Whether this adapter is for exactly the module's class (subclasses may compute something else)."""

    @abstractmethod
    def kind(self, module: nn.Module) -> str:
        """The module's class and what the specification covers, for listings."""

    def within(self, model: nn.Module) -> "Adapter":
        """The adapter of modules of one model."""
        return self

    def spec(self, module: nn.Module) -> Attention:
        """The specification, checked against two float64 forward calls of the module with all its hooks.

        Raises:
            UnsupportedModelError: The module is not exactly what can be specified; lists every reason.
        """
        reasons = [*unreadable_reasons(module), *self.reasons(module)]
        if reasons:
            raise refuse(module, "; ".join(dict.fromkeys(reasons)))
        spec = self.read(module)
        self._check(spec, module)
        return spec

    @abstractmethod
    def reasons(self, module: nn.Module) -> Iterator[str]:
        """Everything about the module that is not modelled, each with its cure."""

    @abstractmethod
    def read(self, module: nn.Module) -> Attention:
        """The specification of a module without such reasons."""

    @abstractmethod
    def call(self, module: nn.Module, spec: Attention, tokens: Float[Tensor, "n d"]) -> Call:
        """Arguments of one forward call of the module on one input, causal if the specification is."""

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

    def _check(self, spec: Attention, module: nn.Module) -> None:
        for tokens in check_tokens(spec):
            found = disagreement(spec, tokens, self._output(spec, module, tokens))
            if found is not None:
                raise refuse(module, f"its own forward call differs from the specification by {found:.3g} of the output"
                             f"{_suspects(module)}")  # fmt: skip

    def _output(self, spec: Attention, module: nn.Module, tokens: Tensor) -> Tensor:
        twin, seen = float64_twin(module), list[Any]()
        handle = self.output_module(twin).register_forward_hook(lambda _, __, output: seen.append(output))
        args, kwargs = self.call(module, spec, tokens)
        try:
            call_in_float64(twin, args, kwargs)
        except Exception as error:  # hooks and overridden forwards may raise anything
            raise refuse(
                module, f"could not be called to check its specification: {first_line(error)}{_suspects(module)}"
            ) from error
        finally:
            handle.remove()
        if len(seen) != 1:
            raise refuse(module, f"its forward call gives {len(seen)} outputs, not one{_suspects(module)}")
        return self.output_tokens(module, seen[0])[0]


def _suspects(module: nn.Module) -> str:
    """What a module carries that may change its function, for messages."""
    found = []
    for name, part in module.named_modules():
        place = f" of {name}" if name else ""
        hooked = bool(part._forward_hooks or part._forward_pre_hooks)  # noqa: SLF001
        found += [f"forward hooks{place}"] if hooked else []
        found += [f"a replaced forward{place}"] if "forward" in vars(part) else []
    return f"; it has {', '.join(found[:4])}: remove them" if found else ", which computes something not modelled"


def class_path(module: nn.Module) -> str:
    """Full dotted name of the module's class; the identity that adapters compare (no import needed)."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def refuse(module: nn.Module, reason: str) -> UnsupportedModelError:
    """An error that names the module's class and the reason."""
    return UnsupportedModelError(f"{type(module).__name__}: {reason}")


def unreadable_reasons(module: nn.Module) -> Iterator[str]:
    """Weights without values, or with values that are not plain numbers."""
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    meta = [name for name, value in tensors.items() if value.is_meta]
    if meta:
        yield f"{_named(meta)} on the meta device, without values; load the model onto one device, without offloading"
    packed = [n for n, value in module.named_parameters() if not value.is_floating_point() or value.is_quantized]
    if packed:
        yield f"{_named(packed)} not floating-point ({tensors[packed[0]].dtype}); load the model without quantisation"


def foreign_reasons(module: nn.Module, linears: Iterable[str], *, own: Iterable[str] = ()) -> Iterator[str]:
    """Parameters other than ``own`` and those of the named linear maps, so that nothing is left unread."""
    linears = tuple(linears)
    expected = {f"{name}.{part}" for name in linears for part in ("weight", "bias")} | set(own)
    named_already = tuple(f"{name}." for name in linears if any(linear_reasons(module, name, classes=None)))
    found = {name for name, _ in module.named_parameters() if not name.startswith(named_already)}
    foreign = sorted(found - expected)
    if foreign:
        yield f"has parameters that are not modelled: {', '.join(foreign[:6])}"


def dropout_reasons(module: nn.Module, dropouts: Iterable[str]) -> Iterator[str]:
    """Train mode with a dropout probability above 0 (attributes are ``nn.Dropout`` modules or numbers)."""
    for name in dropouts:
        found: Any = getattr(module, name)
        probability = float(found.p if isinstance(found, nn.Dropout) else found)
        training = bool(found.training if isinstance(found, nn.Dropout) else module.training)
        if training and probability > 0:
            yield f"is in train mode with dropout {probability:g} ({name}); call model.eval()"


LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"


def linear_reasons(owner: nn.Module, name: str, *, classes: tuple[str, ...] | None = (LINEAR,)) -> Iterator[str]:
    """Why a submodule is not a plain linear map: quantised, adapted, parametrised, or its weight comes from a hook.

    Args:
        owner: The attention module.
        name: Attribute of the linear map.
        classes: Class paths that compute exactly ``x weight^T + bias``; None takes any.
    """
    linear = owner.get_submodule(name)
    if parametrize.is_parametrized(linear):
        yield f"{name} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    elif classes is not None and class_path(linear) not in classes:
        yield f"{name} is a {class_path(linear)}, not a plain linear map{_cure_of_class(linear)}"
    elif not isinstance(vars(linear).get("_parameters", {}).get("weight"), nn.Parameter):
        yield f"{name}.weight {computed_weight(linear)}"


def computed_weight(module: nn.Module) -> str:
    """What to say of a weight that is no parameter."""
    if any(name.endswith("_mask") for name, _ in module.named_buffers(recurse=False)):
        return "is pruned by a hook; make it permanent by torch.nn.utils.prune.remove"
    return "is computed by a hook (old weight or spectral norm); call torch.nn.utils.remove_weight_norm or its like"


def _cure_of_class(linear: nn.Module) -> str:
    path = class_path(linear)
    if path.startswith("peft."):
        return "; merge the adapter by merge_and_unload()"
    if any(word in path.lower() for word in ("quant", "bitsandbytes", "awq", "gptq", "hqq")):
        return "; load the model without quantisation"
    return ""


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more are" if len(names) > 3 else " is" if len(names) == 1 else " are"
    return ", ".join(names[:3]) + more


def linear_weights(owner: nn.Module, name: str) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "out"] | None]:
    """Weight (in its own layout) and bias of a linear submodule without ``linear_reasons``, copied to float64."""
    parameters = dict(owner.get_submodule(name).named_parameters(recurse=False))
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
