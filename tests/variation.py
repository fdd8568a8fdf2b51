"""The tests on other numbers: inputs a few units in the last place away, other thread counts, other BLAS paths.

``ATTNROBUST_ULP=SEED`` moves every weight, token and mass of a test by up to three units in the last place, each by its
own amount (the same tensor always by the same), and lets torch use ``OMP_NUM_THREADS`` threads instead of one.
What a test expects must hold all the same: another CPU adds its sums in another order and differs by as much.
``make test-variation`` runs the fast tests of attacks and certificates so.
"""

import hashlib
import os
import sys

import numpy as np
import torch
from torch import Tensor

VARIABLE = "ATTNROBUST_ULP"
LARGEST_STEP = 3


def seed() -> str | None:
    """The seed of the variation, or None where the tests run on the numbers as they are written."""
    return os.environ.get(VARIABLE) or None


def threads() -> int:
    """One thread, so that results do not depend on the machine's cores; a variation takes what it is told."""
    return 1 if seed() is None else int(os.environ.get("OMP_NUM_THREADS", "1"))


def nudged(value: Tensor, key: str) -> Tensor:
    """Every entry moved by up to three units in the last place; zeros stay, and so does the order of equal tensors."""
    array = value.detach().cpu().numpy()
    sha = hashlib.sha256(key.encode() + array.tobytes()).digest()
    steps = np.random.default_rng(int.from_bytes(sha[:8], "little")).integers(
        -LARGEST_STEP, LARGEST_STEP + 1, array.shape
    )
    # Equal numbers stay equal: repeated tokens, symmetric matrices and zero sums of a test are part of its question.
    _, first, inverse = np.unique(np.abs(array), return_index=True, return_inverse=True)
    steps = steps.reshape(-1)[first][inverse].reshape(array.shape)
    return torch.from_numpy(array + steps * np.spacing(np.abs(array)) * np.sign(array)).to(value)


def install() -> None:
    """Wrap the package's border, where every tensor of a user is copied; does nothing without the variable."""
    key = seed()
    if key is None:
        return
    import attnrobust  # noqa: F401 - every module that takes the function by name must be loaded
    from attnrobust import tokens

    original = tokens.require_finite

    def varied(name: str, value: Tensor) -> Tensor:
        return nudged(original(name, value), key)

    for module in [module for name, module in sys.modules.items() if name.startswith("attnrobust")]:
        if getattr(module, "require_finite", None) is original:
            module.require_finite = varied  # type: ignore[attr-defined]
