"""Goals: what must stay true of the layer's output."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.numerics.running_error import gamma
from attnrobust.text import read_tolerance
from attnrobust.tokens import as_index, as_number, as_tensor, require_finite, tensor_digest

Pool = Literal["all", "mean"] | int
"""Which part of the output counts: every row, the (mass-weighted) mean of the rows, or one row by its index."""


def checked_pool(pool: object) -> Pool:
    """A pool as it is spelled: "all", "mean", or a row index (any integer type)."""
    if pool == "all" or pool == "mean":
        return pool
    if isinstance(pool, str):
        raise InputError(f"pool {pool!r} does not exist; use 'all', 'mean' or a row index")
    return as_index("pool", pool)


def pool_weights(pool: Pool, mass: Float[Tensor, "n"]) -> Float[Tensor, "n"] | None:
    """Row weights pi with ``pooled = sum_i pi_i f_i``; None where every row counts by itself."""
    if pool == "all":
        return None
    if pool == "mean":
        return mass
    n = mass.shape[0]
    if not isinstance(pool, int) or isinstance(pool, bool) or not 0 <= pool < n:
        raise InputError(f"row {pool!r} does not exist; the input has rows 0 to {n - 1}, or use 'mean' or 'all'")
    return torch.nn.functional.one_hot(torch.tensor(pool), n).to(mass)


@dataclass(frozen=True, eq=False)
class ResolvedGoal:
    """A goal at one clean input: pooled output, linear functionals of it, and how much each may drop.

    Displacement (``functionals`` None): ``||pooled(X') - pooled(X)|| <= budgets[0]``.
    Margin: for every class c, ``<functionals[c], pooled(X) - pooled(X')> <= budgets[c]``, budgets = clean margins.

    Two budgets stand beside the computed ones (docs/rounding.md): ``violated_at`` for attacks, which a computed change
    must reach to be a violation whatever rounded, and ``budgets - rounding`` for certificates (``outward``), which the
    exact budget is not below.

    Args:
        weights: Row weights pi (n,) or None (all rows, flattened).
        functionals: (c, e) rows ``w_label - w_class``; None for a displacement.
        budgets: (c,) positive.
        clean: Pooled clean output, (e,) or (n, e).
        classes: The class of each functional; empty for a displacement.
        label: The label that must stay; None for a displacement.
        rounding: (c,) bounds of ``|computed budget - exact budget|``; None means 0.
        noise: (c,) what rounding may add to a computed change, and to its budget; None means 0.
    """

    weights: Float[Tensor, "n"] | None
    functionals: Float[Tensor, "c e"] | None
    budgets: Float[Tensor, "c"]
    clean: Float[Tensor, "..."]
    classes: tuple[int, ...] = ()
    label: int | None = None
    rounding: Float[Tensor, "c"] | None = None
    noise: Float[Tensor, "c"] | None = None

    @property
    def violated_at(self) -> Float[Tensor, "c"]:
        """What a computed change must reach so that the exact change reaches the exact budget."""
        return self.budgets if self.noise is None else self.budgets + self.noise

    @property
    def outward(self) -> float:
        """Factor >= 1 on a used share of the computed budgets that makes it one of the exact budgets at least."""
        if self.rounding is None:
            return 1.0
        room = self.budgets - self.rounding
        shares = torch.where(room > 0, self.budgets / room, math.inf)
        return math.nextafter(float(shares.max()), math.inf) if bool((self.rounding > 0).any()) else 1.0

    def pooled_rounding(self, output: Float[Tensor, "n e"], error: Float[Tensor, "n e"]) -> Float[Tensor, "..."]:
        """Rounding of ``pooled(output)``, entry by entry, if the output has this error."""
        if self.weights is None:
            return error
        return self.pooled(error) + gamma(output.shape[-2]) * self.pooled(output.abs())

    def change_rounding(
        self, output: Float[Tensor, "n e"], here: Float[Tensor, "..."], there: Float[Tensor, "..."]
    ) -> Float[Tensor, "c"]:
        """Rounding of ``changes(output)``, errors of the pooled outputs here (clean) and there given."""
        error = here + there
        if self.functionals is None:
            own = gamma(error.numel() + 3) * self.changes(output)
            length: Tensor = torch.linalg.vector_norm(error) * (1.0 + gamma(error.numel())) + own
            return length
        sizes = self.clean.abs() + self.pooled(output).abs()
        return self.functionals.abs() @ (error + gamma(error.numel() + 2) * sizes)

    def pooled(self, output: Float[Tensor, "*b n e"]) -> Float[Tensor, "..."]:
        """The part of the output that counts."""
        return output if self.weights is None else torch.einsum("n,...ne->...e", self.weights, output)

    def changes(self, output: Float[Tensor, "*b n e"]) -> Float[Tensor, "*b c"]:
        """Displacement norm, or the drop of each class margin, at perturbed outputs."""
        difference = self.pooled(output) - self.clean
        if self.functionals is None:
            dims = (-2, -1) if self.weights is None else (-1,)
            norm: Tensor = torch.linalg.vector_norm(difference, dim=dims)
            return norm[..., None]
        return -difference @ self.functionals.T

    def usage(self, output: Float[Tensor, "*b n e"]) -> Float[Tensor, "*b"]:
        """Largest used share of a budget: the goal is violated where it is >= 1."""
        return (self.changes(output) / self.violated_at).amax(dim=-1)


class Goal(ABC):
    """What must stay true; resolved at a clean output to budgets."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Short readable name for tables."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of everything that defines the goal."""

    @abstractmethod
    def resolve(self, output: Float[Tensor, "n e"], mass: Float[Tensor, "n"]) -> ResolvedGoal:
        """Budgets at the clean output; raises AlreadyViolatedError where the goal fails there."""

    def budget_rounding(
        self, resolved: ResolvedGoal, output: Float[Tensor, "n e"], error: Float[Tensor, "..."]
    ) -> Float[Tensor, "c"]:
        """Bound of ``|computed - exact|`` of each budget, the error of the pooled output given.

        Unless overridden: what the resolved goal says of itself, or 0.
        """
        return torch.zeros_like(resolved.budgets) if resolved.rounding is None else resolved.rounding


@dataclass(frozen=True)
class Displacement(Goal):
    """The (pooled) output moves by at most a tolerance in l2 / Frobenius norm.

    Args:
        tolerance: Allowed change, > 0; a share of the clean norm if ``relative``.
        relative: Whether the tolerance is a share of the clean pooled output's norm.
        pool: "all" (Frobenius norm of the whole output), "mean", or a row index.
    """

    tolerance: float
    relative: bool = False
    pool: Pool = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", as_number("tolerance", self.tolerance))
        object.__setattr__(self, "pool", checked_pool(self.pool))
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InputError(f"tolerance must be a positive number; got {self.tolerance}")

    @property
    def key(self) -> str:
        amount = f"{100 * self.tolerance:g}%" if self.relative else f"{self.tolerance:g}"
        part = {"all": "", "mean": " mean"}.get(str(self.pool), f" row:{self.pool}")
        return f"displacement {amount}{part}"

    @property
    def digest(self) -> str:
        return tensor_digest(extra=f"displacement;{self.tolerance!r};{self.relative};{self.pool}")

    def resolve(self, output: Tensor, mass: Tensor) -> ResolvedGoal:
        weights = pool_weights(self.pool, mass)
        clean = output if weights is None else weights @ output
        tolerance = self.tolerance
        if self.relative:
            norm = float(torch.linalg.vector_norm(clean))
            if norm == 0.0:
                raise InputError("the clean output is zero, so a relative tolerance is zero; give an absolute one")
            tolerance *= norm
        return ResolvedGoal(weights=weights, functionals=None, budgets=output.new_tensor([tolerance]), clean=clean)

    def budget_rounding(self, resolved: ResolvedGoal, output: Tensor, error: Tensor) -> Tensor:
        if not self.relative:
            return torch.zeros_like(resolved.budgets)
        moved: Tensor = self.tolerance * torch.linalg.vector_norm(error) * (1.0 + gamma(error.numel()))
        return moved + gamma(error.numel() + 4) * resolved.budgets


def parse_tolerance(text: str, pool: Pool = "all") -> Displacement:
    """Read an allowed displacement: ``1%`` of the clean output's norm, or an absolute number.

    Args:
        text: What the user wrote.
        pool: The part of the output that counts.

    Raises:
        InputError: Not a positive number, with or without a percent sign.
    """
    value, relative = read_tolerance(text)
    return Displacement(value, relative=relative, pool=pool)


@dataclass(frozen=True, eq=False)
class Margin(Goal):
    """A linear readout of the pooled output keeps its label: ``(w_y - w_c) . pooled + b_y - b_c > 0`` for all c != y.

    Args:
        weight: Readout weights (c, e), c >= 2.
        bias: Readout biases (c,) or None.
        pool: "mean" or a row index.
        label: The class y; None means the clean prediction.
    """

    weight: Float[Tensor, "c e"]
    bias: Float[Tensor, "c"] | None = None
    pool: Pool = "mean"
    label: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", as_tensor("readout weight", self.weight))
        object.__setattr__(self, "pool", checked_pool(self.pool))
        if self.weight.ndim != 2 or self.weight.shape[0] < 2:
            raise InputError(f"readout weight must have shape (c, e) with c >= 2; got {tuple(self.weight.shape)}")
        object.__setattr__(self, "weight", require_finite("readout weight", self.weight))
        classes = self.weight.shape[0]
        if self.bias is not None:
            object.__setattr__(self, "bias", as_tensor("readout bias", self.bias))
            if tuple(self.bias.shape) != (classes,):
                raise InputError(f"readout bias must have shape ({classes},); got {tuple(self.bias.shape)}")
            object.__setattr__(self, "bias", require_finite("readout bias", self.bias))
        if self.pool == "all":
            raise InputError("a margin needs pool 'mean' or a row index")
        if self.label is not None:
            object.__setattr__(self, "label", as_index("label", self.label))
        if self.label is not None and not 0 <= self.label < classes:
            raise InputError(f"label {self.label} does not exist; the readout has classes 0 to {classes - 1}")

    @property
    def key(self) -> str:
        part = "mean" if self.pool == "mean" else f"row:{self.pool}"
        return f"margin {part}" + ("" if self.label is None else f" label:{self.label}")

    @property
    def digest(self) -> str:
        return tensor_digest(self.weight, self.bias, extra=f"margin;{self.pool};{self.label}")

    def logits(self, pooled: Float[Tensor, "*b e"]) -> Float[Tensor, "*b c"]:
        """Readout of pooled outputs."""
        out = pooled @ self.weight.T
        return out if self.bias is None else out + self.bias

    def resolve(self, output: Tensor, mass: Tensor) -> ResolvedGoal:
        if output.shape[-1] != self.weight.shape[1]:
            raise InputError(f"the readout takes width {self.weight.shape[1]}, the layer gives {output.shape[-1]}")
        weights = pool_weights(self.pool, mass)
        assert weights is not None  # noqa: S101 - pool "all" was refused above; narrows the type
        pooled = weights @ output
        logits = self.logits(pooled)
        label = int(logits.argmax()) if self.label is None else self.label
        others = [c for c in range(logits.shape[0]) if c != label]
        margins = logits[label] - logits[others]
        if float(margins.min()) <= 0.0:
            rival = others[int(margins.argmin())]
            raise AlreadyViolatedError(
                f"the clean input is not classified as {label} (margin {float(margins.min()):.3g} to class {rival})"
            )
        functionals = self.weight[label] - self.weight[others]
        return ResolvedGoal(weights, functionals, margins, pooled, tuple(others), label)

    def budget_rounding(self, resolved: ResolvedGoal, output: Tensor, error: Tensor) -> Tensor:
        assert resolved.functionals is not None  # noqa: S101 - a margin has functionals
        assert resolved.label is not None  # noqa: S101 - and a label
        size = self.weight.abs() @ resolved.clean.abs() + (0.0 if self.bias is None else self.bias.abs())
        own = gamma(error.numel() + 3) * (size[resolved.label] + size[list(resolved.classes)])
        return resolved.functionals.abs() @ error + own


# ---- rounding --------------------------------------------------------------------------------------------------------

SQUARABLE = (1e-150, 1e150)
"""Sizes whose squares neither underflow nor overflow, with room for sums."""


def require_computable(resolved: ResolvedGoal) -> None:
    """Refuse a goal whose numbers overflowed, or whose squares would: every bound of it would be 0, infinite or NaN."""
    low, high = SQUARABLE
    sizes = {"pooled clean output": resolved.clean, "readout difference": resolved.functionals}
    for name, value in sizes.items():
        if value is not None and not bool((value.abs() <= high).all()):  # NaN fails as well
            raise InputError(f"the {name} has entries beyond {high:g} (or NaN); rescale weights, readout or tokens")
    if not bool(((resolved.budgets >= low) & (resolved.budgets <= high)).all()):
        worst = resolved.budgets.nan_to_num(math.inf)
        shown = float(worst.min() if float(worst.min()) < low else worst.max())
        raise InputError(f"the budget {shown:g} is not between {low:g} and {high:g}; rescale the goal or the weights")


def with_rounding(
    resolved: ResolvedGoal, goal: Goal, output: Float[Tensor, "n e"], error: Float[Tensor, "n e"]
) -> ResolvedGoal:
    """The goal with what its budgets and changes round.

    Args:
        resolved: The goal at the clean output.
        goal: Where its budgets come from.
        output: Clean output.
        error: Bounds of its rounding.

    Raises:
        InputError: A budget that is not twice above the rounding of the changes it is compared with.
    """
    pooled = resolved.pooled_rounding(output, error)
    rounding = goal.budget_rounding(resolved, output, pooled)
    noise = rounding + resolved.change_rounding(output, pooled, pooled)
    low = ~(noise <= 0.5 * resolved.budgets)  # NaN counts as too large
    if bool(low.any()):
        worst = int(torch.where(low, noise / resolved.budgets, 0.0).nan_to_num(math.inf).argmax())
        raise InputError(
            f"the budget {float(resolved.budgets[worst]):.3g} is not twice above the rounding of the output it is "
            f"compared with ({float(noise[worst]):.3g}); ask for a larger tolerance or margin"
        )
    return replace(resolved, rounding=rounding, noise=noise)
