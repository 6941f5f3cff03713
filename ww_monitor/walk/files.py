"""A checkpoint on disk → its weight matrices, read lazily, one tensor at a time, and never a pickled object."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.factors import lora_scaling
from ww_monitor.walk.parts import Split, check_split
from ww_monitor.walk.reading import Unread, unread
from ww_monitor.walk.state_dict import walk_unread

_TORCH = (".bin", ".pt", ".pth", ".th", ".ckpt")
_KERAS = (".keras", ".h5")
_INSIDE = ("state_dict", "model_state_dict", "model_state", "model")  # where checkpoints keep the weights
_IN_FOLDER = (  # the first that finds something counts
    "model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model*.safetensors",
    "adapter_model*.bin",
)
_RECOGNISED = (
    f"a .safetensors file, a torch file ({', '.join(_TORCH)}), a Keras file ({', '.join(_KERAS)}), "
    f"or a directory with {', '.join(_IN_FOLDER)}"
)


def walk_files(path: str | Path, *, split: Split | None = None) -> Iterator[Matrix | Skipped]:
    """The weight matrices of a checkpoint, and what was left out with the reason.

    Shapes come from the header, numbers are read when `Matrix.load` is called. What names and shapes mean is told in
    `walk_state_dict`.

    Args:
        path: A `.safetensors` file; a `.bin`, `.pt`, `.pth`, `.th` or `.ckpt` file, read with
            `torch.load(weights_only=True)`; a `.keras` or `.h5` file, which Keras loads as a whole in its safe mode; or
            a directory with `model*.safetensors`, `pytorch_model*.bin` (both also in shards) or the `adapter_model` of
            a LoRA, whose scaling is read from `adapter_config.json`.
        split: As for `walk_state_dict`.

    Returns:
        A `Matrix` for every weight, a `Skipped` for every other tensor of two or more dimensions.

    Raises:
        FileNotFoundError: if nothing is there, or a shard is missing.
        WWMonitorError: if what is there is no checkpoint of these kinds, is damaged, or holds pickled objects.
        MissingDependency: if a package is needed to read it.
        InvalidArgument: if `split` is malformed.

    >>> import tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> torch.save({"fc.weight": torch.zeros(4, 8), "fc.bias": torch.zeros(4)}, f"{folder.name}/net.pt")
    >>> [(matrix.name, matrix.kind, matrix.shape) for matrix in walk_files(f"{folder.name}/net.pt")]
    [('fc', 'dense', (1, 4, 8))]
    >>> folder.cleanup()
    """
    check_split("walk_files", split)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"walk_files: no file or directory {str(path)!r}; looked for {_RECOGNISED}")
    if path.suffix.lower() in _KERAS and path.is_file():
        from ww_monitor.walk.keras import load_keras_file, walk_keras

        return walk_keras(load_keras_file(path), split=split)
    files = _weight_files(path) if path.is_dir() else [path]
    tensors = {key: value for file in files for key, value in _read_file(file).items()}
    return walk_unread(tensors, split, lora_scaling(files[0].parent))


# --- which files


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a directory: the one in one piece, else the shards of the index, else all there are."""
    for pattern in _IN_FOLDER:
        whole = folder / pattern.replace("*", "")
        if whole.is_file():
            return [whole]
        indices = sorted(folder.glob(f"{pattern}.index.json"))
        files = sorted(folder.glob(pattern))
        if indices:
            files = [folder / name for name in _shards(indices[0])]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"walk_files: {indices[0].name} names {file.name!r}, which is not in {folder}")
        if files:
            return files
    raise WWMonitorError(f"walk_files: expected weights in {str(folder)!r}, found none; use {_RECOGNISED}")


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WWMonitorError(f"walk_files: expected a `weight_map` from tensors to files in {index}") from error


def _read_file(path: Path) -> Mapping[str, Unread]:
    """What one file holds, by name."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _safetensors(path)
    if suffix in _TORCH:
        return _torch_file(path)
    raise WWMonitorError(f"walk_files: expected {_RECOGNISED}; got {path.name!r}")


# --- safetensors


def _safetensors(path: Path) -> dict[str, Unread]:
    """The tensors of a safetensors file; only its header is read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependency(
            f"walk_files: reading {path.name} needs safetensors; install `ww-monitor[huggingface]`"
        ) from error
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the handle is no mapping
                header = file.get_slice(key)
                found[key] = Unread(tuple(header.get_shape()), _dtype(header), partial(_from_safetensors, path, key))
    except SafetensorError as error:
        raise WWMonitorError(f"walk_files: {path} is no readable safetensors file: {error}") from error
    return found


def _dtype(header: Any) -> torch.dtype | None:
    """As torch reads no row of it; `None` for a type that torch lacks, and for a scalar, which has no rows."""
    try:
        dtype: torch.dtype = header[:0].dtype
        return dtype
    except Exception:  # noqa: BLE001 - an unknown type raises an error of safetensors, of torch, or another
        return None


def _from_safetensors(path: Path, key: str) -> Tensor:
    """One tensor; the file is mapped for this call only, so that pages of earlier tensors do not pile up."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


# --- torch.save


def _torch_file(path: Path) -> dict[str, Unread]:
    """The tensors of a torch file. A file of torch >= 1.6 is mapped, and mapped anew for every tensor that is read."""
    found = _torch_load(path)
    mapped = zipfile.is_zipfile(path)
    read = (lambda key: _torch_load(path)[key]) if mapped else found.__getitem__
    described = {key: unread(tensor, partial(read, key)) for key, tensor in found.items()}
    # one address may be mapped again for another file, whose tensors are not tied to these
    return {key: replace(item, identity=(path, item.identity)) for key, item in described.items()}


def _torch_load(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WWMonitorError(
            f"walk_files: {path} is damaged or holds pickled Python objects, which can run any code when they are "
            f"loaded, and is not read; save the model's state_dict() alone and read that: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise WWMonitorError(f"walk_files: {path} is no readable torch file: {_first_line(error)}") from error
    return _tensors(content, path)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, out of the mapping that training scripts and Lightning put around them."""
    inner = content
    while isinstance(inner, Mapping):
        content, inner = inner, next((inner[key] for key in _INSIDE if isinstance(inner.get(key), Mapping)), None)
    found = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not found:
        raise WWMonitorError(
            f"walk_files: expected a mapping from names to tensors in {path}, alone or under one of "
            f"{', '.join(map(repr, _INSIDE))}; got {type(content).__name__}"
        )
    return found
