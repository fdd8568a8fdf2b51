"""What lies beside a model's weights and changes its function: adapters, quantisation, code of its own."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnrobust.errors import InputError, UnsupportedModelError, first_line

_ADAPTER_FILE = re.compile(
    r"adapter_config\.json|adapter_model.*|pytorch_adapter.*|adapters?\.(safetensors|npz|bin)"
    r"|(.*[^a-z])?lora([^a-z].*)?\.(safetensors|bin|pt|pth|ckpt|npz)",
    re.IGNORECASE,
)
_QUANTISATION_FILE = re.compile(r"quanti[sz]e_config\.json|(hf_)?quant(ization)?_config\.json", re.IGNORECASE)
_ADAPTER_KEY = re.compile(r"(^|[._])(lora|loha|lokr|ia3|oft|vera|adapters?|prefix_encoder|prompt_embeddings)([._]|$)")
_QUANTISED_KEY = re.compile(r"\.(qweight|qzeros|g_idx|scales|SCB|absmax|quant_state|quant_map|weight_scale\w*)(\.|$)")

MERGE = "merge it (peft: model.merge_and_unload(), then save_pretrained) and give the directory of the merged model"
UNQUANTISED = "give the checkpoint without quantisation, or dequantise it and save it"


def refuse_changed_directory(source: str, directory: Path) -> None:
    """Refuse a model directory whose files beside the weights make it another function; reads no weights.

    Files one level down are looked at too, where peft keeps adapters by name.

    Raises:
        UnsupportedModelError: An adapter that is not merged, quantisation, or a model that is code of its repository.
        InputError: A config.json that cannot be read.
    """
    inside = (path for place in (directory, *_folders(directory)) for path in place.iterdir() if path.is_file())
    config = directory / "config.json"
    refuse_changed(
        source, (str(path.relative_to(directory)) for path in inside), _json(config) if config.is_file() else {}
    )


def refuse_changed(source: str, files: Iterable[str], config: Mapping[str, Any]) -> None:
    """The same for names of files and the content of config.json."""
    reasons = [*_file_reasons(sorted(files)), *_config_reasons(config)]
    if reasons:
        raise UnsupportedModelError(f"{source} {'; it '.join(reasons)}")


def refuse_changed_weights(source: str, keys: Iterable[str]) -> None:
    """Refuse weights of a checkpoint that its model has no place for and that are those of adapters or quantisation."""
    keys = sorted(keys)
    adapters = [key for key in keys if _ADAPTER_KEY.search(key)]
    quantised = [key for key in keys if _QUANTISED_KEY.search(key)]
    if adapters:
        raise UnsupportedModelError(f"{source} holds weights of an adapter that is not merged ({adapters[0]}); {MERGE}")
    if quantised:
        raise UnsupportedModelError(f"{source} holds quantised weights ({quantised[0]}); {UNQUANTISED}")


def _file_reasons(files: list[str]) -> Iterator[str]:
    near = [Path(name) for name in files if Path(name).parent.parent == Path()]  # not deeper than one folder
    adapters = [str(path) for path in near if _ADAPTER_FILE.fullmatch(path.name)]
    quantised = [str(path) for path in near if _QUANTISATION_FILE.fullmatch(str(path))]  # those of onnx/ are ONNX's
    if adapters:
        yield f"holds an adapter that is not merged ({', '.join(adapters[:3])}), which the weights lack; {MERGE}"
    if quantised:
        yield f"is quantised ({', '.join(quantised[:3])}); {UNQUANTISED}"


def _config_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    parts = {"": config} | {f"{name}.": part for name, part in config.items() if isinstance(part, dict)}
    for place, part in parts.items():
        for name in ("quantization_config", "compression_config"):
            if part.get(name):
                method = part[name].get("quant_method", "") if isinstance(part[name], dict) else part[name]
                yield f"is quantised ({place}{name} of config.json{f': {method}' if method else ''}); {UNQUANTISED}"
        if part.get("pruned_heads"):
            yield f"has pruned heads ({place}pruned_heads of config.json), which transformers 5 does not load"
    code = config.get("auto_map")
    if isinstance(code, dict) and any(name.startswith(("AutoModel", "TFAutoModel")) for name in code):
        yield "needs code from its own repository (auto_map of config.json), which is never run"


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {path.parent}: config.json is not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"cannot load {path.parent}: config.json holds no object")
    return content
