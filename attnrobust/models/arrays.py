"""Named arrays on disk: ``.npz`` and ``.safetensors``, never pickle."""

import zipfile
from pathlib import Path

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
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path} as numeric arrays: {first_line(error)}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
