"""A pytest fixture for the tests of users: assert that a layer, or the whole model, is certified at an input.

Put ``pytest_plugins = ["attnrobust.pytest_plugin"]`` into ``conftest.py``. It is not registered by the installation,
because pytest would then import torch in every project of the environment.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnrobust.goals import Goal
    from attnrobust.models.networks.reading import ReadNetwork
    from attnrobust.problem import Problem, TokenMap
    from attnrobust.results import Certificate
    from attnrobust.tokens import TokenMeasure


class CertifiedAssertion:
    """Callable that fails the test where the certified radius is too small; see ``__call__``."""

    def __call__(
        self,
        layer: "TokenMap | nn.Module | ReadNetwork",
        x: "TokenMeasure | Tensor | None" = None,
        *,
        radius: float,
        tolerance: str | float | None = None,
        goal: "str | Goal | None" = None,
        threat: str = "frobenius",
        methods: tuple[str, ...] | str | None = None,
        seed: int = 0,
    ) -> "Certificate":
        """Assert that no move of the tokens within ``radius`` breaks the goal.

        Args:
            layer: A layer specification, a torch module that has an adapter (in eval mode), or a whole model as
                ``read_network`` gives it.
            x: The input's tokens, (n, d); of a whole model left out, it was read at its input.
            radius: The radius to reach, in the distance of the threat.
            tolerance: ``"1%"`` of the output's norm, or an absolute number; 10 % where there is no goal either.
            goal: "decision" (of a whole model: its own class stays), or a goal; excludes ``tolerance``.
            threat: Key of the threat, as on the command line.
            methods: Certificates by name, or one name; None means all that apply.
            seed: Seed of probabilistic certificates.

        Returns:
            The best certificate.

        Raises:
            pytest.fail.Exception: The best certified radius is below ``radius``.
            InputError: A layer, input or option that cannot be used.
        """
        __tracebackhide__ = True
        from attnrobust.certify import certify

        problem = _problem(layer, x, threat, _goal(tolerance, goal))
        report = certify(problem, methods=methods, seed=seed)
        best = report.best
        if best is None or best.radius < radius:
            found = "nothing" if best is None else f"{best.radius:.6g} ({best.method})"
            others = ", ".join(f"{c.method} {c.radius:.4g}" for c in report.certificates)
            asked = "decision" if goal == "decision" else problem.goal.key
            pytest.fail(
                f"certified radius {found} is below {radius:g} for {asked}, {threat}, n = {problem.clean.n}"
                + (f"; all: {others}" if others else f"; {report.why_none}"),
                pytrace=False,
            )
        return best


def _goal(tolerance: str | float | None, goal: "str | Goal | None") -> "str | Goal":
    """What is asked: a goal, or the name of one."""
    from attnrobust.errors import InputError, UnknownNameError
    from attnrobust.goals import Goal, parse_tolerance

    if goal is None:
        return parse_tolerance(str("10%" if tolerance is None else tolerance))
    if tolerance is not None:
        raise InputError("a goal and a tolerance exclude each other; give one of goal= and tolerance=")
    if not isinstance(goal, Goal) and goal != "decision":
        raise UnknownNameError("goal", goal, ("decision",))
    return goal


def _problem(
    layer: "TokenMap | nn.Module | ReadNetwork",
    x: "TokenMeasure | Tensor | None",
    threat: str,
    goal: "str | Goal",
) -> "Problem":
    """The question about a layer at tokens, or about a whole model at the input that it was read at."""
    from attnrobust.errors import InputError
    from attnrobust.models.networks.reading import ReadNetwork
    from attnrobust.problem import Problem
    from attnrobust.threats.parse import parse_threat
    from attnrobust.tokens import TokenMeasure

    if isinstance(layer, ReadNetwork):
        if x is not None:
            raise InputError("a whole model has been read at its input; leave the tokens out")
        network, asked = layer.decision() if isinstance(goal, str) else (layer.graph, goal)
        return Problem(network, layer.input.measure, parse_threat(threat), asked)
    if isinstance(goal, str):
        raise InputError(f"the goal {goal!r} is one of a whole model; give attnrobust.read_network(model, input)")
    if x is None:
        raise InputError("give the tokens (n, d) that enter the layer")
    clean = x if isinstance(x, TokenMeasure) else TokenMeasure(x)
    return Problem(_network(layer), clean, parse_threat(threat), goal)


def _network(layer: "TokenMap | nn.Module") -> "TokenMap":
    from torch import nn

    if not isinstance(layer, nn.Module):
        return layer
    from attnrobust.models.listing import adapter_for, find_layer, list_layers

    adapter = adapter_for(layer)
    if adapter is not None:
        return adapter.spec(layer)  # as it is: a module in train mode with dropout is refused
    return _network(layer.get_submodule(find_layer(list_layers(layer), None).name))


@pytest.fixture
def assert_certified() -> CertifiedAssertion:
    """``assert_certified(layer, x, radius=0.01, tolerance="10%")``; ``(read, radius=0.01, goal="decision")``.

    See ``CertifiedAssertion``.
    """
    return CertifiedAssertion()
