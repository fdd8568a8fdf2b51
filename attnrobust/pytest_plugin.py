"""A pytest fixture for the tests of users: assert that a layer, or the whole model, is certified at an input.

Put ``pytest_plugins = ["attnrobust.pytest_plugin"]`` into ``conftest.py``. It is not registered by the installation,
because pytest would then import torch in every project of the environment.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from attnrobust.goals import Goal
    from attnrobust.models.networks.reading import ReadNetwork
    from attnrobust.problem import Problem, TokenMap
    from attnrobust.results import Certificate, CertificationReport
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
        readout: "str | Path | None" = None,
        pool: str | None = None,
        label: int | None = None,
        threat: str = "frobenius",
        methods: tuple[str, ...] | str | None = None,
        kinds: tuple[str, ...] | str | None = None,
        attack: str | None = None,
        max_gap: float | None = None,
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
            readout: File of a linear readout of a layer's output (``weight``, ``bias``), whose label must stay;
                excludes ``goal`` and ``tolerance``.
            pool: Of ``readout``: "mean" (default) or "row:I".
            label: Of ``readout``: the label; default the clean prediction.
            threat: Key of the threat, as on the command line.
            methods: Certificates by name, or one name; None means all that apply.
            kinds: Kinds of certificates that count ("float64", "rigorous", "probabilistic"), or one; None means all.
            attack: Name of an attack that is run, too ("default": the threat's own); its radius is in the message.
            max_gap: Largest attack radius / certified radius; runs the threat's own attack where none is named.
            seed: Seed of probabilistic certificates and of the attack.

        Returns:
            The best certificate.

        Raises:
            pytest.fail.Exception: The best certified radius is below ``radius``, or the gap is above ``max_gap`` or
                unknown.
            SoundnessError: The attack broke the goal within the certified radius.
            InputError: A layer, input or option that cannot be used.
        """
        __tracebackhide__ = True
        from attnrobust.certify import certify

        asked = _readout(readout, pool, label, goal, tolerance) or _goal(tolerance, goal)
        problem = _problem(layer, x, threat, asked)
        report = certify(problem, methods=methods, seed=seed)
        best = _best(report, kinds)
        name = attack or (None if max_gap is None else "default")
        broken = None if name is None else _attacked(problem, report, name, seed)
        told = f"{'decision' if goal == 'decision' else problem.goal.key}, {threat}, n = {problem.clean.n}"
        if best is None or best.radius < radius:
            found = "nothing" if best is None else f"{best.radius:.6g} ({best.method})"
            of_kind = "" if kinds is None else f" of kind {kinds if isinstance(kinds, str) else ' or '.join(kinds)}"
            others = ", ".join(f"{c.method} {c.radius:.4g}" for c in report.certificates)
            pytest.fail(
                f"certified radius{of_kind} {found} is below {radius:g} for {told}"
                + (f"; all: {others}" if others else f"; {report.why_none}")
                + ("" if broken is None else f"; the attack breaks it at {broken:.6g}"),
                pytrace=False,
            )
        if max_gap is not None and (broken is None or broken > max_gap * best.radius):
            gap = "unknown, no violation was found" if broken is None else f"{broken / best.radius:.4g}"
            pytest.fail(f"the gap is {gap}, not at most {max_gap:g}, for {told}", pytrace=False)
        return best


def _readout(
    path: "str | Path | None", pool: str | None, label: int | None, goal: object, tolerance: object
) -> "Goal | None":
    """The goal of a readout file; None without one."""
    from pathlib import Path

    from attnrobust.errors import InputError
    from attnrobust.runs.inputs import read_readout
    from attnrobust.runs.reading import parse_pool

    if path is None:
        if pool is not None or label is not None:
            raise InputError("pool= and label= belong to a readout; give readout=, or leave them out")
        return None
    if goal is not None or tolerance is not None:
        raise InputError("a readout excludes a goal and a tolerance; give one of readout=, goal= and tolerance=")
    return read_readout(Path(path), pool=parse_pool(pool or "mean"), label=label)


def _best(report: "CertificationReport", kinds: tuple[str, ...] | str | None) -> "Certificate | None":
    """The largest radius of the kinds that count."""
    from attnrobust.errors import UnknownNameError
    from attnrobust.status import Kind

    asked = tuple(map(str, Kind)) if kinds is None else (kinds,) if isinstance(kinds, str) else kinds
    for kind in asked:
        if kind not in list(Kind):
            raise UnknownNameError("kind of certificate", kind, Kind)
    return max((c for c in report.certificates if c.kind in asked), key=lambda c: c.radius, default=None)


def _attacked(problem: "Problem", report: "CertificationReport", name: str, seed: int) -> float | None:
    """The radius of a verified violation, or None; one within a certified radius is an error of this package."""
    from attnrobust.attacks import attack
    from attnrobust.comparison import join
    from attnrobust.status import Status

    result = attack(problem, method=name, seed=seed)
    join(problem, result, report)
    return result.radius if result.status is Status.FOUND else None


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
