"""Pictures as a model takes them, by its own image processor; the only file that imports Pillow."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError, first_line

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""How files that hold a picture end, in any case."""


class ImageEncoder:
    """A model's own image processor (resizing, cropping, scaling, normalisation).

    Args:
        processor: The processor of transformers, with Pillow as its backend.
        name: The model's name, for messages.
    """

    def __init__(self, processor: Any, name: str) -> None:
        self._processor, self._name = processor, name

    def encode(self, path: Path) -> Float[Tensor, "c h w"]:
        """The first frame of a picture as pixel values, float64.

        Raises:
            InputError: No picture, one that the processor refuses, or a processor that cuts a picture into pieces.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as picture:
                pixels = self._processor(images=picture.convert("RGB"), return_tensors="np")["pixel_values"]
        except (OSError, ValueError, KeyError, UnidentifiedImageError) as error:
            raise InputError(f"cannot read the picture {path}: {first_line(error)}") from error
        values = torch.as_tensor(pixels, dtype=torch.float64)
        if values.ndim != 4 or len(values) != 1:
            raise InputError(
                f"the image processor of {self._name} gives pixel_values of shape {tuple(values.shape)}; only one "
                "array (channels, height, width) a picture is taken"
            )
        return values[0]
