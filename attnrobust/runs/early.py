"""What can be refused in a moment: names, files and directories that are not there, before torch or a model is loaded.

A test holds the lists equal to the registries.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.runs.reading import ATTACKS, CERTIFICATES

if TYPE_CHECKING:
    from attnrobust.runs.config import RunConfig

CERTIFICATES_OF_MEASURES = frozenset(
    {"measure-ball", "measure-cluster", "measure-copies", "measure-curvature", "measure-local"}
)
"""Those that speak about token measures or copies."""
ATTACKS_OF_MEASURES = frozenset({"mass-splitting", "token-duplication"})
FOOLBOX = "foolbox:"
"""How the names of foolbox's attacks begin; the rest is left to its own table."""
THREAT_NAMES = frozenset({
    "frobenius", "per-token", "per-token-linf", "per-token-l1", "any-token", "token", "tokens", "coupling",
    "wasserstein", "copies",
})  # fmt: skip
"""What stands before the first colon of a threat."""
THREAT_KEYS = (
    "frobenius", "per-token", "per-token-linf", "per-token-l1", "any-token", "token:I", "tokens:I,J", "coupling:1",
    "coupling:2", "coupling:inf", "wasserstein:1", "wasserstein:2", "wasserstein:inf", "copies:R",
)  # fmt: skip
"""How threats are written, for messages."""
MODELS = ("minilm", "smollm2")
"""Models that are no file."""
RESULTS = ("manifest.json", "results.json")
"""One of these is in every directory with results, the first in that of a run."""

KINDS = ("texts", "tokens", "images", "dataset")
"""Kinds of input files; a run has one of them."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE = re.compile(r".*\.(npz|safetensors|gguf)")


def refuse_unknown_names(
    *, threats: Iterable[str], certificates: Iterable[str] = (), attack: str | None = None
) -> None:
    """Refuse threats, certificates and an attack whose names do not exist; what follows a colon is not read.

    Where the registries are imported already, nothing is won, and they alone refuse: others may have added to them.

    Raises:
        UnknownNameError: With the nearest names.
    """
    if _registries_are_there():
        return
    for threat in threats:
        if threat.partition(":")[0] not in THREAT_NAMES:
            raise UnknownNameError("threat", threat, THREAT_KEYS)
    known = CERTIFICATES | CERTIFICATES_OF_MEASURES
    for name in certificates:
        if name not in known:
            raise UnknownNameError("certificate", name, known)
    attacks = ATTACKS | ATTACKS_OF_MEASURES
    if attack is not None and attack not in attacks and not attack.startswith(FOOLBOX):
        raise UnknownNameError("attack", attack, (*attacks, FOOLBOX + "NAME"))


def _registries_are_there() -> bool:
    return "attnrobust.attacks.registry" in sys.modules


def require_files(config: "RunConfig") -> None:
    """Refuse a configuration whose model or inputs are plainly not there.

    Raises:
        InputError: A path where nothing is, or a directory where a file must be.
    """
    require_there(config.model, **{name: getattr(config, name) for name in KINDS})


def require_there(model: str, **inputs: Path | None) -> None:
    """Refuse a model, or inputs by their kind, that are plainly not there; see ``require_files``."""
    require_model(model)
    for kind, path in inputs.items():
        require_input(kind, path)


def require_input(option: str, path: Path | None) -> None:
    """Refuse an input file that is not there."""
    if path is None:
        return
    if not path.expanduser().exists():
        raise InputError(f"cannot read the {option} {path}: No such file or directory")
    if option in ("texts", "tokens") and path.is_dir():
        raise InputError(f"cannot read the {option} {path}: it is a directory; give a file")


def require_model(name: str) -> None:
    """Refuse a path of a model where nothing is; a name that the hub may have is left to it.

    Raises:
        InputError: With the cure.
    """
    path = Path(name).expanduser()
    if not name.strip():
        raise InputError("the name of the model is empty; give minilm, a directory, a hub name or a weights file")
    if name in MODELS or path.exists():
        return
    if _FILE.fullmatch(name):
        raise InputError(f"there is no file {name}")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"there is no directory {name}; give that of a Hugging Face model, or a name on its hub")


def require_results(directory: Path, *, run: bool = False) -> None:
    """Refuse a directory without results.

    Args:
        directory: What was given.
        run: Whether it must be that of a run; otherwise what a command wrote to ``--out`` will do.

    Raises:
        InputError: With the cure.
    """
    if not directory.is_dir():
        why = "it is a file" if directory.exists() else "there is no such directory"
        raise InputError(f"{directory} holds no run: {why}; give the directory that attnrobust run or --out wrote")
    if not any((directory / name).exists() for name in (RESULTS[:1] if run else RESULTS)):
        raise InputError(f"{directory} holds no run ({RESULTS[0]} is missing)")
