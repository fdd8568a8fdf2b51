"""The certificates of one problem that can still win, given what an attack found and what was certified so far."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from attnrobust.certify.radius import EXACT
from attnrobust.problem import Problem
from attnrobust.results import Certificate, CertificationReport, NotApplicable
from attnrobust.threats.moves import PerTokenBall

LEADERS = ("displacement", "margin-one-token", "margin-majorant")
"""Run first: on the measured problems of a layer one of them, or ``singla2020-curvature`` per token, has the largest
radius."""

NEVER_ABOVE = {
    "castin2024-derived": ("spread-lipschitz",),
    "castin2024-reported": ("spread-lipschitz", "castin2024-derived"),
}
"""By theorem (docs/certificates-literature.md, sections 2 and 3): its radius is at most those of the ones named."""

BEHIND = frozenset({"castin2024-reported", "castin2024-derived", "spread-lipschitz", "havens2024-local"})
"""Well behind a leader that is within ``NEAR`` of the attack in the medians of docs/tightness.md."""

BEHIND_BUT_PER_TOKEN = frozenset({"singla2020-curvature"})
"""The same, except where every token has a ball of its own: there it had the largest radius now and then."""

ON_REQUEST = frozenset({"rigorous-local"})
"""Seconds a row in ball arithmetic, and behind a leader of any positive radius in the medians of docs/tightness.md."""

NEAR = 3.0
"""Gap up to which a leader was not overtaken by those behind."""

RULES = 2
"""Raised whenever the rules change: a run that began under others is not gone on with."""

ALL = "--all-certificates runs it"

Watch = Callable[[str], object]


@runtime_checkable
class Contestant(Protocol):
    """What is asked of a ``CertificateMethod`` here."""

    @property
    def name(self) -> str:
        """Its name."""

    def undeclared(self, problem: Problem) -> str | None:
        """What of the problem it does not speak about."""

    def attempt(self, problem: Problem, *, seed: int, named: bool, ceiling: float) -> Certificate | NotApplicable:
        """Its certificate, or why there is none."""


def certify_what_can_win(
    problem: Problem,
    methods: Sequence[Contestant],
    *,
    attack_radius: float,
    seed: int = 0,
    watch: Watch | None = None,
) -> CertificationReport:
    """Certificates whose radius may be the largest one; the others are in ``skipped`` with the reason.

    No certified radius of a right certificate exceeds the attack radius: it is the ceiling of every search, and nothing
    more is run once the best is within 1 % of it. By theorem ("dominated") those are left out that are never above one
    that ran. "Skipped by default" are those that the measurements show behind a leader: the literature's bounds where
    its gap is at most ``NEAR``, and ``rigorous-local`` wherever it certifies anything: a record and no theorem.

    An unsound certificate still shows: a search that ends near the attack radius has looked right above it.

    Args:
        problem: The question.
        methods: Candidates.
        attack_radius: Verified radius of a violation, an upper bound of the robust one; infinite where there is none.
        seed: As in ``certify``.
        watch: Is told the name of each certificate that begins.

    Returns:
        The report; its best radius is a lower bound of the robust radius.
    """
    start = time.perf_counter()
    done: list[Certificate] = []
    skipped: list[NotApplicable] = []
    for method in sorted(methods, key=_place):
        reason = _cannot_win(method.name, done, attack_radius, per_token=isinstance(problem.threat, PerTokenBall))
        if reason is not None and method.undeclared(problem) is None:
            skipped.append(NotApplicable(method=method.name, reason=f"not run: {reason}; {ALL}"))
            continue
        if watch is not None:
            watch(method.name)
        answer = method.attempt(problem, seed=seed, named=False, ceiling=attack_radius)
        done += [answer] if isinstance(answer, Certificate) else []
        skipped += [answer] if isinstance(answer, NotApplicable) else []
    return CertificationReport(problem.digest, tuple(done), tuple(skipped), time.perf_counter() - start)


def _place(method: Contestant) -> tuple[int, int]:
    """Leaders in their order, then the others as they come, each after those that it is never above."""
    first = LEADERS.index(method.name) if method.name in LEADERS else len(LEADERS)
    return first, len(NEVER_ABOVE.get(method.name, ()))


def _cannot_win(name: str, done: Sequence[Certificate], attack_radius: float, *, per_token: bool) -> str | None:
    best = max(done, key=lambda certificate: certificate.radius, default=None)
    if best is None or best.radius <= 0.0:
        return None
    if attack_radius <= EXACT * best.radius:
        return f"{best.method} is within 1% of the attack radius"
    above = next((one.method for one in done if one.method in NEVER_ABOVE.get(name, ())), None)
    if above is not None:
        return f"dominated by {above}"
    behind = name in BEHIND or (name in BEHIND_BUT_PER_TOKEN and not per_token)
    near = behind and attack_radius <= NEAR * best.radius
    if best.method in LEADERS and (near or name in ON_REQUEST):
        return f"skipped by default behind {best.method}"
    return None
