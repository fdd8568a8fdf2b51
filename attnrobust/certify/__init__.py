"""Certificates: lower bounds of the robust radius."""

from collections.abc import Sequence

from attnrobust.certify._certify import CertificateMethod, PreparedBound, certify_with
from attnrobust.certify.registry import ALL_METHODS, method_named
from attnrobust.problem import Problem
from attnrobust.results import CertificationReport

__all__ = ["ALL_METHODS", "CertificateMethod", "PreparedBound", "certify", "certify_with", "method_named"]


def certify(problem: Problem, *, methods: Sequence[str] | None = None, seed: int = 0) -> CertificationReport:
    """Certify one problem by every method that applies (or the named ones); ``report.best`` has the largest radius.

    Args:
        problem: Network, clean input, threat and goal.
        methods: Names of certificates; None means all.
        seed: Seed of the random start vectors of probabilistic methods.

    Returns:
        All certificates beside each other; each radius is a lower bound of the true robust radius.

    Raises:
        UnknownNameError: A name that does not exist (lists the nearest).
    """
    chosen = ALL_METHODS if methods is None else tuple(method_named(name) for name in methods)
    return certify_with(problem, chosen, seed=seed)
