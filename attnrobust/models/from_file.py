"""Bare attention weights in a ``.safetensors`` or ``.npz`` file."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.models.arrays import SUFFIXES, read_arrays

REQUIRED = ("w_q", "w_k", "w_v")
OPTIONAL = ("b_q", "b_k", "b_v", "w_o", "b_o", "mask")
SCALARS = ("scale", "causal")


def from_file(path: str | Path) -> Attention:
    """Read one attention layer from a file of named arrays.

    Required: ``w_q``, ``w_k`` (h, d, k), ``w_v`` (h, d, v). Optional: ``b_q``, ``b_k`` (h, k), ``b_v`` (h, v), ``w_o``
    (h, v, e), ``b_o`` (e,), ``scale`` (one number, default 1/sqrt k), ``mask`` (n, n) added to the scores, ``causal``
    (0 or 1, any n). Without ``w_o`` the heads are concatenated.

    Args:
        path: ``.npz`` or ``.safetensors``.

    Returns:
        The layer in float64.

    Raises:
        InputError: A missing or damaged file, a missing array, shapes that do not fit, NaN or infinite weights.
        UnknownNameError: An array that has no meaning here (nothing is ignored).
    """
    arrays = read_arrays(path)
    known = (*REQUIRED, *OPTIONAL, *SCALARS)
    for name in arrays:
        if name not in known:
            raise UnknownNameError(f"array of the weights file {path}", name, known)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; a weights file needs {', '.join(REQUIRED)}")
    scale = _number(path, "scale", arrays.get("scale"))
    causal = _number(path, "causal", arrays.get("causal"))
    if causal not in (None, 0.0, 1.0):
        raise InputError(f"{path}: causal is {causal}; give 0 or 1")
    tensors = {name: arrays[name] for name in (*REQUIRED, *OPTIONAL) if name in arrays}
    try:
        return Attention(**tensors, scale=scale, causal=bool(causal))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def to_file(layer: Attention, path: str | Path) -> Path:
    """Write a layer so that ``from_file`` reads the same one back, bit for bit.

    Args:
        layer: The layer.
        path: ``.npz`` or ``.safetensors``; an existing file is replaced.

    Returns:
        The path.

    Raises:
        InputError: Another suffix, or a place that cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {' or '.join(SUFFIXES)}")
    values = {name: getattr(layer, name) for name in (*REQUIRED, *OPTIONAL)}
    arrays = {name: value.cpu().contiguous() for name, value in values.items() if value is not None}
    arrays["scale"] = torch.tensor([layer.factor], dtype=torch.float64)
    if layer.causal:
        arrays["causal"] = torch.ones(1, dtype=torch.float64)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        if path.suffix == ".npz":
            np.savez(path, **{name: value.numpy() for name, value in arrays.items()})
        else:
            save_file(arrays, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {first_line(error)}") from error
    return path


def _number(path: str | Path, name: str, value: Tensor | None) -> float | None:
    if value is None:
        return None
    if value.numel() != 1:
        raise InputError(f"{path}: {name} must be one number; got shape {tuple(value.shape)}")
    return float(value)
