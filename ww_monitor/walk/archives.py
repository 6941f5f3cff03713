"""A file of `torch.save` → its content, read without running code, and mapped where it can be."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ww_monitor.errors import WWMonitorError

_SAFE = (2, 6)


def is_script(path: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())  # as torch tells them


def content_of(path: Path) -> Any:
    """What `torch.load(weights_only=True)` finds in a file; numbers of an archive stay on the disk until they are read.

    Raises:
        WWMonitorError: if the file is damaged, holds pickled objects, is compressed, or says that it holds more numbers
            than it has bytes; or with a torch below 2.6.
    """
    refuse_old_torch(path)
    mapped = check_archive(path)
    try:
        content = load(path, mapped=mapped)
    except pickle.UnpicklingError as error:
        raise WWMonitorError(
            f"walk_files: {path} is damaged or holds pickled Python objects, which can run any code when they are "
            f"loaded, and is not read; save the model's state_dict() alone and read that: {_first_line(error)}"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its operations raise
        raise WWMonitorError(
            f"walk_files: {path} is no readable torch file: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return content


def load(path: Path, *, mapped: bool) -> Any:
    """What is in a file that has been checked."""
    return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:500]


def refuse_old_torch(path: Path) -> None:
    """Below 2.6 a pickled file can run code in spite of `weights_only=True`."""
    version = tuple(int(number) for number in re.findall(r"\d+", str(torch.__version__))[:2])
    if version < _SAFE:
        raise WWMonitorError(
            f"walk_files: {path} is a pickled file, which can run code in torch {torch.__version__} even when weights "
            "alone are asked for (CVE-2025-32434), and is not read; use torch 2.6 or later, or a .safetensors file"
        )


def check_archive(path: Path) -> bool:
    """Whether a file is an archive; one with compressed entries may be a bomb, and cannot be mapped.

    Raises:
        WWMonitorError: for such an archive, and for a file that is neither an archive nor a pickle.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(16)
        if start[:1] != b"\x80":  # the first byte of a pickle from protocol 2 on
            raise WWMonitorError(f"walk_files: {path} is no torch file: it begins with {start!r}")
        return False
    with zipfile.ZipFile(path) as archive:  # of TorchScript the code alone is packed, which nobody reads
        read = [entry for entry in archive.infolist() if not entry.filename.endswith((".py", ".debug_pkl"))]
    packed = next((entry.filename for entry in read if entry.compress_type != zipfile.ZIP_STORED), "")
    if packed:
        raise WWMonitorError(f"walk_files: {path} is no readable torch file: {packed!r} in it is compressed")
    return True


def check_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `WWMonitorError` if tensors have more numbers in memory than their file has bytes."""
    # By address: tied tensors and views have one storage. Other classes may have none of their own.
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors.values()
        if tensor.layout is torch.strided and not tensor.is_meta and type(tensor) in (Tensor, torch.nn.Parameter)
    }
    claimed, size = sum(storages.values()), path.stat().st_size
    if claimed > size:
        raise WWMonitorError(f"walk_files: {path} says that it holds {claimed} bytes of numbers, and has {size} in all")
