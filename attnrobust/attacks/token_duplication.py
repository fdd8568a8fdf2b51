"""The token-duplication attack: choose which tokens to copy, then move all copies."""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand import expanded_problem, goal_row
from attnrobust.attacks.measures.result import MeasureAttackResult, measure_digest
from attnrobust.attacks.method import AttackBudget, checked_epsilon
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.errors import InputError, UnsupportedModelError, UnsupportedThreatError
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.results import AttackResult, Status
from attnrobust.threats.measures import CausalOrder, Copies, PerturbedTokens
from attnrobust.threats.moves import FrobeniusBall, PerTokenBall

NAME = "token-duplication"
MOVED = 3
"""Choices of copies (the best ones without moving) whose copies are then moved."""


def duplication_effect(
    layer: Attention, points: Float[Tensor, "n d"], mass: Float[Tensor, "n"] | None = None, *, copies: int = 1
) -> Float[Tensor, "n n e"]:
    """Change of every output row when one token gets copies, for every token at once, in closed form.

    With P the attention before, o the heads' averages and r copies, the weight on token j becomes
    ``(1 + r) P_ij / (1 + r P_ij)``, so per head ``o_i`` changes by ``r P_ij / (1 + r P_ij) (v_j - o_i)``: exact for
    any r, no forward pass per token.

    Args:
        layer: The layer (masks allowed: copies share their token's position).
        points: The input.
        mass: Token masses or None; a copy adds the token's own mass.
        copies: r, how many copies one token gets.

    Returns:
        Entry [j, i] is the change of output row i when token j gets the copies.

    Raises:
        InputError: copies < 1.

    References:
        Derived; the proof is in docs/attacks.md.
    """
    if copies < 1:
        raise InputError(f"copies must be >= 1; got {copies}")
    weights, values = layer.weights(points, mass), layer.values(points)
    averages = weights @ values
    share = copies * weights / (1.0 + copies * weights)  # (h, i, j)
    change = share.permute(2, 0, 1)[..., None] * (values.transpose(0, 1)[:, :, None] - averages)
    return layer.combine(change)


@dataclass(frozen=True)
class _Choice:
    """Extra copies of each token and the budget they use without any move."""

    extra: tuple[int, ...]
    usage: float


def duplication_attack(
    problem: Problem,
    *,
    copies: int,
    epsilon: float | None = None,
    order: CausalOrder = "tied",
    seed: int = 0,
    budget: AttackBudget | None = None,
) -> MeasureAttackResult:
    """Duplicate tokens (up to a number of copies in all) and move every copy within the threat.

    A copy is a token at its parent's place: mass on that token for layers without a mask, an inserted token otherwise
    (``order`` says what a causal mask shows it). Copies are chosen greedily, the first by the closed form, the others
    by forward passes over all tokens; then the atoms move, with the threat's budget over all of them (sum of squares,
    or each one). Goals: a displacement of all rows and a row read the original tokens, the mean is over all copies.

    Args:
        problem: The question; its threat is a Frobenius ball or per-token l2 balls.
        copies: Most extra copies, >= 1.
        epsilon: Fixed budget of the moves; None searches the smallest that violates the goal, which is 0 where the
            copies alone do.
        order: "tied" or "strict", see ``CausalOrder``; it matters for causal layers only.
        seed: Seed of the run.
        budget: What each search may cost.

    Returns:
        The atoms; ``radius`` is the threat's distance of the moves, ``gain`` compares with moving the original tokens.

    Raises:
        InputError: copies < 1.
        UnsupportedModelError: A layer that is not ``Attention``.
        UnsupportedThreatError: Another threat.
    """
    start = time.perf_counter()
    epsilon = checked_epsilon(epsilon)
    budget = budget or AttackBudget()
    _refuse(problem, copies)
    with torch.no_grad():
        moving = TokenMoving().run([problem], epsilon=epsilon, seed=seed, budget=budget)[0]
        choices, queries = choose_copies(problem, copies, order=order)
        tried = [_move(problem, choice, epsilon=epsilon, order=order, seed=seed, budget=budget) for choice in choices]
        # no copy at all is within the budget too; it comes last, so that it wins no tie
        tried.append((moving, _expanded(problem, (0,) * problem.clean.n, order)))
    best = min(tried, key=lambda t: _rank(t[0], epsilon))
    spent = queries + sum(t[0].queries for t in tried)
    return _result(problem, best, moving, spent, copies, order, seed, epsilon, time.perf_counter() - start)


def choose_copies(problem: Problem, copies: int, *, order: CausalOrder = "tied") -> tuple[tuple[_Choice, ...], int]:
    """Greedy choice of copies, at most ``copies`` in all; the best few choices of any size, strongest first.

    Returns:
        The choices (no copies at all is not among them), and the forward evaluations spent.
    """
    n = problem.clean.n
    extra = (0,) * n
    seen: dict[tuple[int, ...], float] = {}
    queries = 0
    for round_index in range(copies):
        if round_index == 0 and order == "tied" and problem.mass is None:
            used = _first_copy(problem)
        else:
            resting = [_expanded(problem, _with(extra, j), order).usage_at_rest for j in range(n)]
            used = torch.tensor(resting, dtype=torch.float64)
            queries += n
        for j, value in enumerate(used.tolist()):
            seen[_with(extra, j)] = value
        extra = _with(extra, int(used.argmax()))
    strongest = sorted(seen.items(), key=lambda item: -item[1])[:MOVED]
    largest = max(seen, key=lambda e: (sum(e), seen[e]))  # the greedy end: all copies used
    chosen = dict(strongest) | {largest: seen[largest]}
    return tuple(_Choice(extra=e, usage=u) for e, u in chosen.items()), queries


