"""How far every single token may move alone: the certified side of ``attacks.token_radii``."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

from attnrobust.certify.displacement.any_token import AnyTokenBound
from attnrobust.certify.displacement.method import DisplacementCertificate
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate
from attnrobust.certify.radius import largest_radius
from attnrobust.numerics.chance import stream
from attnrobust.problem import Problem, require_problem
from attnrobust.results import Certificate, Kind
from attnrobust.threats.moves import AnyToken
from attnrobust.tokens import as_seed

TOKEN_METHODS = (DisplacementCertificate.name, MarginTokenCertificate.name)
"""The certificates of one token that moves alone, the first of displacements, the second of margins."""

LONGEST = 128
"""Tokens of an input up to which each is certified alone: the work grows with every one."""


def certified_token_radii(
    problem: Problem, *, tokens: Sequence[int] | None = None, seed: int = 0, methods: Sequence[str] = TOKEN_METHODS
) -> tuple[Certificate | None, ...]:
    """Certify every token by itself: no move of token i alone shorter than its radius breaks the goal.

    A displacement is answered by ``displacement``, a margin by ``margin-one-token``, each for the l2 ball around one
    known token. Random events of all tokens share one failure probability, so all radii hold at once except with the
    probability that each of them states.

    Args:
        problem: Network, clean input and goal; its threat is replaced by one known token at a time.
        tokens: The tokens to look at; None means all.
        seed: Seed of probabilistic certificates.
        methods: Names of certificates that may be used.

    Returns:
        One certificate per token, in increasing order of the token (a token that is named twice has one); its radius is
        a lower bound of the robust radius of that token alone, and its ``problem`` digest is that of the problem with
        the threat ``FrobeniusBall(tokens=(i,))``. None where no certificate speaks about it: whole networks, layers
        other than ``Attention``, more than 128 tokens.

    Raises:
        InputError: A token that does not exist.

    References:
        docs/displacement-certificate.md, theorem 1 and section 5; docs/margin-certificate.md, theorem 2.
    """
    require_problem(problem)
    seed = as_seed(seed)
    threat = AnyToken(None if tokens is None else tuple(tokens))
    singles = [Problem(problem.network, problem.clean, one, problem.goal) for one in threat.branches(problem.clean.n)]
    if problem.clean.n > LONGEST:
        return (None,) * len(singles)
    every = Problem(problem.network, problem.clean, threat, problem.goal)
    displacement, margin = DisplacementCertificate(), MarginTokenCertificate()
    if displacement.name in methods and displacement.refuses(every) is None:
        return tuple(_displacements(displacement, every, singles, seed))
    if margin.name in methods and margin.refuses(every) is None:
        return tuple(margin.certify(single, seed=seed) for single in singles)
    return (None,) * len(singles)


def _displacements(
    method: DisplacementCertificate, every: Problem, singles: Sequence[Problem], seed: int
) -> Iterator[Certificate]:
    """The certificates of the branches of "any one token", whose bound keeps what they share."""
    bound = AnyTokenBound(every, stream(seed, "token radii", every.digest), method.relative_tolerance)
    outward = method.outward * every.resolved.outward
    found = [_searched(bound, index, outward, method.relative_tolerance) for index in range(len(singles))]
    failure = bound.failure_probability  # of all together: a radius that was found early may not state less
    kind = Kind.PROBABILISTIC if failure > 0.0 else method.kind
    for single, (radius, evaluations, seconds) in zip(singles, found, strict=True):
        yield Certificate(
            problem=single.digest, method=method.name, kind=kind, failure_probability=failure, radius=radius,
            region=method.region, reference=method.reference, seconds=seconds, evaluations=evaluations,
        )  # fmt: skip


def _searched(bound: AnyTokenBound, index: int, outward: float, tolerance: float) -> tuple[float, int, float]:
    """Radius, evaluations and seconds of one token."""
    start, usage = time.perf_counter(), partial(bound.usage_of, index)
    guess = bound.bound_of(index).first_guess
    radius, evaluations = largest_radius(lambda r: usage(r) * outward, first_guess=guess, relative_tolerance=tolerance)
    return radius, evaluations, time.perf_counter() - start
