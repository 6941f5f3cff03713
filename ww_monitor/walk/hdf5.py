"""A file of Keras → its weight matrices: weights alone from HDF5, a whole model by Keras if nothing in it is foul."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ww_monitor.errors import MissingDependency, WWMonitorError
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import names, parts
from ww_monitor.walk.keras import load_keras_file, walk_keras
from ww_monitor.walk.parts import WHOLE, Part, Split, blocks, joined, matrix, resolved, split_parts, unfit, unique
from ww_monitor.walk.reading import tied_to
from ww_monitor.walk.roles import infer_role

_SLACK = 64 << 20
# What is stored may become so many times as large, and the slack (our choice: Keras packs nothing).
_MOST_TIMES = 8
_ATTENTION = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
_GATES = {3: "zrh", 4: "ifco"}  # of GRU and LSTM, in Keras' order
_UNKNOWN = "its group and shape tell no weight: load the model and analyse that"
_CONV = ("kernel", "depthwise_kernel", "pointwise_kernel")


def walk_keras_file(path: Path, split: Split | None) -> Iterator[Matrix | Skipped]:
    """The weight matrices of a `.keras`, `.h5` or `.weights.h5` file.

    A file of weights alone has no classes: what a layer is is told by the names of its groups and the shapes. Names are
    those of the layers, as `walk_keras` gives them.

    Raises:
        MissingDependency: if keras or h5py is needed to read it.
        WWMonitorError: if the file links to others, says that it holds far more than it has bytes, or is damaged.
    """
    if zipfile.is_zipfile(path):
        _check_archive(path)
    elif _is_hdf5(path):
        with _opened(path) as file:
            check_hdf5(file, path, path.stat().st_size)
            if "model_config" not in file.attrs:
                return iter(list(unique(_weights(file, path, split))))  # the file is closed after this
    return walk_keras(load_keras_file(path), split=split)


def num_weights(path: Path) -> int:
    """How many numbers a file of weights alone has, an optimizer's aside; 0 for a whole model."""
    if zipfile.is_zipfile(path) or not _is_hdf5(path):
        return 0
    sizes: list[int] = []
    with _opened(path) as file:
        file.visititems(lambda name, one: sizes.append(0 if name.startswith("optimizer") else getattr(one, "size", 0)))
        return 0 if "model_config" in file.attrs else sum(sizes)


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _opened(source: Any) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependency("walk_files: reading HDF5 needs h5py; install `ww-monitor[keras]`") from error
    return h5py.File(source, "r")


