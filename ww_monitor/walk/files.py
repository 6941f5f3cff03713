"""A checkpoint on disk → its weight matrices, read lazily, one tensor at a time, and never a pickled object."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ww_monitor.errors import InvalidArgument, MissingDependency, SpectralWarning, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.archives import check_sizes, content_of, is_script, load
from ww_monitor.walk.containers import choose, entries, of_others
from ww_monitor.walk.factors import factor_of, lora_scaling
from ww_monitor.walk.folders import KERAS, RECOGNISED, TORCH, Files, check_regular, weight_files
from ww_monitor.walk.parts import Split, check_split, joined
from ww_monitor.walk.script import script_weights
from ww_monitor.walk.state_dict import walk_unread
from ww_monitor.walk.unread import Unread, unread

_MOST_LISTED = 8


def walk_files(path: str | Path, *, split: Split | None = None, part: str = "") -> Iterator[Matrix | Skipped]:
    """The weight matrices of a checkpoint, and what was left out with the reason.

    Shapes come from the header, numbers are read when `Matrix.load` is called. What names and shapes mean is told in
    `walk_state_dict`. A choice that was made is said in a `SpectralWarning`: between several state dicts, between the
    checkpoints of a run, or that a file is a part of a model only.

    Args:
        path: A `.safetensors` file; a `.bin`, `.pt`, `.pth`, `.th`, `.ckpt` or `.pth.tar` file, read with
            `torch.load(weights_only=True)`, or an archive of TorchScript, whose weights alone are read; a `.keras` or
            `.h5` file, which Keras loads as a whole in its safe mode, or a `.weights.h5`; the index of shards; or a
            directory with such weights (also of diffusers, of Llama's and Mistral's `consolidated`, or of a LoRA,
            whose scaling is read from `adapter_config.json`), or with the checkpoints of a run, of which the newest
            counts.
        split: As for `walk_state_dict`.
        part: As for `walk_state_dict`.

    Returns:
        A `Matrix` for every weight, a `Skipped` for every other tensor of two or more dimensions.

    Raises:
        FileNotFoundError: if nothing is there, or a shard is missing (`ww_monitor.errors.NoSuchFile`).
        WWMonitorError: if what is there is no checkpoint of these kinds, is damaged, holds pickled objects, or has no
            weight matrix, with what it has.
        MissingDependency: if a package is needed to read it.
        InvalidArgument: if `split` is malformed, or there is no such `part`.

    >>> import tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> torch.save({"fc.weight": torch.zeros(4, 8), "fc.bias": torch.zeros(4)}, f"{folder.name}/net.pt")
    >>> [(matrix.name, matrix.kind, matrix.shape) for matrix in walk_files(f"{folder.name}/net.pt")]
    [('fc', 'dense', (1, 4, 8))]
    >>> folder.cleanup()
    """
    check_split("walk_files", split)
    with _named(path):
        files = weight_files(Path(path))
        if files.said:
            warnings.warn(files.said, SpectralWarning, stacklevel=2)
        items = list(_items(files, split, part))  # now: what is wrong with a file is an error of this call
        if not any(isinstance(item, Matrix) for item in items):
            skipped = [f"{item.name} {item.shape} ({item.reason})" for item in items if isinstance(item, Skipped)]
            raise _without_weights(path, skipped)
    return iter(items)


def _without_weights(path: object, held: list[str]) -> WWMonitorError:
    more = [f"and {len(held) - _MOST_LISTED} more"] * (len(held) > _MOST_LISTED)
    listed = "; ".join(held[:_MOST_LISTED] + more) or "nothing"
    return WWMonitorError(f"walk_files: expected weight matrices in {path}; got {listed}")


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with a file is an error of this package that names it."""
    try:
        yield
    except (WWMonitorError, SpectralWarning):  # the warning where a filter makes an error of it
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:500]}"
        raise WWMonitorError(f"walk_files: {path} could not be read: {reason}") from error


