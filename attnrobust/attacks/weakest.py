"""Which token is weakest: the attack radius of every single token, in one batched search."""

import math
import time
from collections.abc import Sequence

import torch

from attnrobust.attacks._attack import AttackBudget, Search, build_result, input_seed, verify
from attnrobust.attacks._evaluate import Evaluator
from attnrobust.attacks.drivers.projected_gradient import search_rows
from attnrobust.attacks.token_moving import both_signs, branch_starts
from attnrobust.problem import Problem
from attnrobust.results import AttackResult
from attnrobust.threat import AnyToken

NAME = "token-moving"


def token_radii(
    problem: Problem,
    *,
    tokens: Sequence[int] | None = None,
    epsilon: float | None = None,
    seed: int = 0,
    budget: AttackBudget | None = None,
) -> tuple[AttackResult, ...]:
    """Attack every token by itself (l2 ball around one known token), all tokens in one batched search.

    Args:
        problem: Network, clean input and goal; its threat is replaced by one known token at a time.
        tokens: The tokens to look at; None means all.
        epsilon: Fixed budget of the one token, or None for its minimal radius.
        seed: Seed of the run.
        budget: What the search may cost (``restarts`` is not used: each token gets two rows).

    Returns:
        One verified result per token, in order; the ``problem`` digest of each is that of the problem with the threat
        ``FrobeniusBall(tokens=(i,))``. The smallest radius is an upper bound of the "any one token" radius.

    Raises:
        InputError: A token that does not exist.
    """
    start_time = time.perf_counter()
    budget = AttackBudget() if budget is None else budget
    threat = AnyToken(tokens=None if tokens is None else tuple(tokens))
    singles = [Problem(problem.network, problem.clean, b, problem.goal) for b in threat.branches(problem.clean.n)]
    evaluator = Evaluator([problem], memory_bytes=budget.memory_bytes)
    search = Search(
        evaluator=evaluator,
        threat=threat,
        epsilon=epsilon,
        seeds=(input_seed(seed, problem.digest, NAME),),
        budget=budget,
        deadline=math.inf if budget.seconds is None else start_time + budget.seconds,
    )
    with torch.no_grad():
        start, _ = branch_starts(search, evaluator)
        rows = both_signs(start)
        found = search_rows(search, evaluator, rows, steps=budget.steps, finalists=2 * len(singles), ordered=False)[0]
        points = [verify(p, found[[i, i + len(singles)]], epsilon=epsilon) for i, p in enumerate(singles)]
    seconds = (time.perf_counter() - start_time) / len(singles)
    queries = int(evaluator.queries[0]) // len(singles)
    return tuple(
        build_result(
            p, NAME, point, queries=queries, seconds=seconds, seed=seed, epsilon=epsilon, timed_out=search.out_of_time
        )
        for p, point in zip(singles, points, strict=True)
    )
