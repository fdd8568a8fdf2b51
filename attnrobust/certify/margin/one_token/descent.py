"""Descent of the bounds of many tokens in their free parameters, by the slope at the present maximisers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.descent import CosineAdam

SIGNED = ("tilt", "curve", "lean", "mixed", "reference", "value")  # parameters of either sign
SHARES = ("capped",)  # in [0, 1]; the others are positive and move in their logarithm
LIMITS = (1e-6, 1e4)
NARROW = {"split": (0.01, 4.0), "bilinear": (0.01, 4.0), "cap_split": (0.01, 1.0)}
SHARE_RATE = 0.3  # rate of a share, in units of the others'
LAST_RATE = 0.03  # share of the first rate that the last step keeps


def combined(first: Any, second: Any, rule: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Apply ``rule`` to every tensor of two records of the same type."""
    if isinstance(first, Tensor):
        return rule(first, second)
    return replace(
        first, **{f.name: combined(getattr(first, f.name), getattr(second, f.name), rule) for f in fields(first)}
    )


class TokenDescent(CosineAdam):
    """Adam on every tensor of a record of parameters; the tokens are independent problems.

    ``min over parameters of max over delta``: by Danskin's theorem the slope of the maximum is that of the majorant at
    the maximiser.
    """

    def __init__(self, start: Any, *, steps: int, rate: float) -> None:
        self.raw = named(start, _raw)
        shares = [raw for name, raw in _leaves(self.raw) if name in SHARES]
        others = [raw for name, raw in _leaves(self.raw) if name not in SHARES]
        super().__init__([(others, 1.0), (shares, SHARE_RATE)], steps=steps, rate=rate, last=LAST_RATE)

    def parameters(self) -> Any:
        """The present parameters, differentiable."""
        return named(self.raw, lambda name, raw: raw if name in (*SIGNED, *SHARES) else raw.exp())

    def step(self, value: Tensor) -> None:
        """One step down the slope of ``value``; parameters stay in their ranges."""
        super().step(value)
        with torch.no_grad():
            for name, raw in _leaves(self.raw):
                if name in SHARES:
                    raw.clamp_(0.0, 1.0)
                elif name not in SIGNED:
                    low, high = NARROW.get(name, LIMITS)
                    raw.clamp_(math.log(low), math.log(high))


def _raw(name: str, value: Tensor) -> Tensor:
    return (value if name in (*SIGNED, *SHARES) else value.log()).detach().clone().requires_grad_(True)


def named(record: Any, rule: Callable[[str, Tensor], Tensor]) -> Any:
    """Apply ``rule`` to every tensor of a record and its name."""
    new: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        new[f.name] = rule(f.name, value) if isinstance(value, Tensor) else named(value, rule)
    return replace(record, **new)


def _leaves(record: Any) -> Iterator[tuple[str, Tensor]]:
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Tensor):
            yield f.name, value
        else:
            yield from _leaves(value)
