"""Inputs of a run: every kind has a name and a digest of its content alone."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from attnrobust.errors import InputError
from attnrobust.models.capture import CapturedInput, text_line
from attnrobust.models.pictures import ImageEncoder
from attnrobust.runs.config import make_config
from attnrobust.runs.sources import (
    Image,
    given,
    inputs_digest,
    is_pictures,
    read_images,
    read_pictures,
    source_digest,
)
from attnrobust.runs.work import Workbench
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


class Halving:
    """Plays a model's image processor."""

    def __call__(self, *, images: PIL.Image.Image, return_tensors: str) -> dict[str, np.ndarray[Any, Any]]:
        assert return_tensors == "np"
        small = images.resize((images.width // 2, images.height // 2), PIL.Image.Resampling.NEAREST)
        return {"pixel_values": np.asarray(small, np.float32).transpose(2, 0, 1)[None] / 255.0}


def test_pictures_go_through_the_processor(tmp_path: Path) -> None:
    for name, grey in (("p10.png", 51), ("p2.PNG", 255)):
        PIL.Image.new("L", (8, 4), grey).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    encoder = ImageEncoder(Halving(), "model")
    assert is_pictures(tmp_path)
    assert not is_pictures(tmp_path / "x.npz")
    found = read_pictures(tmp_path, encoder)
    assert [(image.id, tuple(image.pixels.shape)) for image in found] == [("p2.PNG", (3, 2, 4)), ("p10.png", (3, 2, 4))]
    assert float(found[1].pixels[0, 0, 0]) == pytest.approx(0.2)
    assert read_pictures(tmp_path / "p10.png", encoder)[0].pixels.equal(found[1].pixels)


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    encoder = ImageEncoder(Halving(), "model")
    with pytest.raises(InputError, match="holds no pictures"):
        read_pictures(tmp_path, encoder)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot read the picture"):
        read_pictures(tmp_path, encoder)


def test_a_vision_model_prepares_pictures_itself(tmp_path: Path) -> None:
    """The processor that is saved beside the model resizes to its side and normalises."""
    chosen: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    chosen.ViTModel(chosen.ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path / "vit")
    processor = chosen.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(tmp_path / "vit")
    PIL.Image.new("RGB", (20, 12), (255, 255, 255)).save(tmp_path / "white.png")
    config = make_config({"model": str(tmp_path / "vit"), "images": tmp_path / "white.png"})
    (image,) = Workbench(config).sources
    assert isinstance(image, Image)
    assert image.pixels.shape == (3, 8, 8)
    assert torch.allclose(image.pixels, torch.full((3, 8, 8), 2.0, dtype=torch.float64))
    assert Workbench(config).task(Workbench(config).items()[0]).clean.n == 5
