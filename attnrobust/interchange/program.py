"""A network as a list of ONNX operators and constants, before any library writes it."""

from dataclasses import dataclass

import torch
from torch import Tensor

Attribute = int | tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operator of ONNX.

    Args:
        kind: Its name in the standard.
        inputs: Names of values or constants.
        output: Name of its value.
        attributes: Pairs of name and value.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: tuple[tuple[str, Attribute], ...]


@dataclass(frozen=True)
class Value:
    """A token matrix (1, rows, width) of the network.

    Args:
        name: Its name.
        rows: Number of tokens.
        width: Token width.
        reach: The l2 norm of no token exceeds it, at any input of the box (an upper bound).
    """

    name: str
    rows: int
    width: int
    reach: float


class Program:
    """Collects operators in the order of evaluation; mutable."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.constants: dict[str, Tensor] = {}

    def constant(self, value: Tensor | float | tuple[int, ...]) -> str:
        """Keep a constant: floats are float64, tuples of integers int64. Returns its name."""
        if isinstance(value, tuple):
            value = torch.tensor(value, dtype=torch.int64)
        elif not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        name = f"c{len(self.constants)}"
        self.constants[name] = value.detach().cpu()
        return name

    def apply(
        self, kind: str, *inputs: str | Tensor | float | tuple[int, ...], to: str | None = None, **attributes: Attribute
    ) -> str:
        """Append an operator on values (by name) and constants. Returns the name of its value."""
        names = tuple(one if isinstance(one, str) else self.constant(one) for one in inputs)
        output = to or f"v{len(self.operations)}"
        self.operations.append(Operation(kind, names, output, tuple(attributes.items())))
        return output

    @property
    def numbers(self) -> int:
        """How many floating-point constants there are."""
        return sum(value.numel() for value in self.constants.values() if value.is_floating_point())

    def rounded(self, dtype: torch.dtype) -> tuple[int, float]:
        """How many of them a precision changes, and by which share of themselves at most."""
        count, worst = 0, 0.0
        for value in self.constants.values():
            if value.is_floating_point():
                change = (value - value.to(dtype).double()).abs()
                count += int((change > 0).sum())
                worst = max(worst, float(torch.where(change > 0, change / value.abs(), 0.0).max()))
        return count, worst
