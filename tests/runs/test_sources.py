"""Inputs of a run: every kind has a name and a digest of its content alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attnrobust.errors import InputError
from attnrobust.models.capture import CapturedInput, text_line
from attnrobust.runs.sources import Image, given, inputs_digest, read_images, source_digest
from attnrobust.tokens import TokenMeasure


def test_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x10=np.ones((3, 2, 4), np.float32), x2=np.zeros((1, 8, 8)))
    images = read_images(tmp_path / "x.npz")
    assert [(image.id, tuple(image.pixels.shape), image.text) for image in images] == [
        ("x2", (1, 8, 8), None),
        ("x10", (3, 2, 4), None),
    ]
    assert images[1].pixels.dtype == torch.float64
    found = given(images[0])
    assert isinstance(found, dict)
    assert tuple(found["pixel_values"].shape) == (1, 1, 8, 8)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", a=np.ones((8, 8)))
    np.savez(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"image 'a' has shape \(8, 8\); give \(channels, height, width\)"):
        read_images(tmp_path / "flat.npz")
    with pytest.raises(InputError, match="holds no arrays"):
        read_images(tmp_path / "none.npz")
    with pytest.raises(InputError, match="holds tokens of a layer"):
        given(CapturedInput("x", None, (), TokenMeasure(torch.ones(2, 3))))


def test_digests_are_about_content() -> None:
    one = Image("a", torch.ones(1, 2, 2, dtype=torch.float64))
    renamed = Image("b", one.pixels.clone())
    other = Image("a", 2.0 * one.pixels)
    assert source_digest(one) == source_digest(renamed) != source_digest(other)
    assert inputs_digest([one]) != inputs_digest([renamed])  # names of inputs are in the rows
    assert source_digest(text_line(1, "x")) == source_digest(text_line(7, "x"))
    tokens = CapturedInput("a", None, (), TokenMeasure(torch.ones(4, 1)))
    assert len({source_digest(one), source_digest(text_line(1, "x")), source_digest(tokens)}) == 3