def _items(files: Files, split: Split | None, part: str) -> Iterator[Matrix | Skipped]:
    """What one model has, in one file or several."""
    first = files.paths[0]
    if first.name.lower().endswith(KERAS):
        from ww_monitor.walk.hdf5 import walk_keras_file

        if len(files.paths) > 1 or part:
            raise InvalidArgument(f"walk_files: expected one Keras file, and no part; got {part!r}, {first} and others")
        return walk_keras_file(first, split)
    tensors: dict[str, Unread] = {}
    skipped: list[Skipped] = []
    for file in files.paths:
        found, left_out, said = _read_file(file, part)
        if said:
            warnings.warn(said, SpectralWarning, stacklevel=4)
        twice = "" if files.indexed else next((key for key in found if key in tensors), "")
        if twice:
            raise WWMonitorError(
                f"walk_files: expected parts of one model; got {twice!r} in {file} too: pieces of one tensor, or two "
                "models; give one of the files"
            )
        tensors.update(found)
        skipped += left_out
    if not any(len(value.shape) > 1 for value in tensors.values()):
        raise _without_weights(first, [f"{name} {value.shape}" for name, value in tensors.items()])
    scaling = None
    if factors := [key for key in tensors if factor_of(key)]:
        scaling = lora_scaling(first, _header(first))
        if scaling is None and not any(key.endswith(".alpha") for key in tensors):
            said = (
                f"walk_files: nothing says how the {len(factors)} factors of adapters in {first} are scaled; taken as 1"
            )
            warnings.warn(said, SpectralWarning, stacklevel=3)
    return chain(walk_unread(tensors, split, scaling), skipped)


def num_stored(path: str | Path, part: str) -> int:
    """How many numbers the tensors of a checkpoint have; 0 for a whole model of Keras, which is not read for this."""
    files = weight_files(Path(path)).paths
    if files[0].name.lower().endswith(KERAS):
        from ww_monitor.walk.hdf5 import num_weights

        return num_weights(files[0])
    return sum(prod(value.shape) for file in files for value in _read_file(file, part)[0].values())


def _read_file(path: Path, part: str) -> tuple[Mapping[str, Unread], Iterable[Skipped], str]:
    """What one file holds, by name, its entries that are no tensors, and what is to be said of the choice."""
    name = check_regular(path).name.lower()
    if name.endswith(TORCH) and not is_script(path):
        return _torch_file(path, part)
    if name.endswith((".safetensors", *TORCH)):
        if part:
            raise InvalidArgument(f"walk_files: part chooses between several state dicts; {path} has one; got {part!r}")
        return (_safetensors(path) if name.endswith(".safetensors") else script_weights(path)), (), ""
    raise WWMonitorError(f"walk_files: expected {RECOGNISED}; got {path.name!r} in {path.parent}")


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


def _header(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of itself; nothing of another file."""
    if not path.name.lower().endswith(".safetensors"):
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _dtype(header: Any) -> torch.dtype | None:
    """As torch reads no row of it, or the number that a scalar is; `None` for a type that torch lacks."""
    try:
        dtype: torch.dtype = (header[:0] if header.get_shape() else header[...]).dtype
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


def _torch_file(path: Path, part: str) -> tuple[dict[str, Unread], Iterable[Skipped], str]:
    """The tensors of a torch file. An archive is mapped, and mapped anew for every tensor that is read."""
    content = content_of(path)
    chosen = choose(content, part, f"walk_files: {path}")
    found = {}
    mapped = zipfile.is_zipfile(path)
    for prefix, one in chosen.state_dicts.items():
        check_sizes(one.tensors, path)
        for name, tensor in one.tensors.items():
            read = partial(_from_archive, path, one.path, name) if mapped else tensor.detach
            described = unread(tensor, read)
            # one address may be mapped again for another file, whose tensors are not tied to these
            found[joined(prefix, name)] = replace(described, identity=(path, described.identity))
    return found, of_others(chosen), chosen.said


def _from_archive(path: Path, keys: tuple[Any, ...], name: str) -> Tensor:
    inner = load(path, mapped=True)
    for key in keys:
        inner = inner[key]
    # The name is a key as text: those of a list are numbers.
    return next(value for key, value in entries(inner) if str(key) == name and isinstance(value, Tensor))
