"""Another device, played by this machine's memory: what a real GPU refuses is refused.

Its name is ``meta``, the one device besides the CPU whose tensors autograd follows in every build of torch; unlike
those of torch's own ``meta``, the tensors here have values. They are computed by the CPU's kernels, so a computation
gives the CPU's numbers up to the order of a few sums. Refused are operations that mix tensors of both devices (scalars
and indices aside), generators of the CPU that draw on the other device, and numpy's view of a tensor there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CPU, GPU = torch.device("cpu"), torch.device("meta")
_COPIES = ("aten._to_copy.default", "aten.copy_.default", "aten.lift_fresh.default")
_INDEXED = ("aten.index.", "aten.index_put", "aten._unsafe_index", "aten._index_put_impl_")


class MixedDevicesError(RuntimeError):
    """What a real GPU would refuse."""


class _OnGpu(Tensor):
    """A tensor that says it is on the GPU; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "_OnGpu":
        made: _OnGpu = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))


class PlayedGpu(TorchDispatchMode):
    """While it is entered, tensors may be made on, and sent to, ``GPU``."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))


class _FromValues(TorchFunctionMode):
    """Tensors made of numbers: torch itself would leave the values of its ``meta`` out."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.new_tensor:
            options.setdefault("device", args[0].device)
            options.setdefault("dtype", args[0].dtype)
            func, args = torch.tensor, args[1:]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _indices(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and torch.device(options.get("device") or CPU) == GPU:
            return func(*args, **{**options, "device": CPU}).to(GPU)
        return func(*args, **options)


def _indices(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_indices(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = str(func)
    tensors = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [isinstance(tensor, _OnGpu) for tensor in tensors]
    wanted = kwargs.get("device")
    target = any(there) if wanted is None else torch.device(wanted).type == "meta"
    _refuse(name, args, kwargs, tensors, there, target=target)
    if wanted is not None:
        kwargs["device"] = CPU
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], _OnGpu):
        with no_dispatch():
            func(*args, **kwargs)  # the outer tensor's shape follows
        return args[0]
    if isinstance(args[0] if args else None, Tensor) and name.rsplit(".", 1)[0].endswith("_"):
        return args[0]  # in place
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda value: _OnGpu(value) if isinstance(value, Tensor) else value, result) if target else result


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _OnGpu) else value


def _refuse(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor], there: Sequence[bool], *,
    target: bool,
) -> None:  # fmt: skip
    generators = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
    if target and any(generator.device.type == "cpu" for generator in generators):
        raise MixedDevicesError(f"{name}: a generator of the CPU draws on the GPU")
    if not any(there) or name in _COPIES:
        return
    if name.startswith(_INDEXED):
        tensors, there = [args[0]], [isinstance(args[0], _OnGpu)]
        indices = [index for index in args[1] if index is not None]
        if not there[0] and any(isinstance(index, _OnGpu) for index in indices):
            raise MixedDevicesError(f"{name}: an index on the GPU into a tensor on the CPU")
        if len(args) > 2:
            tensors, there = [*tensors, args[2]], [*there, isinstance(args[2], _OnGpu)]
    strangers = [tuple(t.shape) for t, gpu in zip(tensors, there, strict=True) if not gpu and t.dim() > 0]
    if strangers and any(there):
        raise MixedDevicesError(f"{name}: tensors of shape {strangers} are on the CPU, others on the GPU")


@contextmanager
def played_gpu() -> Iterator[torch.device]:
    """A GPU for the tests of a machine that has none; the device to use."""
    with _FromValues(), PlayedGpu():  # type: ignore[no-untyped-call]
        yield GPU
