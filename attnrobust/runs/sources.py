"""The inputs of a run: lines of text, images, or tokens of a layer, with names and digests of their content."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.models.arrays import read_arrays
from attnrobust.models.capture import CapturedInput, TextLine
from attnrobust.models.pictures import PICTURES, ImageEncoder
from attnrobust.text import natural_order
from attnrobust.tokens import tensor_digest


@dataclass(frozen=True, eq=False)
class Image:
    """One image as the model takes it.

    Args:
        id: Its key in the file.
        pixels: What the model's processor would give, in float64.
    """

    id: str
    pixels: Float[Tensor, "c h w"]

    @property
    def text(self) -> None:
        """It has none."""
        return


Source = TextLine | CapturedInput | Image


def read_images(path: Path) -> tuple[Image, ...]:
    """Read a ``.npz`` or ``.safetensors`` file whose every array (c, h, w) is one image, in the order of its keys.

    Raises:
        InputError: No such file, no arrays, another shape.
    """
    arrays = read_arrays(path)
    if not arrays:
        raise InputError(f"{path} holds no arrays; every array (channels, height, width) is one image")
    for key, value in arrays.items():
        if value.ndim != 3:
            raise InputError(
                f"{path}: image {key!r} has shape {tuple(value.shape)}; give (channels, height, width), as the model's "
                "processor gives pixel_values"
            )
    return tuple(Image(key, arrays[key].double()) for key in sorted(arrays, key=natural_order))


def is_pictures(path: Path) -> bool:
    """Whether a path is a folder, or one picture, rather than a file of arrays."""
    return path.is_dir() or path.suffix.lower() in PICTURES


def read_pictures(path: Path, encoder: ImageEncoder) -> tuple[Image, ...]:
    """Read a picture, or those of a folder (not of folders below), as the model's own processor prepares them.

    Raises:
        InputError: No pictures, or one that cannot be read.
    """
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
    if not files:
        raise InputError(f"{path} holds no pictures ({', '.join(PICTURES)}); give a folder with some, or one file")
    return tuple(Image(file.name, encoder.encode(file)) for file in sorted(files, key=lambda f: natural_order(f.name)))


def given(source: Source) -> TextLine | Mapping[str, Tensor]:
    """What a model reads a network at."""
    if isinstance(source, CapturedInput):
        raise InputError(f"input {source.id} holds tokens of a layer; give texts or images")
    return {"pixel_values": source.pixels[None]} if isinstance(source, Image) else source


def source_digest(source: Source) -> str:
    """SHA-256 of an input's content (text, pixels, or tokens and masses)."""
    if isinstance(source, CapturedInput):
        return source.measure.digest()
    if isinstance(source, Image):
        return tensor_digest(source.pixels, extra="image")
    return hashlib.sha256(f"text;{source.text}".encode()).hexdigest()


def inputs_digest(sources: Sequence[Source]) -> str:
    """SHA-256 of all inputs with their names, in order."""
    joined = ";".join(f"{source.id}={source_digest(source)}" for source in sources)
    return hashlib.sha256(joined.encode()).hexdigest()
