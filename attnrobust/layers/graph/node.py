"""The protocol of one node of a network graph, and of its derivatives at a recorded clean state.

A ``Node`` is a frozen, exact float64 specification of one operation on token matrices (*b, n, d). It reads one or more
edges (``arity``), so its inputs and their directions are tuples of tensors (``Edges``), one entry per edge, also where
there is only one. What a node must give:

* ``out_width(widths)``: the width of its output, or an ``InputError`` if the inputs do not fit;
* ``forward(inputs, mass)``: the value, differentiable by autograd (attacks go through it); ``mass`` (*m, n) or None for
  equal masses belongs to the rows of the inputs;
* ``out_rows(rows)`` and ``out_mass(mass, rows)``: number and masses of the rows of its output, from those of its
  (first) input; only pooling and concatenation change them;
* ``at(inputs, mass)``: a ``NodeState``, the derivatives at these clean inputs (n, d);
* ``affine``: whether every derivative beyond the first vanishes, so that sweeps may skip them.

A ``NodeState`` gives closed forms, none of which builds an autograd graph or anything of size (n d) x (n d):

* ``jvp(a)`` = f'[a] and its transpose ``vjp(y)``;
* ``features(a)``: the linear functions of a direction that the higher derivatives are made of, computed once;
* ``bilinear(Fa, Fb)`` = f''[a, b], its transpose in one slot ``bilinear_adjoint(Fa, y)``, with
  <y, f''[a, v]> = sum over edges of <bilinear_adjoint(Fa, y), v>;
* ``trilinear(Fa, Fb, Fc)`` = f'''[a, b, c] and ``trilinear_adjoint(Fa, Fb, y)``.

``second``, ``second_adjoint``, ``third`` and ``third_adjoint`` are the same on plain directions. All take any leading
batch dimensions, which broadcast against each other; memory grows with the batch (attention: h n n numbers a
direction), so split very large batches. A node without Taylor form (ReLU) raises ``UnsupportedModelError`` beyond the
first order.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.tokens import tensor_digest

Edges = tuple[Tensor, ...]
"""One tensor (..., n, d) per edge that a node reads: values, directions or cotangents."""

F = TypeVar("F")
N = TypeVar("N", bound="Node")


class NodeState(ABC, Generic[F]):
    """The derivatives of a node at clean inputs; see the module for the meaning of every form."""

    @abstractmethod
    def jvp(self, a: Edges) -> Tensor:
        """``f'[a]``."""

    @abstractmethod
    def vjp(self, y: Tensor) -> Edges:
        """Transpose of ``jvp``."""

    @abstractmethod
    def features(self, a: Edges) -> F:
        """What the higher forms need of one direction."""

    @abstractmethod
    def bilinear(self, a: F, b: F) -> Tensor:
        """``f''[a, b]`` from features."""

    @abstractmethod
    def bilinear_adjoint(self, a: F, y: Tensor) -> Edges:
        """Transpose of ``v -> f''[a, v]`` at y."""

    @abstractmethod
    def trilinear(self, a: F, b: F, c: F) -> Tensor:
        """``f'''[a, b, c]`` from features."""

    @abstractmethod
    def trilinear_adjoint(self, a: F, b: F, y: Tensor) -> Edges:
        """Transpose of ``v -> f'''[a, b, v]`` at y."""

    def second(self, a: Edges, b: Edges) -> Tensor:
        """``f''[a, b]``."""
        return self.bilinear(self.features(a), self.features(b))

    def second_adjoint(self, a: Edges, y: Tensor) -> Edges:
        """``u`` with ``<y, f''[a, v]> = <u, v>`` for all v."""
        return self.bilinear_adjoint(self.features(a), y)

    def third(self, a: Edges, b: Edges, c: Edges) -> Tensor:
        """``f'''[a, b, c]``."""
        return self.trilinear(self.features(a), self.features(b), self.features(c))

    def third_adjoint(self, a: Edges, b: Edges, y: Tensor) -> Edges:
        """``u`` with ``<y, f'''[a, b, v]> = <u, v>`` for all v."""
        return self.trilinear_adjoint(self.features(a), self.features(b), y)


class Node(ABC):
    """One operation of a network; subclasses are frozen dataclasses. See the module for what each member means."""

    arity: ClassVar[int] = 1
    affine: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """Readable name of the operation."""
        return type(self).__name__

    @abstractmethod
    def out_width(self, widths: tuple[int, ...]) -> int:
        """Output width for inputs of these widths.

        Raises:
            InputError: The inputs do not fit.
        """

    @abstractmethod
    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        """The value; leading batch dimensions are allowed."""

    @abstractmethod
    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState[Any]:
        """The derivatives at clean inputs (n, d)."""

    @property
    def features(self) -> frozenset[str]:
        """What a method must know of to speak about a network with this node: its class and the options in use."""
        return frozenset({type(self).__name__})

    def out_rows(self, rows: int) -> int:
        """Rows of the output for inputs of ``rows`` rows."""
        return rows

    def out_mass(self, mass: Tensor | None, rows: int) -> Tensor | None:
        """Masses of the output's rows, from those of ``rows`` input rows; None means equal."""
        return mass

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the class and everything in the record."""
        tensors, rest = [], {}
        for name, value in self._record().items():
            if isinstance(value, Tensor):
                tensors.append(value)
            rest[name] = "tensor" if isinstance(value, Tensor) else getattr(value, "digest", repr(value))
        return tensor_digest(*tensors, extra=f"{type(self).__name__};{rest}")

    def to(self: N, device: torch.device | str) -> N:
        """The same node on another device."""
        moved = {name: value.to(device) for name, value in self._record().items() if hasattr(value, "to")}
        return replace(self, **moved)  # type: ignore[type-var]

    def _record(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


class AffineState(NodeState[Edges]):
    """Derivatives of an affine node: ``jvp`` and ``vjp`` are left to the subclass, the others vanish."""

    def features(self, a: Edges) -> Edges:
        return a

    def bilinear(self, a: Edges, b: Edges) -> Tensor:
        return _zeros(self.jvp(a), self.jvp(b))

    def bilinear_adjoint(self, a: Edges, y: Tensor) -> Edges:
        return self.trilinear_adjoint(a, a, y)

    def trilinear(self, a: Edges, b: Edges, c: Edges) -> Tensor:
        return _zeros(self.jvp(a), self.jvp(b), self.jvp(c))

    def trilinear_adjoint(self, a: Edges, b: Edges, y: Tensor) -> Edges:
        return tuple(_zeros(*parts) for parts in zip(self.vjp(y), a, b, strict=True))


def _zeros(*like: Tensor) -> Tensor:
    return like[0].new_zeros(torch.broadcast_shapes(*(tensor.shape for tensor in like)))


def require_width(kind: str, expected: int, widths: Sequence[int]) -> None:
    """Refuse an input of another width than a node takes."""
    if widths[0] != expected:
        raise InputError(f"{kind} takes tokens of width {expected}; its input has width {widths[0]}")


def require_equal_widths(kind: str, widths: Sequence[int]) -> int:
    """The common width of two edges that are combined entry by entry."""
    if len(set(widths)) != 1:
        raise InputError(f"{kind} needs edges of one width; they have {', '.join(map(str, widths))}")
    return widths[0]


def require_equal_rows(kind: str, inputs: Edges) -> None:
    """Refuse edges of different token numbers: broadcasting them would be another network."""
    rows = {int(value.shape[-2]) for value in inputs}
    if len(rows) != 1:
        raise InputError(f"{kind} needs edges with equally many tokens; they have {', '.join(map(str, sorted(rows)))}")
