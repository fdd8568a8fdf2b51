"""A pytest fixture for the tests of users: assert that a layer is certified at an input.

Put ``pytest_plugins = ["attnrobust.pytest_plugin"]`` into ``conftest.py``. It is not registered by the installation,
because pytest would then import torch in every project of the environment.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnrobust.problem import TokenMap
    from attnrobust.results import Certificate
    from attnrobust.tokens import TokenMeasure


class CertifiedAssertion:
    """Callable that fails the test where the certified radius is too small; see ``__call__``."""

    def __call__(
        self,
        layer: "TokenMap | nn.Module",
        x: "TokenMeasure | Tensor",
        *,
        radius: float,
        tolerance: str | float = "10%",
        threat: str = "frobenius",
        methods: tuple[str, ...] | str | None = None,
        seed: int = 0,
    ) -> "Certificate":
        """Assert that no move of the tokens within ``radius`` changes the layer's output by more than ``tolerance``.

        Args:
            layer: A layer specification, or a torch module that has an adapter (in eval mode).
            x: The input's tokens, (n, d).
            radius: The radius to reach, in the distance of the threat.
            tolerance: ``"1%"`` of the output's norm, or an absolute number.
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
        from attnrobust.goals import parse_tolerance
        from attnrobust.problem import Problem
        from attnrobust.threats.parse import parse_threat
        from attnrobust.tokens import TokenMeasure

        clean = x if isinstance(x, TokenMeasure) else TokenMeasure(x)
        problem = Problem(_network(layer), clean, parse_threat(threat), parse_tolerance(str(tolerance)))
        report = certify(problem, methods=methods, seed=seed)
        best = report.best
        if best is None or best.radius < radius:
            found = "nothing" if best is None else f"{best.radius:.6g} ({best.method})"
            others = ", ".join(f"{c.method} {c.radius:.4g}" for c in report.certificates)
            pytest.fail(
                f"certified radius {found} is below {radius:g} for {problem.goal.key}, {threat}, n = {clean.n}"
                + (f"; all: {others}" if others else ""),
                pytrace=False,
            )
        return best


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
    """``assert_certified(layer, x, radius=0.01, tolerance="10%")``: see ``CertifiedAssertion``."""
    return CertifiedAssertion()
