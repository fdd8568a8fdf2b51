"""The eigenvalue bound holds on known spectra, also where Lanczos alone has not seen the top eigenvalue."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attnrobust.errors import InputError
from attnrobust.numerics.lanczos import Matvec, largest_eigenvalue_upper


def _diagonal(values: torch.Tensor) -> Matvec:
    return lambda v: values * v


SPECTRA = {
    "uniform": torch.linspace(-1, 1, 300, dtype=torch.float64),
    "outlier": torch.cat([torch.linspace(-1, 1, 299, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)]),
    "negative": -torch.linspace(1, 2, 300, dtype=torch.float64),
    "clustered top": torch.cat(
        [torch.rand(200, dtype=torch.float64), 1.0 + 1e-6 * torch.rand(100, dtype=torch.float64)]
    ),
    "equal": torch.full((300,), 3.0, dtype=torch.float64),
    "rank one": torch.nn.functional.one_hot(torch.tensor(7), 300).double(),
    "huge": 1e9 * torch.linspace(-3, 1, 300, dtype=torch.float64) ** 3,
    "tiny": 1e-12 * torch.linspace(0, 1, 300, dtype=torch.float64),
    "zero": torch.zeros(300, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("seed", range(2))
def test_both_sides_on_known_spectra(name: str, seed: int) -> None:
    values = SPECTRA[name]
    truth, norm = float(values.max()), float(values.abs().max())
    bounds = largest_eigenvalue_upper(_diagonal(values), 300, seed=seed, tol=1e-3)
    assert bounds.lower.value <= truth <= bounds.upper.value
    assert bounds.upper.value - bounds.lower.value <= 1.01e-3 * norm
    assert bounds.upper.failure_probability == 1e-9
    assert float(torch.linalg.vector_norm(bounds.vector)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5, 8, 20])
def test_every_step_gives_a_valid_bound(max_steps: int) -> None:
    """Far from convergence the Ritz value is well below the truth and the bound must still hold."""
    values = SPECTRA["outlier"]
    lowest = math.inf
    for seed in range(15):
        bounds = largest_eigenvalue_upper(_diagonal(values), 300, seed=seed, max_steps=max_steps, tol=1e-12)
        assert bounds.steps == max_steps
        assert bounds.upper.value >= 5.0
        lowest = min(lowest, bounds.lower.value)
    assert max_steps > 2 or lowest < 4.9, "the test needs an unfinished iteration"


@pytest.mark.parametrize("runs", [100, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_failure_probability_is_met_and_not_vacuous(steps: int, runs: int) -> None:
    """At delta = 0.2 the share of failures is below 0.2; starts almost orthogonal to the top vector do fail."""
    values = SPECTRA["outlier"]
    delta = 0.2
    failures = sum(
        largest_eigenvalue_upper(
            _diagonal(values), 300, seed=seed, max_steps=steps, tol=1e-12, failure_probability=delta
        ).upper.value
        < 5.0
        for seed in range(runs)
    )
    assert failures <= runs * delta + 4 * math.sqrt(runs * delta)
    if steps == 8:  # close to convergence the only slack is ||v_{k+1}|| = 1, so about delta of the runs must fail
        assert failures > 0.5 * runs * delta


@pytest.mark.parametrize("size", [2, 3, 4, 10, 100, 10_000])
def test_start_component_bound(size: int) -> None:
    """P(|<v, x>| <= t) <= t sqrt(2N/pi) for uniform v on the sphere, against the exact beta law of the component."""
    t = np.geomspace(1e-9, 1.0, 200)
    exact = stats.beta(0.5, (size - 1) / 2).cdf(t**2)
    bound = t * math.sqrt(2 * size / math.pi)
    assert np.all(exact <= bound * (1 + 1e-9))
    if size >= 100:
        assert exact[0] == pytest.approx(bound[0], rel=2 / size)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_small_operators_are_decomposed(size: int) -> None:
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix + matrix.T
    truth = float(torch.linalg.eigvalsh(matrix)[-1])
    dense = largest_eigenvalue_upper(lambda v: matrix @ v, size)
    assert dense.upper.failure_probability == 0.0
    assert dense.lower.value <= truth <= dense.upper.value <= truth + 1e-8
    iterated = largest_eigenvalue_upper(lambda v: matrix @ v, size, dense_limit=0, tol=1e-6)
    assert iterated.lower.value <= truth + 1e-9
    assert truth <= iterated.upper.value


def test_step_errors_are_inside_the_bound() -> None:
    """Products with an error of 4e-15 of the norm still give a bound of the exact operator."""
    values = SPECTRA["uniform"]
    noise = torch.Generator().manual_seed(1)

    def noisy(v: torch.Tensor) -> torch.Tensor:
        error = torch.randn(300, generator=noise, dtype=torch.float64)
        return values * v + 4e-15 * error / torch.linalg.vector_norm(error)

    for seed in range(8):
        assert largest_eigenvalue_upper(noisy, 300, seed=seed, tol=1e-6).upper.value >= 1.0


def test_bad_arguments_and_products_are_refused() -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        largest_eigenvalue_upper(lambda v: v * math.nan, 100)
    with pytest.raises(InputError, match="NaN or infinite"):
        largest_eigenvalue_upper(lambda v: v * math.inf, 3)
    for options in ({"failure_probability": 0.0}, {"max_steps": 0}, {"tol": 0.0}):
        with pytest.raises(InputError, match="need size"):
            largest_eigenvalue_upper(lambda v: v, 100, **options)


def test_impossible_failure_probability_says_nothing() -> None:
    """Below the rounding of the start vector nothing can be claimed."""
    values = SPECTRA["outlier"]
    assert largest_eigenvalue_upper(_diagonal(values), 300, failure_probability=1e-16).upper.value == math.inf