def _check_archive(path: Path) -> None:
    """Raise `WWMonitorError` for an archive that grows out of proportion, or with HDF5 inside that is not safe."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        _check_size(size, path.stat().st_size, path)
        for entry in entries:
            if entry.filename.endswith(".h5"):
                with archive.open(entry) as inner, _opened(inner) as file:
                    check_hdf5(file, path, entry.file_size)


def _check_size(claimed: int, size: int, path: Path) -> None:
    if claimed > _SLACK + _MOST_TIMES * size:
        raise WWMonitorError(f"walk_files: {path} says that it holds {claimed} bytes, and has {size}: it is not read")


def check_hdf5(file: Any, path: Path, size: int) -> None:
    """Raise `WWMonitorError` if something in a file lies in another one, or if it claims far more than its `size`."""
    import h5py

    claimed, stack, seen = 0, [file], {file}  # h5py's objects are equal where they are one in the file
    while stack:
        group = stack.pop()
        for name in group:
            where = f"{name!r} in {path}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise WWMonitorError(f"walk_files: expected all data in one file; {where} is a link, and not followed")
            inner = group[name]
            if inner in seen:
                continue
            seen.add(inner)
            if isinstance(inner, h5py.Group):
                stack.append(inner)
            elif isinstance(inner, h5py.Dataset):
                if inner.external or inner.is_virtual:
                    raise WWMonitorError(
                        f"walk_files: expected all data in one file; {where} keeps its numbers in another"
                    )
                claimed += inner.nbytes
                _check_size(claimed, size, path)


# --- weights alone


def _weights(file: Any, path: Path, split: Split | None) -> Iterator[Matrix | Skipped]:
    """The weights of every group that holds some."""
    groups: dict[str, dict[str, Any]] = {}
    stack, seen = [file], set()
    while stack:
        group = stack.pop()
        if group in seen:  # a group may hold itself
            continue
        seen.add(group)
        inner = [group[name] for name in group]
        stack += [child for child in reversed(inner) if hasattr(child, "keys")]
        tensors = {child.name: child for child in inner if hasattr(child, "shape")}
        # The file of a compiled model has what its optimizer keeps, too, in a group at the top.
        if tensors and "optimizer" not in group.name.partition("/vars")[0].strip("/").split("/")[0]:
            groups[group.name] = tensors
    split = resolved(split, [_name(file, folder) for folder in groups])
    for folder, tensors in groups.items():
        yield from _layer(file, path, folder, tensors, split)


def _layer(
    file: Any, path: Path, folder: str, tensors: Mapping[str, Any], split: Split | None
) -> Iterator[Matrix | Skipped]:
    """The matrices of the variables that one group has."""
    name, word = _name(file, folder), folder.removesuffix("/vars").rpartition("/")[2]
    attributes = _attributes(list(tensors.values()), word) if folder.endswith("/vars") else _last_words(list(tensors))
    shapes = {attributes[key]: tuple(value.shape) for key, value in tensors.items()}
    for key, value in tensors.items():
        attribute, shape = attributes[key], tuple(value.shape)
        if len(shape) < 2 or attribute == "bias":
            continue
        kind, cut, role = _meaning(attribute, name, word, shape, shapes, split)
        plain = attribute in ("kernel", "embeddings") and kind is not Kind.RECURRENT
        own = name if plain else joined(name, attribute)
        dtype = _dtype(value)
        reason = _no_weight(word) if folder.endswith("/vars") else ""
        reason = reason or _held_inside(file, folder, value) or ("" if cut else _UNKNOWN)
        size = cut[0].shape(shape)[1:] if cut and kind is not Kind.CONV else shape
        reason = reason or ("a storage type that is not read" if dtype is None else unfit(dtype, size, kind))
        if reason:
            yield Skipped(own, kind, shape, reason)
        else:
            of_name = infer_role(own, kind) if role is None else role
            yield from (matrix(own, kind, part, shape, partial(_read, path, key), of_name) for part in cut)


def _no_weight(word: str) -> str:
    """Why the variables of a layer are no weights, as its class says, for which its group is called."""
    word = re.sub(r"_\d+$", "", word)
    if word.endswith("normalization"):
        return "numbers of a normalisation"
    return names.POSITIONS if names.no_weight(word) == names.POSITIONS else ""


def _held_inside(file: Any, folder: str, value: Any) -> str:
    """Where the same variable is that of a layer inside, which a wrapper lists as its own."""
    inside: list[Any] = []
    file[folder.removesuffix("vars") or "/"].visititems(
        lambda _, one: inside.append(one) if hasattr(one, "shape") else None
    )
    for one in inside:
        group, alike = one.name.rpartition("/")[0], (one.shape, one.dtype) == (value.shape, value.dtype)
        if group != folder and alike and len(one.shape) > 1 and np.array_equal(one[()], value[()]):
            return tied_to(_name(file, group))
    return ""


def _name(file: Any, folder: str) -> str:
    """The names of the layers around a group, without the root and the containers that have no variables."""
    words = [word for word in folder.strip("/").split("/") if word not in ("", "model_weights")]
    if words[-1:] != ["vars"]:  # before Keras 3 groups are names, and a layer's own comes again behind the model's
        return ".".join(words[len(words) - 1 - words[::-1].index(words[0]) :]) if words else ""
    found, group = [], file
    for word in words[:-1]:
        group = group[word]
        if "vars" in group:
            found.append(str(group["vars"].attrs.get("name", word)))
    return ".".join(found)


def _last_words(keys: list[str]) -> dict[str, str]:
    return {key: key.rpartition("/")[2].partition(":")[0] for key in keys}


def _attributes(values: list[Any], word: str) -> dict[str, str]:
    """What the numbered variables of a layer are called in it: the kernel first; of a cell the recurrent one second."""
    shapes = [tuple(value.shape) for value in values]
    names = ["embeddings" if "embedd" in word else "kernel"]
    if word.endswith("cell") and len(shapes) > 1:
        names += ["recurrent_kernel", "bias"]
    elif word.startswith("separable_conv"):
        names = ["depthwise_kernel", "pointwise_kernel", "bias"]
    elif len(shapes) > 1 and word in ("query_dense", "key_dense", "value_dense"):
        names += ["bias"]
    return {value.name: (*names, *map(str, range(len(names), len(values))))[at] for at, value in enumerate(values)}


def _meaning(
    attribute: str,
    name: str,
    word: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    split: Split | None,
) -> tuple[Kind, tuple[Part, ...], str | None]:
    """The kind of a variable of two or more dimensions, its parts (none if unknown), and its role if known."""
    recurrent, last = shapes.get("recurrent_kernel"), name.rpartition(".")[2]
    if recurrent and attribute in ("kernel", "recurrent_kernel") and len(shape) == 2:
        gates, rest = divmod(recurrent[-1], recurrent[0])
        cut = blocks(_GATES[gates], (recurrent[0],) * gates, axis=1) if gates in _GATES and not rest else WHOLE
        return Kind.RECURRENT, cut, None
    if last in _ATTENTION and len(shape) == 3 and (word.endswith("_dense") or attribute == "kernel"):
        kind, axes = (Kind.DENSE, 2) if last == "attention_output" else (Kind.ATTENTION, 1)
        return kind, (Part("", partial(parts.flat, axes=axes)),), _ATTENTION[last]
    if attribute == "embeddings" and len(shape) == 2:
        return Kind.EMBEDDING, WHOLE, None
    if attribute in _CONV and len(shape) > 2 and not word.startswith("einsum_dense"):
        return Kind.CONV, (Part("", partial(torch.flatten, end_dim=-3)),), None  # the places of a kernel come first
    if attribute == "kernel" and len(shape) == 2:
        return Kind.DENSE, split_parts(split, name, shape, 1) or WHOLE, None
    return Kind.OTHER, (), None


def _dtype(dataset: Any) -> torch.dtype | None:
    found = getattr(torch, dataset.dtype.name, None)
    return found if isinstance(found, torch.dtype) else None


def _read(path: Path, key: str) -> Tensor:
    with _opened(path) as file:
        return torch.from_numpy(file[key][()])
