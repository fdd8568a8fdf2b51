"""The token-duplication attack: choose which tokens to copy, then move all copies."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand import (
    covers_copies,
    expand_layer,
    expanded_goal,
    expanded_problem,
    goal_row,
    not_copied,
)
from attnrobust.attacks.method import AttackMethod, Attempt, Work, cut_short, left
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.attacks.verification import VerifiedPoint
from attnrobust.errors import InputError, UnsupportedModelError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.problem import Problem
from attnrobust.threats.copies import CausalOrder, Copies
from attnrobust.threats.moves import PerTokenBall
from attnrobust.tokens import PerturbedTokens

MOVED = 3
"""Choices of each number of copies (the best ones without moving) whose copies are then moved."""


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
        UnsupportedModelError: A layer that is not exactly ``Attention``, or one with a feature added later.

    References:
        Derived; the proof is in docs/attacks.md.
    """
    if copies < 1:
        raise InputError(f"copies must be >= 1; got {copies}")
    if not covers_copies(layer):
        raise UnsupportedModelError(f"the closed form of copies does not cover this {type(layer).__name__}")
    weights, values = layer.weights(points, mass), layer.values(points)
    averages = weights @ values
    share = copies * weights / (1.0 + copies * weights)  # (h, i, j)
    change = share.permute(2, 0, 1)[..., None] * (values.transpose(0, 1)[:, :, None] - averages)
    return layer.combine(change)


@dataclass(frozen=True)
class Choice:
    """Extra copies of each token and the budget they use without any move."""

    extra: tuple[int, ...]
    usage: float


class TokenDuplication(AttackMethod):
    """Duplicates tokens (up to a number of copies in all) and moves every copy within the copies' own threat.

    A copy is a token at its parent's place: mass on that token for layers without a mask, an inserted token otherwise
    (the threat's ``order`` says what a causal mask shows it). Copies are chosen greedily, the first by the closed form,
    the others by forward passes over all tokens; then the atoms move, with the budget over all of them (sum of squares,
    or each one). Goals: a displacement of all rows and a row read the original tokens, the mean is over all copies.
    The radius is the distance of the moves, 0 where the copies alone violate the goal.
    """

    name = "token-duplication"
    threats = (Copies,)

    def refuses_more(self, problem: Problem, epsilon: float | None) -> str | None:
        layer = problem.network
        if type(layer) is NetworkGraph:
            return _refused_network(problem)
        if type(layer) is not Attention:
            return f"it handles Attention layers; {type(layer).__name__} does not say what a copy is"
        return None if covers_copies(layer) else f"it does not know what a copy is under {not_copied(layer)}"

    def search(self, work: Work) -> list[Attempt]:
        return [_duplicated(problem, copies_of(problem), work) for problem in work.problems]


def _refused_network(problem: Problem) -> str | None:
    """Why it is not known what a copy is in this network; None if it is."""
    n = problem.clean.n
    try:
        expand_layer(problem.network, torch.arange(n, device=problem.clean.points.device), n)
    except UnsupportedModelError as error:
        return first_line(error)
    return None


def copies_of(problem: Problem) -> Copies:
    """The copies that a problem asks about."""
    threat = problem.threat
    assert isinstance(threat, Copies)  # noqa: S101 - the template refuses others; narrows the type
    return threat


def _duplicated(problem: Problem, threat: Copies, work: Work) -> Attempt:
    moved = Problem(problem.network, problem.clean, threat.moves, problem.goal)
    moving = _moved(moved, _share(work, 0, 4))
    room = left(work.budget, moving.queries)
    choices, queries = choose_copies(
        moved, threat.copies, order=threat.order, limit=None if room is None else room // 4
    )
    spent, tried = moving.queries + queries, []
    for number, choice in enumerate(choices):
        if left(work.budget, spent) == 0:
            break
        part = _share(work, spent, len(choices) - number)
        tried.append(move_copies(moved, choice, order=threat.order, work=part))
        spent += tried[-1][0].queries
    # no copy at all is within the budget too; it comes last, so that it wins no tie
    tried.append((moving, expanded(moved, (0,) * problem.clean.n, threat.order)))
    best, atoms = min(tried, key=lambda t: t[0].point.rank)
    points = best.point.perturbed
    return Attempt(
        point=best.point,
        queries=spent,
        failure=cut_short(best.point, work.budget),
        atoms=None if points is None else PerturbedTokens(points, atoms.problem.clean.mass, atoms.parent),
        moving_radius=moving.point.radius if work.epsilon is None else moving.point.usage,
    )


