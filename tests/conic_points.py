"""The true point of a move in a conic relaxation: every variable from its definition, by plain evaluation."""

import numpy as np
import torch
from numpy.typing import NDArray

from attnrobust.certify.conic.basis import Bases
from attnrobust.certify.conic.margin_program import Assembly, margin_program
from attnrobust.certify.conic.program import Cone, ConicProgram
from attnrobust.certify.conic.relaxation import Block
from attnrobust.certify.conic.row import MoveSet, Row, move_set, rows_of
from attnrobust.goals import Margin
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from tests.cases import Case

Array = NDArray[np.float64]


def true_point(assembly: Assembly, move: Array, token: float) -> Array:
    """All variables at the move (m, d) of the moving tokens; ``token`` is the unit rho."""
    x = np.zeros(assembly.program.variables)
    x[: move.size] = (move / token).ravel()
    x[move.size : move.size + len(move)] = (move**2).sum(axis=1) / token**2
    for block, columns in assembly.blocks:
        local = x[columns]
        for name, value in block_values(block, move, token).items():
            local[block.columns[name]] = value
        x[columns] = local
    return x


def block_values(block: Block, move: Array, token: float) -> dict[str, Array]:
    """Single variables and moments of one row."""
    row, ranges = block.row, block.ranges
    delta = np.vstack([move, np.zeros(move.shape[1])])  # number -1: a token that does not move
    query, keys = delta[row.query], delta[row.key]
    b = np.einsum("a,ab,jb->j", query, row.bilinear, keys)
    a = keys @ row.beta + row.alpha @ query + b
    w = row.weight  # differences to each key: accurate where one weight is near 1
    u = np.array([sum(w[m] * (a[j] - a[m]) for m in range(len(w)) if m != j) for j in range(len(w))])
    t = keys @ row.value
    logs = row.log_weight + a
    logs -= np.logaddexp.reduce(logs)
    weight = np.exp(logs)
    small = bool(np.abs(u).max() < 30)
    s = float(w @ np.where(np.abs(u) < 1e-3, u**2 / 2 + u**3 / 6 + u**4 / 24, np.expm1(u) - u)) if small else np.nan
    kappa = np.log1p(s) if small else float((row.log_weight + u - logs)[np.argmax(w)])
    p = s / (1 + s) if small else -np.expm1(-kappa)
    xi = np.zeros(block.size)
    xi[0], xi[-1] = 1.0, p / ranges.share
    out = {"weight": weight, "log-mass": np.array([kappa]), "values": np.array([-(weight @ t) / block.unit])}
    for number, place in block.places.items():
        xi[place] = block.bases[number].T @ move[number] / token
    if block.bends:
        xi[block.bilinear_place] = (row.centring @ b)[block.free_keys] / ranges.bilinear
        scale = row.bilinear_norm * token**2
        own = block.bases[row.query]
        inside, tail_query, tail_key = np.zeros(block.keys), np.zeros(block.keys), np.zeros(block.keys)
        for j in np.flatnonzero(row.key_moves):
            basis = block.bases[row.key[j]]
            inner, outer = own @ own.T @ query, basis @ basis.T @ keys[j]
            inside[j] = inner @ row.bilinear @ outer
            tail_query[j] = np.linalg.norm(query - inner) * np.linalg.norm(keys[j]) / token**2
            tail_key[j] = np.linalg.norm(inner) * np.linalg.norm(keys[j] - outer) / token**2
        out |= {"rest": (b - inside) / scale, "tail-query": tail_query, "tail-key": tail_key}
        out["length"] = np.array([((query @ row.bilinear) ** 2).sum() / (row.bilinear_norm * token) ** 2])
    out["cross"] = np.abs(u * t) / (ranges.logit * block.value_scale)
    out["pair"] = weight * t / block.value_scale
    upper = np.triu_indices(block.size)
    out["moments"] = np.outer(xi, xi)[upper]
    return out


def violations(program: ConicProgram, x: Array) -> dict[str, float]:
    """How far each group of rows is outside its cone, in its own scaled units."""
    out: dict[str, float] = {}
    for rows in program.rows:
        s = rows.coef @ x + rows.const
        if rows.cone is Cone.ZERO:
            value = np.abs(s)
        elif rows.cone is Cone.NONNEGATIVE:
            value = -s
        elif rows.cone is Cone.SECOND_ORDER:
            s = s.reshape(-1, 3)
            value = np.hypot(s[:, 1], s[:, 2]) - s[:, 0]
        else:
            s = s.reshape(-1, 3)
            value = s[:, 1] * np.exp(s[:, 0] / s[:, 1]) - s[:, 2]
        out[rows.name] = max(out.get(rows.name, -np.inf), float(value.max()) if len(value) else -np.inf)
    for box in program.boxes:
        outside = np.maximum(box.lower - x[box.index], x[box.index] - box.upper)
        out["box"] = max(out.get("box", -np.inf), float(outside.max()) if len(outside) else -np.inf)
    for block in program.moments:
        matrix = np.zeros((block.size, block.size))
        matrix[np.triu_indices(block.size)] = x[block.index]
        out["trace"] = max(out.get("trace", -np.inf), float(np.trace(matrix)) - block.trace)
    return out


THREATS: tuple[FrobeniusBall | PerTokenBall, ...] = (
    FrobeniusBall(), FrobeniusBall(tokens=(0,)), PerTokenBall(), PerTokenBall(norm="linf"),
    PerTokenBall(norm="l1", tokens=(0,)),
)  # fmt: skip


def margin_problem(case: Case, threat: MoveThreat, *, classes: int = 2, row: int | None = None) -> Problem:
    """A margin that holds at the clean input."""
    draw = torch.Generator().manual_seed(case.n + 7 * classes)
    weight = torch.randn(classes, case.attention.out_width, generator=draw, dtype=torch.float64)
    bias = torch.randn(classes, generator=draw, dtype=torch.float64)
    goal = Margin(weight=weight, bias=bias, pool="mean" if row is None else row)
    return Problem(case.attention, case.tokens, threat, goal)


def rows_for(problem: Problem, threat: FrobeniusBall | PerTokenBall) -> tuple[Row, ...]:
    resolved = problem.resolved
    assert resolved.functionals is not None
    assert resolved.weights is not None
    movable = threat.movable(problem.clean.n)
    return tuple(rows_of(problem, resolved.functionals[0], resolved.weights, movable))


def assembled(problem: Problem, radius: float, *, bases: Bases = "aligned") -> tuple[Assembly, MoveSet]:
    threat = problem.threat
    assert isinstance(threat, FrobeniusBall | PerTokenBall)
    reach = move_set(threat, problem.clean.n, problem.clean.width, radius)
    budget = float(problem.resolved.budgets[0])
    return margin_program(rows_for(problem, threat), reach, budget=budget, bases=bases), reach
