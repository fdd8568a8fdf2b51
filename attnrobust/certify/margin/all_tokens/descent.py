"""Descent of a bound in the free parameters of its majorant, by the slope at the present maximisers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from attnrobust.certify.margin.all_tokens.majorant import LIMITS, SIGNED, Parameters

NARROW = {"split": (0.01, 4.0), "bilinear": (0.01, 4.0)}
BETAS = (0.8, 0.99)  # of Adam: short memories, a search has some tens of steps
LAST_RATE = 0.02  # share of the first rate that the last step keeps


class CosineAdam:
    """Adam whose rate falls like a cosine over a given number of steps.

    Args:
        groups: Leaves and the factor of their rate.
        steps: Steps of the search.
        rate: First rate.
        last: Share of it that the last step keeps.
    """

    def __init__(self, groups: Sequence[tuple[list[Tensor], float]], *, steps: int, rate: float, last: float) -> None:
        self.steps, self.rate, self.last = steps, rate, last
        self.factors = [factor for _, factor in groups]
        self.optimiser = torch.optim.Adam([{"params": leaves} for leaves, _ in groups], lr=rate, betas=BETAS)

    def __iter__(self) -> Iterator[int]:
        """The steps; each sets the rates."""
        for step in range(self.steps):
            share = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
            rate = self.rate * (self.last + (1.0 - self.last) * share)
            for group, factor in zip(self.optimiser.param_groups, self.factors, strict=True):
                group["lr"] = factor * rate
            yield step

    def step(self, value: Tensor) -> None:
        """One step down the slope of ``value``."""
        self.optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call,unused-ignore]
        self.optimiser.step()


class Descent(CosineAdam):
    """Adam on the parameters and on the log weights of the ellipsoid.

    ``min over parameters of max over D``: by Danskin's theorem the slope of the maximum is that of the majorant at the
    maximiser. Terms ``a s + b / s`` are convex in ``log s``, so for fixed D nearly every direction is convex.
    """

    def __init__(self, parameters: Parameters, scale: Tensor, *, steps: int, rate: float) -> None:
        values = {f.name: getattr(parameters, f.name) for f in fields(parameters)}
        self.raw = {
            name: (value if name in SIGNED else value.log()).detach().clone().requires_grad_(True)
            for name, value in values.items()
        }
        self.log_scale = scale.log().clone().requires_grad_(True)
        leaves = [*self.raw.values(), self.log_scale]
        super().__init__([(leaves, 1.0)], steps=steps, rate=rate, last=LAST_RATE)

    def parameters(self) -> Parameters:
        """The present parameters, differentiable."""
        return Parameters(**{name: raw if name in SIGNED else raw.exp() for name, raw in self.raw.items()})

    def scale(self) -> Tensor:
        """The present weights of the ellipsoid, differentiable; the largest is 1."""
        return (self.log_scale - self.log_scale.detach().amax()).exp()

    def step(self, value: Tensor) -> None:
        """One step down the slope of ``value``; positive parameters stay in their ranges."""
        super().step(value)
        with torch.no_grad():
            for name, raw in self.raw.items():
                if name not in SIGNED:
                    low, high = NARROW.get(name, LIMITS)
                    raw.clamp_(math.log(low), math.log(high))


def detached(parameters: Parameters) -> Parameters:
    """The same numbers without their history."""
    return Parameters(**{f.name: getattr(parameters, f.name).detach() for f in fields(parameters)})
