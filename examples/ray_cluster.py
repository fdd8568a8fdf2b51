"""The same rows on a Ray cluster: two actors, each with its own model. Needs ``pip install 'attnrobust[ray]'``.

Set RAY_ADDRESS to join a cluster; without it Ray starts one on this machine.
"""

import tempfile
from pathlib import Path

import numpy as np

from attnrobust.runs.config import make_config
from attnrobust.runs.run import run


def main() -> None:
    place = Path(tempfile.mkdtemp())
    random = np.random.default_rng(0)
    w_q, w_k, w_v = random.normal(size=(3, 2, 8, 4))
    np.savez(place / "layer.npz", w_q=w_q, w_k=w_k, w_v=w_v)
    first, second, third = (random.normal(size=(n, 8)) for n in (3, 5, 7))
    np.savez(place / "inputs.npz", first=first, second=second, third=third)
    config = make_config(
        {
            "model": str(place / "layer.npz"),
            "tokens": str(place / "inputs.npz"),
            "certificates": ["castin2024-derived"],
            "output": str(place / "results"),
            "execution": {"engine": "ray", "workers": 2},
        }
    )
    for row in run(config).store.rows():
        print(f"{row.input_id}: certified {row.certified_radius:.4g}, attack {row.attack_radius:.4g}")


if __name__ == "__main__":
    main()