def _first_copy(problem: Problem) -> Float[Tensor, "n"]:
    """Used budget of every single duplication, by the closed form."""
    layer = problem.network
    assert isinstance(layer, Attention)  # noqa: S101 - refused before; narrows the type
    n = problem.clean.n
    output = problem.clean_output + duplication_effect(layer, problem.clean.points)
    goal = problem.resolved
    if goal.weights is None or goal_row(problem) is not None:
        return goal.usage(output)
    # The mean is over n + 1 atoms: the copy of token j repeats row j.
    mean = (output.sum(dim=1) + output[torch.arange(n), torch.arange(n)]) / (n + 1)
    change = mean - goal.clean
    if goal.functionals is None:
        length: Tensor = torch.linalg.vector_norm(change, dim=-1)
        return length / goal.violated_at[0]
    return (-(change @ goal.functionals.T) / goal.violated_at).amax(dim=-1)


@dataclass(frozen=True, eq=False)
class _Duplicated:
    """The question about an input with copies."""

    problem: Problem
    parent: Int[Tensor, "m"]

    @property
    def usage_at_rest(self) -> float:
        """Used budget of the copies alone."""
        return float(self.problem.resolved.usage(self.problem.clean_output))


def _expanded(problem: Problem, extra: tuple[int, ...], order: CausalOrder) -> _Duplicated:
    counts = torch.tensor([1 + e for e in extra], device=problem.clean.points.device)
    parent = torch.arange(problem.clean.n, device=counts.device).repeat_interleave(counts)
    mass = problem.clean.mass[parent]
    first = torch.ones_like(parent, dtype=torch.bool)
    first[1:] = parent.diff() > 0
    movable = problem.threat.movable(problem.clean.n).to(parent.device)[parent].nonzero().flatten().tolist()
    expanded = expanded_problem(
        problem, parent, mass / mass.sum(), row_scale=first.to(mass.dtype), movable=tuple(movable), order=order
    )
    if isinstance(problem.threat, PerTokenBall):
        threat = PerTokenBall(norm=problem.threat.norm, tokens=tuple(movable))
        expanded = Problem(expanded.network, expanded.clean, threat, expanded.goal)
    return _Duplicated(expanded, parent)


def _move(
    problem: Problem, choice: _Choice, *, epsilon: float | None, order: CausalOrder, seed: int, budget: AttackBudget
) -> tuple[AttackResult, _Duplicated]:
    """Move all copies of one choice; nothing moves where the copies alone violate the goal."""
    duplicated = _expanded(problem, choice.extra, order)
    expanded = duplicated.problem
    rest = duplicated.usage_at_rest
    if epsilon is None and rest >= 1.0:
        still = AttackResult(
            expanded.digest, NAME, Status.FOUND, 0.0, rest, expanded.clean.points.clone(), 1, 0.0, seed
        )
        return still, duplicated
    result = TokenMoving().run([expanded], epsilon=epsilon, seed=seed, budget=budget)[0]
    if epsilon is not None and not result.usage >= rest:
        still = AttackResult(
            expanded.digest, NAME, Status.FOUND if rest >= 1.0 else Status.NOT_FOUND, 0.0, rest,
            expanded.clean.points.clone(), result.queries, 0.0, seed, epsilon,
        )  # fmt: skip
        return still, duplicated
    return result, duplicated


def _rank(result: AttackResult, epsilon: float | None) -> float:
    if epsilon is not None:
        return -result.usage if not math.isnan(result.usage) else math.inf
    return result.radius


def _with(extra: tuple[int, ...], token: int) -> tuple[int, ...]:
    return tuple(e + (i == token) for i, e in enumerate(extra))


def _refuse(problem: Problem, copies: int) -> None:
    if copies < 1:
        raise InputError(f"copies must be >= 1; got {copies}")
    if type(problem.network) is not Attention:
        raise UnsupportedModelError(
            f"token duplication handles Attention layers; {type(problem.network).__name__} does not say what a copy is"
        )
    if not isinstance(problem.threat, FrobeniusBall | PerTokenBall):
        raise UnsupportedThreatError(
            f"token duplication does not handle the threat {problem.threat.key!r}; use frobenius or per-token"
        )


def _result(
    problem: Problem,
    best: tuple[AttackResult, _Duplicated],
    moving: AttackResult,
    queries: int,
    copies: int,
    order: CausalOrder,
    seed: int,
    epsilon: float | None,
    seconds: float,
) -> MeasureAttackResult:
    result, duplicated = best
    threat = f"{problem.threat.key} {Copies(copies, order).key}"
    points = result.perturbed
    atoms = None if points is None else PerturbedTokens(points, duplicated.problem.clean.mass, duplicated.parent)
    return MeasureAttackResult(
        problem=measure_digest(problem, threat),
        attack=NAME,
        status=result.status,
        radius=result.radius,
        usage=result.usage,
        perturbed=points,
        queries=queries,
        seconds=seconds,
        seed=seed,
        epsilon=epsilon,
        note=result.note,
        threat=threat,
        atoms=atoms,
        moving_radius=moving.radius if epsilon is None else moving.usage,
        source=problem.digest,
    )
