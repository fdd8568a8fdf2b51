"""Files on disk, each written whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from attnrobust.errors import InputError


def write_atomically(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files so that a reader sees the old content or the new, never a part, also after a power cut.

    All contents reach the disk under temporary names before the first file is replaced; so a full disk changes nothing.

    Args:
        directory: It must exist.
        contents: File name to content.

    Raises:
        OSError: The disk is full or not writable; the old files are untouched.
    """
    temporary: dict[str, Path] = {}
    try:
        for name, content in contents.items():
            handle, made = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
            temporary[name] = Path(made)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary[name].chmod(0o666 & ~_umask())  # mkstemp makes it private
        for name, path in temporary.items():
            path.replace(directory / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    _sync_directory(directory)


def write_text(path: Path, text: str) -> None:
    """Write one text file, whole or not at all.

    Raises:
        InputError: Its directory does not exist or cannot be written.
    """
    try:
        write_atomically(path.absolute().parent, {path.name: text.encode()})
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Make a rename durable; not every file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def require_writable(directory: Path) -> None:
    """Refuse an output directory that cannot be written, before any work is done; nothing is created.

    Args:
        directory: It may not exist yet; then its nearest existing parent must allow making it.

    Raises:
        InputError: It is a file, or there is no permission.
    """
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write to {directory}: {existing} is not a directory; choose another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}; choose another --out") from error


def require_writable_file(path: Path, *, option: str) -> None:
    """Refuse a target file that cannot be written, before any work is done; nothing is created.

    Args:
        path: The file.
        option: How the user named it.

    Raises:
        InputError: It is a directory, its directory is missing, or there is no permission.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; choose another {option}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: {path.parent} is no directory; make it or choose another {option}")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another {option}") from error
