"""Which token is weakest: the attack radius of every single token, in one batched search."""

from collections.abc import Sequence

from attnrobust.attacks.method import AttackBudget, checked_epsilon, require_budget, run_many
from attnrobust.attacks.registry import attack_named
from attnrobust.problem import Problem, require_problem
from attnrobust.results import AttackResult
from attnrobust.threats.moves import AnyToken
from attnrobust.tokens import as_seed


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
        budget: What the search may cost, per token.

    Returns:
        One verified result per token, in increasing order of the token (a token that is named twice has one);
        the ``problem`` digest of each is that of the
        problem with the threat ``FrobeniusBall(tokens=(i,))``. The smallest radius is an upper bound of the
        "any one token" radius.

    Raises:
        InputError: A token that does not exist.
    """
    require_problem(problem)
    budget, seed = AttackBudget() if budget is None else budget, as_seed(seed)
    require_budget(budget)
    threat = AnyToken(tuple(tokens) if isinstance(tokens, list) else tokens)  # type: ignore[arg-type]  # it checks
    singles = [Problem(problem.network, problem.clean, b, problem.goal) for b in threat.branches(problem.clean.n)]
    return tuple(
        run_many(
            attack_named("token-moving"),
            singles,
            epsilon=checked_epsilon(epsilon),
            seed=seed,
            budget=budget,
            batch_size=len(singles),
        )
    )
