"""Bare attention weights in a ``.safetensors`` or ``.npz`` file."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError, first_line
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import RULES, HeadBias
from attnrobust.layers.rotary import Layout, Rotary
from attnrobust.models.arrays import SUFFIXES, read_arrays

REQUIRED = ("w_q", "w_k", "w_v")
OPTIONAL = ("b_q", "b_k", "b_v", "w_o", "b_o", "mask")
SCALARS = ("scale", "causal", "window_left", "window_right", "kv_heads")
ROTARY = {"rotary_frequencies": "frequencies", "rotary_angles": "angles"}
BIASES = {f"bias_{rule}": rule for rule in RULES}
FLAGS = ("rotary_interleaved", "rotary_offset", "bias_symmetric")
KNOWN = (*REQUIRED, *OPTIONAL, *SCALARS, *ROTARY, *BIASES, *FLAGS)
"""Names of all arrays of a weights file."""


def from_file(path: str | Path) -> Attention:
    """Read one attention layer from a file of named arrays.

    Required: ``w_q``, ``w_k`` (h, d, k), ``w_v`` (h, d, v). Optional: ``b_q``, ``b_k`` (h, k), ``b_v`` (h, v), ``w_o``
    (h, v, e), ``b_o`` (e,), ``mask`` (n, n) added to the scores, and as one number each ``scale`` (default 1/sqrt k),
    ``causal`` (0 or 1, any n), ``window_left``, ``window_right`` and ``kv_heads``. Rotary positions, optional too:
    ``rotary_frequencies`` (m,) or ``rotary_angles`` (n, m), ``rotary_interleaved`` (0 or 1), ``rotary_offset``.
    Position biases: ``bias_slopes`` (h,), ``bias_table`` (h, 2 L + 1) or ``bias_explicit`` (h, n, n) and
    ``bias_symmetric`` (0 or 1). Without ``w_o`` the heads are concatenated.

    Args:
        path: ``.npz`` or ``.safetensors``.

    Returns:
        The layer in float64.

    Raises:
        InputError: A missing or damaged file, a missing array, shapes that do not fit, NaN or infinite weights.
        UnknownNameError: An array that has no meaning here (nothing is ignored).
    """
    arrays = read_arrays(path)
    _refuse_state_dictionary(path, arrays)
    for name in arrays:
        if name not in KNOWN:
            raise UnknownNameError(f"array of the weights file {path}", name, KNOWN)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; a weights file needs {', '.join(REQUIRED)}")
    numbers = {name: _number(path, name, arrays.get(name)) for name in (*SCALARS, *FLAGS)}
    try:
        return _attention(arrays, _checked(numbers))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _checked(numbers: dict[str, float | None]) -> dict[str, float | None]:
    """Numbers that are flags or counts as such."""
    for name in ("causal", "rotary_interleaved", "bias_symmetric"):
        if numbers[name] not in (None, 0.0, 1.0):
            raise InputError(f"{name} is {numbers[name]}; give 0 or 1")
    for name in ("window_left", "window_right", "kv_heads", "rotary_offset"):
        value = numbers[name]
        if value is not None and value != int(value):
            raise InputError(f"{name} is {value}; give a whole number")
    return numbers


def _attention(arrays: dict[str, Tensor], numbers: dict[str, float | None]) -> Attention:
    given: dict[str, Any] = {name: arrays[name] for name in (*REQUIRED, *OPTIONAL) if name in arrays}
    counts = {name: numbers[name] for name in ("window_left", "window_right", "kv_heads") if numbers[name] is not None}
    given |= {name: int(value or 0) for name, value in counts.items()}
    turns: dict[str, Any] = {field: arrays[name] for name, field in ROTARY.items() if name in arrays}
    biases: dict[str, Any] = {field: arrays[name] for name, field in BIASES.items() if name in arrays}
    if turns or numbers["rotary_interleaved"] is not None or numbers["rotary_offset"] is not None:
        layout: Layout = "interleaved" if numbers["rotary_interleaved"] else "half"
        given["rotary"] = Rotary(**turns, layout=layout, offset=int(numbers["rotary_offset"] or 0))
    if biases or numbers["bias_symmetric"] is not None:
        given["head_bias"] = HeadBias(**biases, symmetric=bool(numbers["bias_symmetric"]))
    return Attention(**given, scale=numbers["scale"], causal=bool(numbers["causal"]))


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
    numbers = {"causal": layer.causal or None, **{name: getattr(layer, name) for name in SCALARS[2:]}}
    if layer.rotary is not None:
        numbers |= {
            "rotary_interleaved": layer.rotary.layout == "interleaved" or None,
            "rotary_offset": layer.rotary.offset or None,
        }
    if layer.head_bias is not None:
        numbers["bias_symmetric"] = layer.head_bias.symmetric or None
    for owner, names in ((layer.rotary, ROTARY), (layer.head_bias, BIASES)):
        found = {name: getattr(owner, field, None) for name, field in names.items()}
        arrays |= {name: value.cpu().contiguous() for name, value in found.items() if value is not None}
    arrays |= {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items() if value is not None}
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


_TORCH_KEY = re.compile(r"(^|\.)(in_proj_weight|[qkv]_proj_weight)$")
_MODEL_KEY = re.compile(
    r"(^|\.)(query|key|value|[qkv]_proj|[qkv]_lin|to_[qkv]|w[qkv]|c_attn|c_proj|qkv|qkv_proj|query_key_value|in_proj"
    r"|out_proj|o_proj|out_lin)\.(weight|bias)$"
)


def _refuse_state_dictionary(path: str | Path, names: Iterable[str]) -> None:
    """Say what to do with the weights of a torch or Hugging Face module, whose number of heads no array tells."""
    names = sorted(names)
    torch_keys, model_keys = ([n for n in names if pattern.search(n)] for pattern in (_TORCH_KEY, _MODEL_KEY))
    if torch_keys:
        raise InputError(
            f"{path} is a state dictionary of torch.nn.MultiheadAttention ({torch_keys[0]}), which lacks the number of "
            "heads; load it into the module by load_state_dict and write to_file(from_torch(module.eval()), path)"
        )
    if model_keys:
        raise InputError(
            f"{path} is a state dictionary of a model ({model_keys[0]}), not bare attention weights; give "
            "the directory with its config.json, or load it into the model and read that "
            f"(a weights file has {', '.join(REQUIRED)})"
        )


def _number(path: str | Path, name: str, value: Tensor | None) -> float | None:
    if value is None:
        return None
    if value.numel() != 1:
        raise InputError(f"{path}: {name} must be one number; got shape {tuple(value.shape)}")
    if value.is_complex():
        raise InputError(f"{path}: {name} has dtype {value.dtype}; it must be one real number")
    return float(value)
