"""Bounds of the change of the goal's quantities on the set of a given size, as prepared certificates."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.method import PreparedBound
from attnrobust.certify.radius import LARGEST
from attnrobust.numerics.rounding import FORMULA, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem

PROBE = 1e-9  # a size at which every bound is in its linear part

Change = Callable[[float], Float[Tensor, "c"]]


class ChangeBound(PreparedBound):
    """Usage from an upper bound of each budgeted change.

    Args:
        problem: The question.
        change: Upper bounds (c,) of ``ResolvedGoal.changes`` on the set of a given size.
        failure_probability: Union bound over every random event behind ``change``.
    """

    def __init__(self, problem: Problem, change: Change, *, failure_probability: float = 0.0) -> None:
        self._budgets = problem.resolved.budgets
        self._change = change
        self._failure = failure_probability

    def usage(self, radius: float) -> Upper:
        return Upper(used_share(self._change(radius), self._budgets, share=FORMULA), self._failure)

    @property
    def failure_probability(self) -> float:
        return self._failure

    @property
    def first_guess(self) -> float | None:
        slope = self.usage(PROBE).value / PROBE
        return 1.0 / slope if slope > 1.0 / LARGEST else None


def smallest(bounds: list[Float[Tensor, "c"]]) -> Float[Tensor, "c"]:
    """The smallest of several upper bounds of the same changes, each."""
    return torch.stack(bounds).amin(dim=0)
