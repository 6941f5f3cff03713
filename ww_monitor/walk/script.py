"""An archive of TorchScript → its weights, by a reader of its own that knows no code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ww_monitor.errors import WWMonitorError
from ww_monitor.walk.archives import check_archive
from ww_monitor.walk.unread import Unread

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
_DEEPEST = 100  # modules one in another (our choice)


class _Inert:
    """Stands for every class and function that a pickle names; it takes whatever it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...


@dataclass(frozen=True)
class _Stored:
    """A tensor as the pickle describes it."""

    record: str
    dtype: torch.dtype | None
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _stored(storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape!r} and strides {stride!r} at {offset!r}")
    return _Stored(storage[1], _DTYPES.get(storage[0]), offset, tuple(shape), tuple(stride))


def _quantized(storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    return replace(_stored(storage, offset, shape, stride), dtype=None)


class _Reader(pickle._Unpickler):  # in Python: memory grows with the file only
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _stored
        if (module, name) == ("torch._utils", "_rebuild_qtensor"):
            return _quantized
        return name if module == "torch" and name.endswith("Storage") else _Inert

    def persistent_load(self, pid: Any) -> Any:
        return str(pid[1]), str(pid[2])  # of ("storage", type, key, device, numbers)


def script_weights(path: Path) -> dict[str, Unread]:
    """The tensors of a scripted or traced module, by their names in it; nothing of its code is looked at.

    Raises:
        WWMonitorError: if the archive is damaged.
    """
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        # The outermost one: files that a user has packed into the archive lie deeper.
        main = min((name for name in sizes if name.endswith("/data.pkl")), key=len, default="")
        try:
            root = _Reader(io.BytesIO(archive.read(main))).load()
        except Exception as error:  # a damaged pickle raises whatever its operations raise
            raise WWMonitorError(
                f"walk_files: {path} is no readable TorchScript archive: {type(error).__name__}: {error}"
            ) from error
    folder = main.removesuffix("data.pkl") + "data/"
    return {name: _unread(path, sizes, folder, stored) for name, stored in _tensors(root, path).items()}


def _tensors(root: Any, path: Path) -> dict[str, _Stored]:
    """The tensors of a module and those in it, by dotted name; a module that is used twice counts once."""
    found: dict[str, _Stored] = {}
    stack: list[tuple[tuple[str, ...], Any]] = [((), root)]
    seen: set[int] = set()
    while stack:
        names, value = stack.pop()
        if isinstance(value, _Stored):
            found[".".join(names)] = value
        elif isinstance(value, _Inert) and id(value) not in seen and isinstance(value.state, Mapping):
            seen.add(id(value))
            if len(names) > _DEEPEST:
                raise WWMonitorError(f"walk_files: {path} is no readable TorchScript archive: modules too deep")
            stack += [((*names, str(name)), inner) for name, inner in reversed(list(value.state.items()))]
        elif isinstance(value, (_Inert, tuple, list)) and id(value) not in seen and len(names) <= _DEEPEST:
            seen.add(id(value))  # packed weights of quantised layers
            held = value.state if isinstance(value, _Inert) else value
            stack += (
                [((*names, str(at)), inner) for at, inner in enumerate(held)] if isinstance(held, (tuple, list)) else []
            )
    return found


def _unread(path: Path, sizes: Mapping[str, int], folder: str, stored: _Stored) -> Unread:
    record, dtype = folder + stored.record, stored.dtype
    identity = (path, record, stored.offset, stored.shape, stored.stride)
    last = stored.offset + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride, strict=True))
    size = sizes.get(record, 0)
    # A stride of 0 would make many numbers of few, one too long would read what is not there.
    there = dtype is None or (last < size // dtype.itemsize and prod(stored.shape) <= size // dtype.itemsize)
    reason = "" if there else "its numbers are not all in the file"
    return Unread(stored.shape, dtype, partial(_read, path, record, stored), identity, reason)


def _read(path: Path, record: str, stored: _Stored) -> Tensor:
    with zipfile.ZipFile(path) as archive:
        numbers = bytearray(archive.read(record))  # `frombuffer` warns of memory that cannot be written
    assert stored.dtype is not None  # else it has a reason
    return torch.frombuffer(numbers, dtype=stored.dtype).as_strided(stored.shape, stored.stride, stored.offset)
