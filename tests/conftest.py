"""Settings of every test: shapes checked at run time, one thread, no network, fixed seeds."""

import os
import sys
from collections.abc import Iterator

# Before torch and transformers are imported: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Before the first import of the package: only modules imported from here on are checked.
install_import_hook("attnrobust", "tests.shape_checks.counted")

import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import shape_checks, variation

variation.install()  # before the first case is built

from tests.cases import Case, cases, telling_cases
from tests.stress import Tally

torch.set_num_threads(variation.threads())
settings.register_profile(
    "attnrobust", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("attnrobust")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Seed every global generator and refuse tests that leave torch in another state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - foolbox and third parties draw from the legacy generator
    torch.manual_seed(0)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    assert after == before, f"the test left torch's (dtype, grad, threads) at {after}, was {before}"


@pytest.fixture(params=telling_cases(), ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """One layer and input for each thing that sets a claim apart: for identities and for what attacks return."""
    chosen = request.param
    assert isinstance(chosen, Case)
    return chosen


@pytest.fixture(params=cases(), ids=lambda case: case.name)
def every_case(request: pytest.FixtureRequest) -> Case:
    """Every layer and input of the table, one test each: for what tries to break a bound."""
    chosen = request.param
    assert isinstance(chosen, Case)
    return chosen


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """What attacks reached of the bounds of one module's tests, printed after them (``pytest -s`` shows it)."""
    tally = Tally()
    yield tally
    print(f"\n{tally}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "chromium": None if any(map(shutil.which, CHROMIUM)) else "no Chromium",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    """Every test has its own number of checked calls."""
    shape_checks.restart()


def pytest_configure() -> None:
    """The hook above came too late for anything imported before it."""
    loaders = {name: type(module.__loader__) for name, module in sys.modules.items() if name.startswith("attnrobust")}
    late = {name for name, loader in loaders.items() if not loader.__module__.startswith("jaxtyping")}
    assert not late, f"imported before the shape checks were installed: {late}"
