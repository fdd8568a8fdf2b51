"""Which tokens a threat names: integers, arrays of integers, boolean masks; everything else is refused."""

import operator
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from attnrobust.errors import InputError

CURE = "give token indices such as (0, 3), an array of integers, or a boolean mask with one entry per token"


class TokenSubset(tuple[int, ...]):
    """Sorted token indices; a subset that was given as a mask remembers for how many tokens (``length``)."""

    length: int | None = None


def checked_tokens(tokens: object) -> TokenSubset | None:
    """A subset of tokens, sorted and without repetition; None means all.

    Args:
        tokens: One integer, any sequence or array of integers, or a boolean mask.

    Raises:
        InputError: An empty subset, a negative index, or anything that is neither integers nor a mask.
    """
    if tokens is None or isinstance(tokens, TokenSubset):
        return tokens
    entries, mask = _entries(tokens)
    subset = TokenSubset(sorted({i for i, chosen in enumerate(entries) if chosen} if mask else set(entries)))
    if not subset:
        raise InputError("the token subset is empty; name at least one token")
    if subset[0] < 0:
        raise InputError(f"token {subset[0]} is negative; tokens count from 0")
    subset.length = len(entries) if mask else None
    return subset


def require_length(tokens: tuple[int, ...] | None, n: int) -> None:
    """Refuse a subset of other inputs: an index that does not exist, a mask with another number of entries."""
    if tokens is None:
        return
    length = getattr(tokens, "length", None)
    if length not in (None, n):
        raise InputError(f"the token mask has {length} entries, the input has {n} tokens; give one entry per token")
    bad = [t for t in tokens if not 0 <= t < n]
    if bad:
        raise InputError(f"token {bad[0]} does not exist; the input has tokens 0 to {n - 1}")


def _entries(tokens: object) -> tuple[list[int], bool]:
    """The entries as Python integers, and whether they are a mask."""
    if isinstance(tokens, Tensor | np.ndarray | np.generic):
        array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
        if array.ndim > 1 or array.dtype.kind not in "biu" or (array.ndim == 0 and array.dtype.kind == "b"):
            raise InputError(f"tokens have shape {array.shape} and dtype {array.dtype}; {CURE}")
        return [int(entry) for entry in array.reshape(-1).tolist()], array.dtype.kind == "b"
    if isinstance(tokens, str | bytes | bool) or not (isinstance(tokens, Iterable) or hasattr(tokens, "__index__")):
        raise InputError(f"tokens are {tokens!r}; {CURE}")
    listed = list(tokens) if isinstance(tokens, Iterable) else [tokens]
    flags = [isinstance(entry, bool | np.bool_) for entry in listed]
    if any(flags) and not all(flags):
        raise InputError(f"tokens mix booleans and indices: {tokens!r}; {CURE}")
    return [_index(entry) for entry in listed], bool(flags) and all(flags)


def _index(entry: object) -> int:
    try:
        return int(entry) if isinstance(entry, np.bool_) else operator.index(entry)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"token {entry!r} is not an integer; {CURE}") from None
