"""Solves a conic program with cvxpy (the only file that imports it); what comes back are multipliers, never a bound."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import sparse

from attnrobust.certify.conic.program import Cone, ConeRows, ConicProgram, MomentMatrix

Array = Float[np.ndarray, "..."]

ACCURACY = 1e-6  # of the solver; a looser solution only widens the repaired bound
ATTEMPTS: tuple[dict[str, bool | float], ...] = ({}, {"equilibrate_enable": False}, {"max_step_fraction": 0.9})
"""Settings tried in turn where the interior-point method stalls; any multipliers are sound."""


@dataclass(frozen=True, eq=False)
class Multipliers:
    """A solver's answer.

    Args:
        values: One array per entry of ``program.rows``.
        point: The primal point it ended at; never used for a bound.
        iterations: Iterations.
        seconds: The solver's own time.
    """

    values: tuple[Array, ...]
    point: Array
    iterations: int
    seconds: float


def solve(program: ConicProgram) -> Multipliers | None:
    """Multipliers of (nearly) the best repaired bound, or None where the solver gave up.

    Args:
        program: The program; boxes are not handed on, they only serve the repair.
    """
    import cvxpy as cp

    x = cp.Variable(program.variables)
    stacks = [_stack(program.rows, cone) for cone in Cone if any(rows.cone is cone for rows in program.rows)]
    rows = [_constraint(cp, stack, x) for stack in stacks]
    domains = [matrix >> 0 for matrix in (_matrix(cp, block, x) for block in program.moments)]
    domains += _moves(cp, program, x)
    task = cp.Problem(cp.Minimize(program.cost @ x), [*rows, *domains])
    if not any(_solved(cp, task, settings) for settings in ATTEMPTS) or x.value is None:
        return None
    values: dict[int, Array] = {}
    for stack, constraint in zip(stacks, rows, strict=True):
        values |= stack.parted(_multiplier(stack.cone, constraint.dual_value))
    stats = task.solver_stats
    return Multipliers(
        values=tuple(values[number] for number in range(len(program.rows))),
        point=np.asarray(x.value), iterations=int(stats.num_iters or 0), seconds=float(stats.solve_time or 0.0),
    )  # fmt: skip


def _solved(cp: Any, task: Any, settings: dict[str, bool | float]) -> bool:
    """Whether the solver leaves multipliers for every row."""
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), ACCURACY)
    try:
        with warnings.catch_warnings():  # an inaccurate solution only widens the repaired bound
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            task.solve(solver=cp.CLARABEL, max_iter=100, **tolerances, **settings)
    except cp.SolverError:
        return False
    return all(constraint.dual_value is not None for constraint in task.constraints)


@dataclass(frozen=True, eq=False)
class _Stack:
    """All rows of one cone below each other, so that the modelling layer sees few constraints."""

    cone: Cone
    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    coef: sparse.csr_array
    const: Array

    def parted(self, values: Array) -> dict[int, Array]:
        """Values of all rows by the number of their group."""
        parts = np.split(values, np.cumsum(self.sizes)[:-1])
        return dict(zip(self.numbers, parts, strict=True))


def _stack(rows: Sequence[ConeRows], cone: Cone) -> _Stack:
    chosen = [(number, group) for number, group in enumerate(rows) if group.cone is cone]
    return _Stack(
        cone=cone, numbers=tuple(number for number, _ in chosen), sizes=tuple(len(g.const) for _, g in chosen),
        coef=sparse.csr_array(sparse.vstack([group.coef for _, group in chosen])),
        const=np.concatenate([group.const for _, group in chosen]),
    )  # fmt: skip


def _constraint(cp: Any, stack: _Stack, x: Any) -> Any:
    value = stack.coef @ x + stack.const
    if stack.cone is Cone.ZERO:
        return value == 0
    if stack.cone is Cone.NONNEGATIVE:
        return value >= 0
    parts = cp.reshape(value, (len(stack.const) // 3, 3), order="C")
    if stack.cone is Cone.SECOND_ORDER:
        return cp.SOC(parts[:, 0], parts[:, 1:], axis=1)
    return cp.ExpCone(parts[:, 0], parts[:, 1], parts[:, 2])


def _multiplier(cone: Cone, value: Any) -> Array:
    """The sign of a multiplier in cvxpy, turned so that ``cost - A^T y`` vanishes at the optimum."""
    if cone is Cone.ZERO:
        return -np.asarray(value, dtype=np.float64).reshape(-1)
    if cone is Cone.NONNEGATIVE:
        return np.asarray(value, dtype=np.float64).reshape(-1)
    if cone is Cone.SECOND_ORDER:
        first, rest = (np.asarray(part, dtype=np.float64) for part in value)
        return np.concatenate([first.reshape(-1, 1), rest.reshape(-1, 2)], axis=1).ravel()
    return np.stack([np.asarray(part, dtype=np.float64).reshape(-1) for part in value], axis=1).ravel()


def _matrix(cp: Any, block: MomentMatrix, x: Any) -> Any:
    """The full symmetric matrix from its entries a <= b."""
    upper = np.triu_indices(block.size)
    number = np.zeros((block.size, block.size), dtype=np.int64)
    number[upper] = block.index
    flat = np.maximum(number, number.T).ravel()
    spread = sparse.csr_array((np.ones(flat.size), (np.arange(flat.size), flat)), shape=(flat.size, x.size))
    return cp.reshape(spread @ x, (block.size, block.size), order="C")


def _moves(cp: Any, program: ConicProgram, x: Any) -> list[Any]:
    moves = program.moves
    inside = cp.reshape(x[moves.index.ravel()], moves.index.shape, order="C")
    if moves.norm == "frobenius":
        return [cp.norm(inside, "fro") <= moves.size]
    if moves.norm == "linf":
        return [cp.abs(inside) <= moves.size]
    return [cp.norm(inside, 2 if moves.norm == "l2" else 1, axis=1) <= moves.size]
