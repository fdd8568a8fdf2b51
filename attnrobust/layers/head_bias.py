"""Position biases that are added to the scores, one matrix a head: ALiBi, tables of relative positions, any."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.tokens import require_finite, tensor_digest

RULES = {"explicit": 3, "slopes": 1, "table": 2}
"""The rules with the dimensions of what they are given."""


@dataclass(frozen=True, eq=False)
class HeadBias:
    """``b_hij``, added to the scores of head h, query i and key j; exactly one rule says what it is.

    Args:
        explicit: The biases (h, n, n); they fix n.
        slopes: ``b_hij = slopes_h (j - i)`` (ALiBi), or ``-slopes_h |j - i|`` where ``symmetric``; (h,), any n.
        table: ``b_hij = table_h[L + min(max(j - i, -L), L)]``, (h, 2 L + 1), any n. Bucketed tables (T5) are expanded.
        symmetric: The second form of ``slopes``, for layers without a causal mask.

    Raises:
        InputError: Not exactly one rule, NaN or infinite numbers (a mask hides keys), or a wrong shape.

    References:
        Press, Smith and Lewis 2022 (ALiBi); Raffel et al. 2020, section 2.1 (tables of relative positions).
    """

    explicit: Float[Tensor, "h n n"] | None = None
    slopes: Float[Tensor, "h"] | None = None
    table: Float[Tensor, "h w"] | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"a head bias takes one rule of {', '.join(RULES)}; got {', '.join(given) or 'none'}")
        (rule,) = given
        if self.symmetric and rule != "slopes":
            raise InputError(f"symmetric is about slopes; the rule is {rule}")
        object.__setattr__(self, rule, _checked(rule, getattr(self, rule)))

    @property
    def rule(self) -> str:
        """Which rule is given."""
        return next(name for name in RULES if getattr(self, name) is not None)

    @property
    def heads(self) -> int:
        """Number of heads h."""
        return int(getattr(self, self.rule).shape[0])

    @property
    def length(self) -> int | None:
        """The token count that explicit biases fix; None for any."""
        return None if self.explicit is None else int(self.explicit.shape[1])

    def matrix(self, n: int, at: Int[Tensor, "q"] | None = None) -> Float[Tensor, "h q n"]:
        """The biases of n tokens, or of the queries ``at`` among them: these float64 numbers are the layer's.

        Raises:
            InputError: Explicit biases are for another number of tokens.
        """
        if self.explicit is not None:
            if self.length != n:
                raise InputError(f"the layer's head bias is for {self.length} tokens, the input has {n}")
            return self.explicit if at is None else self.explicit[:, at]
        if at is not None:
            return self._by_rule(n, at)
        if n not in self._matrices:
            with torch.inference_mode(mode=False):  # kept, so they may meet automatic differentiation later
                self._matrices[n] = self._by_rule(n)
        return self._matrices[n]

    @cached_property
    def _matrices(self) -> dict[int, Tensor]:
        return {}

    def _by_rule(self, n: int, at: Tensor | None = None) -> Float[Tensor, "h q n"]:
        apart = self._apart(n, at)
        if self.slopes is not None:
            return self.slopes[:, None, None] * (-apart.abs() if self.symmetric else apart)
        assert self.table is not None  # noqa: S101 - the one rule that is left; narrows the type
        far = self.table.shape[1] // 2
        return self.table[:, apart.clamp(-far, far) + far]

    def _apart(self, n: int, at: Tensor | None) -> Int[Tensor, "q n"]:
        """``j - i``."""
        index = torch.arange(n, device=getattr(self, self.rule).device)
        return index[None, :] - (index if at is None else at)[:, None]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the record."""
        return tensor_digest(self.explicit, self.slopes, self.table, extra=f"head bias;{self.symmetric}")

    def to(self, device: torch.device | str) -> "HeadBias":
        """The same biases on another device."""
        return replace(self, **{self.rule: getattr(self, self.rule).to(device)})


def _checked(rule: str, value: Tensor) -> Tensor:
    value = require_finite(f"head bias {rule}", value)
    if value.ndim != RULES[rule] or 0 in value.shape:
        raise InputError(
            f"head bias {rule} must have {RULES[rule]} dimensions, each >= 1; got shape {tuple(value.shape)}"
        )
    if rule == "explicit" and value.shape[1] != value.shape[2]:
        raise InputError(f"head bias explicit must have shape (h, n, n); got {tuple(value.shape)}")
    if rule == "table" and value.shape[1] % 2 == 0:
        raise InputError(f"head bias table must have an odd width 2 L + 1; got {value.shape[1]}")
    return value
