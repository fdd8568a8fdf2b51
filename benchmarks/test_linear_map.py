"""Speed and memory of one product and one singular value of a pretrained layer's derivative at 512 tokens."""

import resource

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.numerics.linear_map import largest_singular_value_lower, largest_singular_value_upper
from tests.pretrained import minilm_layer


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


@pytest.fixture(params=[0, 3, 5], ids=lambda index: f"minilm-{index}")
def jacobian(request: pytest.FixtureRequest) -> AttentionJacobian:
    layer, points = minilm_layer(request.param, 512)
    return AttentionJacobian(layer, points)


def test_product(benchmark: BenchmarkFixture, jacobian: AttentionJacobian) -> None:
    v = torch.randn(512, 384, dtype=torch.float64)
    before = _peak_megabytes()
    benchmark(lambda: jacobian.rmatvec(jacobian.matvec(v)))
    benchmark.extra_info["peak_megabytes_added"] = _peak_megabytes() - before


def test_singular_value_from_above(benchmark: BenchmarkFixture, jacobian: AttentionJacobian) -> None:
    before = _peak_megabytes()
    upper = benchmark.pedantic(largest_singular_value_upper, args=(jacobian.linear_map(),), rounds=1)  # type: ignore[no-untyped-call]
    lower, _ = largest_singular_value_lower(jacobian.linear_map())
    benchmark.extra_info.update(
        peak_megabytes_added=_peak_megabytes() - before, upper=upper.value, upper_over_lower=upper.value / lower.value
    )
    assert lower.value <= upper.value


def test_singular_value_from_below(benchmark: BenchmarkFixture, jacobian: AttentionJacobian) -> None:
    benchmark.pedantic(largest_singular_value_lower, args=(jacobian.linear_map(),), rounds=1)  # type: ignore[no-untyped-call]
