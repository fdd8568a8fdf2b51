"""Named arrays on disk: ``.npz`` and ``.safetensors``, never pickle."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnrobust.errors import InputError, first_line

SUFFIXES = (".npz", ".safetensors")


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """Read every array of a ``.npz`` or ``.safetensors`` file, in its own dtype.

    Raises:
        InputError: No such file, another suffix, a damaged file, or Python objects inside.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        # np.load leaves a file that it opened itself open when the archive is damaged.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"cannot read {path}: it is one array without a name (.npy); write it by numpy.savez")
            return {key: _numeric(path, archive, key) for key in archive.files}
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds
        raise InputError(f"cannot read {path}: {_broken(path, 'numpy.savez')} ({first_line(error)})") from error


def _numeric(path: Path, archive: Any, key: str) -> Tensor:
    try:
        array = archive[key]
    except ValueError as error:  # allow_pickle=False
        raise InputError(f"cannot read {path}: array {key!r} holds Python objects; save numbers only") from error
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise InputError(f"cannot read {path}: array {key!r} has dtype {array.dtype}; save numbers only") from error


def _broken(path: Path, writer: str) -> str:
    """Why a file is none of its suffix."""
    with path.open("rb") as stream:
        start = stream.read(40)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run git lfs pull"
    if start[:1] == b"\x80" or (path.suffix != ".npz" and start[:2] == b"PK"):
        return f"it is a pickle or torch.save file, which is never read; write it by {writer}"
    return f"it is no {path.suffix} file or is cut short; write it again by {writer}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot read {path}: {_broken(path, 'safetensors.torch.save_file')} ({first_line(error)})"
        ) from error
