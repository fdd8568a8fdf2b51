"""What the layers share: checked weights, sizes, projections, masses, identity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.features import PLAIN, used_features
from attnrobust.tokens import as_number, require_finite, tensor_digest

S = TypeVar("S", bound="Specification")


class Specification(ABC):
    """A frozen record of tensors and numbers that maps tokens to tokens; subclasses are frozen dataclasses."""

    feature_names: ClassVar[Mapping[str, str]] = {}
    """The feature of each field, see ``layers.features``; a field that is missing here is one of its own name."""

    later_fields: ClassVar[frozenset[str]] = frozenset()
    """Switches that came later: while one is off, the digest is that of a record without it."""

    @property
    def features(self) -> frozenset[str]:
        """The optional parts of the formula that are in use."""
        return used_features(self, self.feature_names)

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
        values = {name: value for name, value in record(self).items() if name not in self.later_fields or value}
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        rest = {name: "tensor" if isinstance(value, Tensor) else repr(value) for name, value in values.items()}
        return tensor_digest(*tensors, extra=f"{type(self).__name__};{rest}")

    def to(self: S, device: torch.device | str) -> S:
        """The same map on another device."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in record(self).items() if hasattr(v, "to")}
        return replace(self, **moved)  # type: ignore[type-var]


class HeadSpecification(Specification):
    """Multi-head self-attention: weights of shape (h, d, k or v), an output projection ``w_o`` (h, v, e) or none.

    Subclasses are frozen dataclasses with ``w_q`` (h, d, k), ``w_v`` (h, d, v), ``w_o``, ``b_o`` and, where their
    formula has them, ``w_k`` (h, d, k), biases and numbers. ``formula`` evaluates a layer from its fields.
    """

    formula: ClassVar[Callable[..., Tensor]]
    """Tokens, masses and every field by name to the output, in the precision of the fields."""

    w_q: Float[Tensor, "h d k"]
    w_v: Float[Tensor, "h d v"]
    w_o: Float[Tensor, "h v e"] | None
    b_o: Float[Tensor, "e"] | None

    def __post_init__(self) -> None:
        known = {field.name for field in fields(self)}  # type: ignore[arg-type]
        adopt_weights(self, **{name: rank for name, rank in RANKS.items() if name in known})
        h, d, k, v = (*self.w_q.shape, self.value_width)
        shapes: dict[str, tuple[int, ...]] = {"w_k": (h, d, k), "w_v": (h, d, v)}
        shapes |= {"b_q": (h, k), "b_k": (h, k), "b_v": (h, v), "w_o": (h, v, self.out_width), "b_o": (self.out_width,)}
        require_shapes(self, {name: shape for name, shape in shapes.items() if name in known})

    @property
    def heads(self) -> int:
        """Number of heads h."""
        return int(self.w_q.shape[0])

    @property
    def width(self) -> int:
        return int(self.w_q.shape[1])

    @property
    def key_width(self) -> int:
        """Query and key width k of one head."""
        return int(self.w_q.shape[2])

    @property
    def value_width(self) -> int:
        """Value width v of one head."""
        return int(self.w_v.shape[2])

    @property
    def out_width(self) -> int:
        """Output token width e: that of ``w_o``, or h v where the heads are concatenated."""
        return self.heads * self.value_width if self.w_o is None else int(self.w_o.shape[2])

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.w_q.device

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        return type(self).formula(x, mass, **record(self))


class ScaledHeadSpecification(HeadSpecification):
    """Heads with a factor ``scale`` on their scores; None means 1/sqrt(k)."""

    scale: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        adopt_number(self, "scale", positive=False, default=1.0 / math.sqrt(self.key_width))

    @property
    def factor(self) -> float:
        """The scale as a float (after its default was filled in)."""
        return float(self.scale)  # type: ignore[arg-type]


HEAD_FEATURES: Mapping[str, str] = {
    **dict.fromkeys(("w_q", "w_k", "w_v"), PLAIN),
    "w_o": "out_projection",
    "b_o": "bias",
}
"""The features of the fields that most head specifications have."""

RANKS = {"w_q": 3, "w_k": 3, "w_v": 3, "b_q": 2, "b_k": 2, "b_v": 2, "w_o": 3, "b_o": 1}
"""Dimensions of the weights, in the order in which they are checked."""


def record(spec: object) -> dict[str, Any]:
    """The fields of a frozen record by name."""
    return {field.name: getattr(spec, field.name) for field in fields(spec)}  # type: ignore[arg-type]


def adopt_weights(spec: Specification, **ranks: int) -> None:
    """Replace the named tensors of a record by finite float64 copies of the stated rank; None stays None."""
    needed = {field.name for field in fields(spec) if field.default is MISSING}  # type: ignore[arg-type]
    for name, rank in ranks.items():
        value = getattr(spec, name)
        if value is None:
            if name in needed:
                raise InputError(f"{name} is None; give a tensor with {rank} dimensions")
            continue
        value = require_finite(name, value)
        if value.ndim != rank or 0 in value.shape:
            raise InputError(f"{name} must have {rank} dimensions, each >= 1; got shape {tuple(value.shape)}")
        object.__setattr__(spec, name, value)


def require_shapes(spec: Specification, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse named tensors of a record that have another shape; None fits."""
    for name, shape in shapes.items():
        value = getattr(spec, name)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} must have shape {shape}; got {tuple(value.shape)}")


def adopt_number(spec: Specification, name: str, *, positive: bool = True, default: float | None = None) -> None:
    """Replace a number of a record by a checked float; ``default`` stands for None."""
    value = getattr(spec, name)
    number = default if value is None else as_number(name, value)
    if number is None or not math.isfinite(number) or (positive and number <= 0):
        raise InputError(f"{name} is {value}; it must be {'a positive number' if positive else 'finite'}")
    object.__setattr__(spec, name, number)


def project(
    x: Float[Tensor, "*b n d"], weight: Float[Tensor, "h d k"], bias: Float[Tensor, "h k"] | None = None
) -> Float[Tensor, "*b h n k"]:
    """Tokens times the weights of every head, plus its bias."""
    out = torch.einsum("...nd,hdk->...hnk", x, weight)
    return out if bias is None else out + bias[:, None, :]


def combine(heads: Tensor, w_o: Tensor | None, b_o: Tensor | None) -> Tensor:
    """Outputs of the heads (*b, h, n, v) to the layer's output (*b, n, e)."""
    flat = heads.transpose(-3, -2).flatten(-2) if w_o is None else torch.einsum("...hnv,hve->...ne", heads, w_o)
    return flat if b_o is None else flat + b_o


def log_mass(mass: Float[Tensor, "*m n"]) -> Float[Tensor, "*m 1 1 n"]:
    """What masses add to scores (*b, h, n, n)."""
    return mass.log()[..., None, None, :]


def softmax_average(scores: Tensor, values: Tensor, mass: Tensor | None) -> Tensor:
    """``sum_j softmax_j(scores_ij + log mass_j) values_j`` of every head; equal masses (None) cancel."""
    return torch.softmax(scores if mass is None else scores + log_mass(mass), dim=-1) @ values
