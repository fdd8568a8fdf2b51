"""Attacks bounds of random layers with rotary positions, biases, windows and grouped keys: counts and largest ratio.

PYTHONPATH=. python benchmarks/modern_soundness.py FIRST COUNT; ends with an error at the first bound that an attack
passes.
"""

import sys

import torch

from tests.soundness.test_modern_stress import attack_displacement, attack_margin
from tests.stress import Tally


def main(first: int, count: int) -> None:
    """Attack ``count`` margin and ``count`` displacement problems."""
    torch.set_num_threads(1)
    tally = Tally()
    for seed in range(first, first + count):
        attack_margin(seed, tally, steps=30)
        attack_displacement(seed, tally, steps=40)
        if (seed - first) % 25 == 24:
            print(f"seeds {first} to {seed}\n{tally}", flush=True)
    print(f"seeds {first} to {first + count - 1}\n{tally}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
