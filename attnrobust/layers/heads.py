"""What the multi-head specifications share: checked weights, projections, masses, identity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.tokens import as_number, require_finite, tensor_digest

S = TypeVar("S", bound="Specification")


class Specification(ABC):
    """A frozen record of tensors and numbers that maps tokens to tokens; subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Input token width d."""

    @property
    @abstractmethod
    def out_width(self) -> int:
        """Output token width e."""

    @abstractmethod
    def __call__(
        self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None
    ) -> Float[Tensor, "*b n e"]:
        """Evaluate on tokens (n, d) or batches of them; ``mass`` None means equal masses."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the class and everything in the record."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        rest = {name: "tensor" if isinstance(value, Tensor) else repr(value) for name, value in values.items()}
        return tensor_digest(*tensors, extra=f"{type(self).__name__};{rest}")

    def to(self: S, device: torch.device | str) -> S:
        """The same map on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]


class HeadSpecification(Specification):
    """A specification with value weights ``w_v`` (h, d, v) and an output projection ``w_o`` (h, v, e) or none."""

    w_v: Float[Tensor, "h d v"]
    w_o: Float[Tensor, "h v e"] | None
    b_o: Float[Tensor, "e"] | None

    @property
    def heads(self) -> int:
        """Number of heads h."""
        return int(self.w_v.shape[0])

    @property
    def width(self) -> int:
        return int(self.w_v.shape[1])

    @property
    def value_width(self) -> int:
        """Value width v of one head."""
        return int(self.w_v.shape[2])

    @property
    def out_width(self) -> int:
        return out_width(self.w_v, self.w_o)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.w_v.device


def out_width(w_v: Tensor, w_o: Tensor | None) -> int:
    """Output width e: that of ``w_o``, or h v where the heads are concatenated."""
    return int(w_v.shape[0] * w_v.shape[2]) if w_o is None else int(w_o.shape[2])


def adopt_weights(spec: Specification, **ranks: int) -> None:
    """Replace the named tensors of a record by finite float64 copies of the stated rank; None stays None."""
    for name, rank in ranks.items():
        value = getattr(spec, name)
        if value is None:
            continue
        value = require_finite(name, value)
        if value.ndim != rank or 0 in value.shape:
            raise InputError(f"{name} must have {rank} dimensions, none of them 0; got shape {tuple(value.shape)}")
        object.__setattr__(spec, name, value)


def require_shapes(spec: Specification, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse named tensors of a record that have another shape; None fits."""
    for name, shape in shapes.items():
        value = getattr(spec, name)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} must have shape {shape}; got {tuple(value.shape)}")


def require_output_shapes(spec: HeadSpecification) -> None:
    """Refuse ``w_o`` and ``b_o`` that do not fit the heads."""
    if spec.w_o is not None:
        require_shapes(spec, {"w_o": (spec.heads, spec.value_width, spec.out_width)})
    require_shapes(spec, {"b_o": (spec.out_width,)})


def adopt_number(spec: Specification, name: str, *, positive: bool = True, default: float | None = None) -> None:
    """Replace a number of a record by a checked float; ``default`` stands for None."""
    value = getattr(spec, name)
    number = default if value is None else as_number(name, value)
    if number is None or not math.isfinite(number) or (positive and number <= 0):
        raise InputError(f"{name} is {value}; it must be {'a positive number' if positive else 'finite'}")
    object.__setattr__(spec, name, number)


def project(x: Float[Tensor, "*b n d"], weight: Float[Tensor, "h d k"]) -> Float[Tensor, "*b h n k"]:
    """Tokens times the weights of every head."""
    return torch.einsum("...nd,hdk->...hnk", x, weight)


def combine(heads: Tensor, w_o: Tensor | None, b_o: Tensor | None) -> Tensor:
    """Outputs of the heads (*b, h, n, v) to the layer's output (*b, n, e)."""
    flat = heads.transpose(-3, -2).flatten(-2) if w_o is None else torch.einsum("...hnv,hve->...ne", heads, w_o)
    return flat if b_o is None else flat + b_o


def log_mass(mass: Tensor | None) -> Tensor | float:
    """What masses (*m, n) add to scores (*b, h, n, n); 0 for equal masses, which cancel in a softmax."""
    return 0.0 if mass is None else mass.log()[..., None, None, :]


def softmax_average(scores: Tensor, values: Tensor, mass: Tensor | None) -> Tensor:
    """``sum_j softmax_j(scores_ij + log mass_j) values_j`` of every head."""
    return torch.softmax(scores + log_mass(mass), dim=-1) @ values
