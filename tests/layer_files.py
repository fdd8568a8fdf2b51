"""Files of a small layer with two heads and of its inputs, as a user has them."""

from pathlib import Path

import numpy as np


def write_layer(place: Path, random: np.random.Generator, *, scale: float = 1.0, **tokens: int | str) -> None:
    """Write ``layer.npz`` and ``x.npz``.

    Args:
        place: Directory.
        random: Where the numbers come from, in the order of the arrays.
        scale: Factor of the weights.
        **tokens: Number of tokens of each input by its name, or the name of an input that it equals.
    """
    w_q, w_k, w_v = scale * random.normal(size=(3, 2, 4, 3))
    np.savez(place / "layer.npz", w_q=w_q, w_k=w_k, w_v=w_v)
    inputs: dict[str, np.ndarray] = {}
    for name, chosen in tokens.items():
        inputs[name] = inputs[chosen] if isinstance(chosen, str) else random.normal(size=(chosen, 4))
    np.savez(place / "x.npz", **inputs)  # type: ignore[arg-type]