def _share(work: Work, spent: int, parts: int) -> Work:
    """The work with one part of the queries that are left, at least one; without a limit the whole work."""
    rest = left(work.budget, spent)
    return work if rest is None else replace(work, budget=replace(work.budget, queries=max(1, rest // parts)))


def _moved(problem: Problem, work: Work) -> Attempt:
    """The token-moving attack on one problem."""
    return TokenMoving().search(replace(work, problems=[problem]))[0]


def choose_copies(
    problem: Problem, copies: int, *, order: CausalOrder = "tied", limit: int | None = None
) -> tuple[tuple[Choice, ...], int]:
    """Greedy choice of copies, at most ``copies`` in all: the strongest few of every number of copies.

    What is chosen with fewer copies is chosen with more, too, so more copies never end in a larger radius.

    Args:
        problem: The question about moved tokens.
        copies: How many there may be.
        order: What a causal mask shows a copy.
        limit: Largest number of evaluations; None means no limit. What it does not reach is not chosen.

    Returns:
        The choices (no copies at all is not among them), and the forward evaluations spent.
    """
    n = problem.clean.n
    extra, chosen, queries = (0,) * n, list[Choice](), 0
    for number in range(copies):
        if number == 0 and order == "tied" and problem.mass is None and isinstance(problem.network, Attention):
            used = _first_copy(problem).tolist()
        else:
            tokens = range(n if limit is None else min(n, limit - queries))
            used = [_resting(problem, _with(extra, j), order) for j in tokens]
            queries += len(used)
        if not used:
            break
        strongest = sorted(range(len(used)), key=lambda j: -used[j])[:MOVED]
        chosen += [Choice(_with(extra, j), used[j]) for j in strongest]
        extra = _with(extra, strongest[0])
    return tuple(sorted(chosen, key=lambda choice: -choice.usage)), queries


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
class Duplicated:
    """The question about an input with copies."""

    problem: Problem
    parent: Int[Tensor, "m"]

    @property
    def usage_at_rest(self) -> float:
        """Used budget of the copies alone."""
        return float(self.problem.resolved.usage(self.problem.clean_output))


def _atoms(problem: Problem, extra: tuple[int, ...]) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Parents and masses of the atoms, and 1 for the first one of each token."""
    counts = torch.tensor([1 + e for e in extra], device=problem.clean.points.device)
    parent = torch.arange(problem.clean.n, device=counts.device).repeat_interleave(counts)
    mass = problem.clean.mass[parent]
    first = torch.ones_like(mass)
    first[1:] = (parent.diff() > 0).to(mass)
    return parent, mass / mass.sum(), first


def _resting(problem: Problem, extra: tuple[int, ...], order: CausalOrder) -> float:
    """Used budget of copies that do not move, to choose by; a choice is verified where its copies move."""
    parent, mass, first = _atoms(problem, extra)
    network = expand_layer(problem.network, parent, problem.clean.n, order=order)
    given = None if problem.mass is None else mass  # copies of equal tokens have equal masses
    output = network(problem.clean.points[parent], given)
    return float(expanded_goal(problem, parent, mass, first).usage(output))


def expanded(problem: Problem, extra: tuple[int, ...], order: CausalOrder) -> Duplicated:
    """The question about moved tokens with extra copies of each token."""
    parent, mass, first = _atoms(problem, extra)
    moves = problem.moves
    movable = moves.movable(problem.clean.n).to(parent.device)[parent].nonzero().flatten().tolist()
    question = expanded_problem(problem, parent, mass, row_scale=first, movable=tuple(movable), order=order)
    if isinstance(moves, PerTokenBall):
        threat = PerTokenBall(norm=moves.norm, tokens=tuple(movable))
        question = Problem(question.network, question.clean, threat, question.goal)
    return Duplicated(question, parent)


def move_copies(problem: Problem, choice: Choice, *, order: CausalOrder, work: Work) -> tuple[Attempt, Duplicated]:
    """Move all copies of one choice; nothing moves where the copies alone violate the goal.

    Args:
        problem: The question about moved tokens.
        choice: The copies.
        order: Meaning of a causal mask.
        work: Mode, seed and cost limits.
    """
    duplicated = expanded(problem, choice.extra, order)
    rest, work = duplicated.usage_at_rest, _share(work, 1, 1)
    points = duplicated.problem.clean.points.clone()
    if work.epsilon is None and rest >= 1.0:
        return Attempt(point=VerifiedPoint(0.0, rest, points, 1, None), queries=1), duplicated
    found = _moved(duplicated.problem, work)
    if work.epsilon is not None and not found.point.usage >= rest:
        point = VerifiedPoint(0.0, rest, points, found.queries, work.epsilon)
        return Attempt(point=point, queries=found.queries + 1), duplicated
    return replace(found, queries=found.queries + 1), duplicated


def _with(extra: tuple[int, ...], token: int) -> tuple[int, ...]:
    return tuple(e + (i == token) for i, e in enumerate(extra))
