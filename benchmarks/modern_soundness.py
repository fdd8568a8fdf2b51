"""Attacks bounds of random layers with rotary positions, biases, windows and grouped keys: counts and largest ratio.

PYTHONPATH=. python benchmarks/modern_soundness.py FIRST COUNT [KINDS]; KINDS are letters of m (margin, all tokens), t
(margin, one token), d (displacement). Ends with an error at the first bound that an attack passes.
"""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from attnrobust.errors import InputError
from tests.soundness.test_modern_stress import attack_displacement, attack_margin, attack_token_margin
from tests.stress import Tally

REPORTED = 20
ATTACKS: dict[str, Callable[[int, Tally], None]] = {
    "m": partial(attack_margin, steps=12),
    "t": partial(attack_token_margin, monkeypatch=pytest.MonkeyPatch(), steps=10),
    "d": partial(attack_displacement, steps=20),
}


def main(first: int, count: int, kinds: str) -> None:
    """Attack ``count`` problems of every kind."""
    torch.set_num_threads(1)
    tally, refused = Tally(), 0
    for seed in range(first, first + count):
        for kind in kinds:
            try:
                ATTACKS[kind](seed, tally)
            except InputError:  # a budget below the rounding of the output is no question
                refused += 1
        if (seed - first) % REPORTED == REPORTED - 1:
            print(f"seeds {first} to {seed}: {tally.attacks.total()}, {max(tally.largest.values()):.9f}", flush=True)
    print(f"seeds {first} to {first + count - 1}, {refused} refused\n{tally}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "mtd")
