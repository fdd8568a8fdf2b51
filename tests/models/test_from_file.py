"""Weights files and token files."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.rotary import Rotary
from attnrobust.models.capture import read_tokens
from attnrobust.models.from_file import from_file, to_file
from tests.assertions import assert_same_bits, refused, shapes_unchecked

H, D, K, V, E, N = 2, 5, 3, 4, 6, 4
SUFFIX = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])


def arrays(**more: Tensor) -> dict[str, Tensor]:
    return {"w_q": torch.randn(H, D, K), "w_k": torch.randn(H, D, K), "w_v": torch.randn(H, D, V)} | more


def savez(path: Path, values: dict[str, Any]) -> None:
    np.savez(path, **values)


def write(path: Path, values: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        savez(path, {k: v.numpy() if isinstance(v, Tensor) else v for k, v in values.items()})
    else:
        save_file(values, path)
    return path


def every_array() -> dict[str, Tensor]:
    mask = torch.zeros(N, N).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf)
    biases = {"b_q": torch.randn(H, K), "b_k": torch.randn(H, K), "b_v": torch.randn(H, V)}
    return arrays(w_o=torch.randn(H, V, E), b_o=torch.randn(E), scale=torch.tensor([0.3]), mask=mask, **biases)


@SUFFIX
def test_bare_weights(tmp_path: Path, suffix: str) -> None:
    values = arrays()
    layer = from_file(write(tmp_path / f"w{suffix}", values))
    x = torch.randn(N, D, dtype=torch.float64)
    assert (layer.out_width, layer.factor, layer.causal) == (H * V, 1 / math.sqrt(K), False)
    expected = Attention(w_q=values["w_q"].double(), w_k=values["w_k"].double(), w_v=values["w_v"].double())
    assert_same_bits(layer(x), expected(x))


@SUFFIX
def test_every_array(tmp_path: Path, suffix: str) -> None:
    values = every_array()
    layer = from_file(write(tmp_path / f"w{suffix}", values))
    for name in set(values) - {"scale"}:
        assert_same_bits(getattr(layer, name), values[name].double(), what=name)
    assert layer.factor == float(values["scale"].double())


@SUFFIX
def test_zero_dimensional_scale_and_causal(tmp_path: Path, suffix: str) -> None:
    layer = from_file(write(tmp_path / f"w{suffix}", arrays(scale=torch.tensor(0.5), causal=torch.tensor(1.0))))
    assert (layer.factor, layer.causal) == (0.5, True)
    assert not from_file(write(tmp_path / f"v{suffix}", arrays(causal=torch.tensor(0)))).causal


@SUFFIX
@pytest.mark.parametrize("causal", [True, False])
def test_round_trip(tmp_path: Path, suffix: str, causal: bool) -> None:
    layer = from_file(write(tmp_path / f"w{suffix}", arrays(causal=torch.tensor(float(causal)))))
    again = from_file(to_file(layer, tmp_path / f"again{suffix}"))
    assert again.digest == layer.digest
    full = from_file(write(tmp_path / f"full{suffix}", every_array()))
    assert from_file(to_file(full, tmp_path / f"full_again{suffix}")).digest == full.digest


def test_refuses_arrays_without_meaning(tmp_path: Path) -> None:
    with refused(UnknownNameError, "w_out", "w_o"):
        from_file(write(tmp_path / "w.npz", arrays(w_out=torch.zeros(H, V, E))))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"w_q": torch.zeros(H, D, K)}, "lacks w_k, w_v"),
    "shape": (arrays(b_q=torch.zeros(H, K + 1)), "b_q must have shape"),
    "nan": (arrays(b_v=torch.full((H, V), torch.nan)), "b_v holds"),
    "integers": (arrays(b_v=torch.zeros(H, V, dtype=torch.int64)), "b_v has dtype"),
    "scale": (arrays(scale=torch.ones(2)), "scale must be one number"),
    "causal": (arrays(causal=torch.tensor(2.0)), "0 or 1"),
    "infinite scale": (arrays(scale=torch.tensor(torch.inf)), "scale is inf"),
    "hidden row": (arrays(mask=torch.full((N, N), -torch.inf)), "mask hides every key"),
    "complex scale": (arrays(scale=torch.tensor([1.0 + 1.0j])), "scale has dtype torch.complex"),
    "torch": ({"in_proj_weight": torch.zeros(9, 3), "out_proj.weight": torch.zeros(3, 3)}, "from_torch"),
    "torch prefixed": ({"layers.0.self_attn.in_proj_weight": torch.zeros(9, 3)}, "number of heads"),
    "bert": ({"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(3, 3)}, "directory with its config.json"),
    "clip": ({"q_proj.weight": torch.zeros(3, 3), "k_proj.weight": torch.zeros(3, 3)}, "directory with its config"),
    "gpt2": ({"h.0.attn.c_attn.weight": torch.zeros(3, 9)}, "directory with its config.json"),
    "boolean mask": (arrays(mask=torch.ones(N, N, dtype=torch.bool)), "mask has dtype"),
}


@SUFFIX
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path: Path, name: str, suffix: str) -> None:
    values, word = REFUSED[name]
    path = write(tmp_path / f"w{suffix}", values)
    with shapes_unchecked(), refused(InputError, word, path.name):
        from_file(path)


@SUFFIX
def test_damaged_and_missing_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with refused(InputError, "there is no file"):
        from_file(path)
    path.write_bytes(b"not an archive")
    with refused(InputError, "cannot read"):
        from_file(path)
    path.write_bytes(b"")
    with refused(InputError, "cannot read"):
        from_file(path)
    whole = write(tmp_path / f"whole{suffix}", arrays())
    path.write_bytes(whole.read_bytes()[:-40])
    with refused(InputError, "cannot read"):
        from_file(path)


def test_what_is_wrong_with_a_file_and_its_arrays_is_said(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with refused(InputError, "w.npz", "one array without a name", "savez"):
        from_file(path)
    savez(path, {"w_q": np.zeros((2, 5, 3)), "b_q": np.array(["a"])})
    with refused(InputError, "w.npz", "'b_q'", "dtype <U1"):
        from_file(path)
    savez(path, {"w_k": np.array([{"a": 1}], dtype=object)})
    with refused(InputError, "'w_k'", "Python objects"):
        from_file(path)
    for name in ("w.npz", "w.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"")
        with refused(InputError, name, "is empty"):
            from_file(path)
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
        with refused(InputError, name, "git lfs pull"):
            from_file(path)
        path.write_bytes(b"not an archive, and long enough to have a header")
        with refused(InputError, name, "cut short", "savez|save_file"):
            from_file(path)
    torch.save({"w_q": torch.zeros(1)}, tmp_path / "w.safetensors")
    with refused(InputError, "torch.save", "save_file"):
        from_file(tmp_path / "w.safetensors")


def test_big_endian_numbers_are_read(tmp_path: Path) -> None:
    values = {name: np.random.default_rng(0).normal(size=(2, 5, 3)) for name in ("w_q", "w_k", "w_v")}
    savez(tmp_path / "w.npz", {name: value.astype(">f8") for name, value in values.items()})
    assert_same_bits(from_file(tmp_path / "w.npz").w_q, torch.from_numpy(values["w_q"]))


def test_other_suffixes_and_python_objects(tmp_path: Path) -> None:
    with refused(InputError, "must end in .npz or .safetensors"):
        from_file(tmp_path / "w.pt")
    np.savez(tmp_path / "w.npz", w_q=np.array([{"a": 1}], dtype=object))
    with refused(InputError, "cannot read"):
        from_file(tmp_path / "w.npz")


def test_writing_refuses(tmp_path: Path) -> None:
    layer = from_file(write(tmp_path / "w.npz", arrays()))
    with refused(InputError, "must end in"):
        to_file(layer, tmp_path / "w.bin")
    with refused(InputError, "cannot write"):
        to_file(layer, tmp_path / "missing" / "w.npz")
    with refused(InputError, "cannot write"):
        to_file(layer, tmp_path / "missing" / "w.safetensors")


# ---- tokens ----------------------------------------------------------------------------------------------------------


@SUFFIX
def test_tokens(tmp_path: Path, suffix: str) -> None:
    values = {name: torch.randn(n, D) for name, n in (("x10", 3), ("x2", 1), ("x1", 4))}
    inputs = read_tokens(write(tmp_path / f"t{suffix}", values), width=D)
    assert [given.id for given in inputs] == ["x1", "x2", "x10"]
    for given in inputs:
        assert_same_bits(given.measure.points, values[given.id].double())
        assert given.measure.uniform
        assert (given.text, given.token_strings) == (None, ())


@SUFFIX
@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.zeros(3, D + 1), "width 6, the layer takes 5"),
        (torch.zeros(D), "shape"),
        (torch.zeros(0, D), "shape"),
        (torch.full((2, D), torch.nan), "NaN"),
        (torch.zeros(2, D, dtype=torch.int64), "dtype"),
    ],
)
def test_tokens_refuse(tmp_path: Path, suffix: str, value: Tensor, word: str) -> None:
    path = write(tmp_path / f"t{suffix}", {"a": torch.zeros(2, D), "b": value})
    with shapes_unchecked(), refused(InputError, word, "'b'"):
        read_tokens(path, width=D)


@SUFFIX
def test_tokens_of_an_empty_file(tmp_path: Path, suffix: str) -> None:
    with refused(InputError, "no arrays"):
        read_tokens(write(tmp_path / f"t{suffix}", {}))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_positions_windows_and_shared_keys_come_back(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    shared = torch.randn(2, 6, 4, dtype=torch.float64).repeat_interleave(2, 0)
    base = Attention(w_q=torch.randn(4, 6, 4, dtype=torch.float64), w_k=shared, w_v=shared, causal=True, kv_heads=2)
    layers = (
        replace(base, rotary=Rotary(frequencies=torch.rand(1), layout="interleaved", offset=3), window_left=4),
        replace(base, rotary=Rotary(angles=torch.rand(5, 2)), causal=False, window_left=1, window_right=2),
        replace(base, head_bias=HeadBias(slopes=torch.rand(4), symmetric=True), causal=False),
        replace(base, head_bias=HeadBias(table=torch.rand(4, 5))),
        replace(base, head_bias=HeadBias(explicit=torch.rand(4, 5, 5))),
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    for number, layer in enumerate(layers):
        back = from_file(to_file(layer, tmp_path / f"{number}{suffix}"))
        assert back.digest == layer.digest
        assert back.kv_heads == 2
        assert_same_bits(back(x), layer(x))


def test_numbers_of_positions_are_checked(tmp_path: Path) -> None:
    w = np.zeros((1, 4, 4))
    for more, words in (
        ({"window_left": 1.5}, "window_left is 1.5; give a whole number"),
        ({"rotary_interleaved": 1}, "frequencies or angles"),
        ({"bias_symmetric": 2}, "bias_symmetric is 2.0; give 0 or 1"),
        ({"rotary_frequencies": np.zeros(3)}, "rotary turns 6 coordinates"),
    ):
        np.savez(tmp_path / "x.npz", w_q=w, w_k=w, w_v=w, **more)
        with refused(InputError, "x.npz", words):
            from_file(tmp_path / "x.npz")
