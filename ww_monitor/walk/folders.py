"""A path → the files with weights that it stands for."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from ww_monitor.errors import NoSuchFile, WWMonitorError

TORCH = (".bin", ".pt", ".pth", ".th", ".ckpt", ".pth.tar", ".pt.tar", ".ckpt.tar")
KERAS = (".keras", ".h5")
_SUFFIXES = (*TORCH, *KERAS, ".safetensors")
_INDEX = ".index.json"
_IN_FOLDER = (  # the first that finds something counts
    "model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model*.safetensors",
    "adapter_model*.bin",
    "adapters*.safetensors",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.bin",
    "consolidated*.safetensors",
    "consolidated*.pth",
    "pytorch_lora_weights*.safetensors",
    "pytorch_lora_weights*.bin",
    "*.weights.h5",
)
RECOGNISED = (
    f"a .safetensors file, a torch file ({', '.join(TORCH)}), a Keras file ({', '.join(KERAS)}), the {_INDEX} of "
    f"shards, or a directory with {', '.join(_IN_FOLDER)}"
)
_MOST_INDEX = 64 << 20  # bytes: a model of a million tensors has some 100 each
_SHARD = re.compile(r"-(\d{3,6})-of-(\d{3,6})\.")


@dataclass(frozen=True)
class Files:
    """The files of one model, what is to be said of the choice, and whether an index names them."""

    paths: tuple[Path, ...]
    said: str = ""
    indexed: bool = False


def weight_files(path: Path) -> Files:
    """The file itself; the shards of an index; of a directory the file in one piece, else the shards, else all.

    Raises:
        NoSuchFile: if nothing is there, or a shard is missing.
        WWMonitorError: if what is there is no regular file, or an index is damaged or leaves its folder.
    """
    if path.is_dir():
        return _in_folder(path)
    if not os.path.lexists(path) or not path.exists():  # `exists` alone raises for a name that is too long
        raise NoSuchFile(f"walk_files: no file or directory {str(path)!r}; looked for {RECOGNISED}")
    if path.name.endswith(".json") and ".index." in path.name:
        return Files(_shards(path), indexed=True)
    return Files((check_regular(path),), _said_of_parts([path]))


def check_regular(path: Path) -> Path:
    """The path of a regular file; anything else, which may block for ever when it is opened, is refused unopened."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise WWMonitorError(f"walk_files: expected a regular file, got {path}, which is none and is not opened")
    return path


def _in_folder(folder: Path) -> Files:
    weights = _weights_in(folder)
    if weights.paths:
        return weights
    steps = {
        int(inner.name.rpartition("-")[2]): inner
        for inner in folder.glob("checkpoint-*")
        if inner.name[11:].isdecimal()  # behind "checkpoint-"
    }
    for step in sorted(steps, reverse=True):
        if (files := _weights_in(steps[step])).paths:
            empty = ", ".join(steps[newer].name for newer in sorted(steps) if newer > step)
            which = f"the newest of {len(steps)} checkpoints" + f" with weights, which {empty} lacks" * bool(empty)
            said = f"walk_files: read {steps[step].name}, {which} in {folder}"
            return replace(files, said="; ".join(filter(None, (said, files.said))))
    inside = [inner.name for inner in sorted(folder.iterdir()) if inner.is_dir() and _weights_in(inner).paths]
    names = [inner.name for inner in sorted(folder.iterdir()) if inner.name.lower().endswith(_SUFFIXES)]
    named = f"its folders {', '.join(inside)} have some" * bool(inside) or f"it has {', '.join(names)}" * bool(names)
    hint = f"{named}: give one of them" if named else f"use {RECOGNISED}"
    raise WWMonitorError(f"walk_files: expected weights in {str(folder)!r}, found none; {hint}")


def _weights_in(folder: Path) -> Files:
    for pattern in _IN_FOLDER:
        whole = folder / pattern.replace("*", "")
        if whole.is_file():
            rest = [
                file.name for file in sorted(folder.glob(pattern)) if file != whole and not _SHARD.search(file.name)
            ]
            return Files((whole,), f"walk_files: read {whole.name}, left out {', '.join(rest)}" if rest else "")
        # The shortest is the plain one, before those of a variant (.index.fp16.json).
        indices = sorted(folder.glob(f"{pattern}.index*.json"), key=lambda index: (len(index.name), index.name))
        if indices:
            return Files(_shards(indices[0]), indexed=True)
        if files := sorted(folder.glob(pattern)):
            return Files(tuple(map(check_regular, files)), _said_of_parts(files))
    return Files(())


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all in its folder."""
    if check_regular(index).stat().st_size > _MOST_INDEX:
        raise WWMonitorError(f"walk_files: expected an index of at most {_MOST_INDEX} bytes, got {index}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WWMonitorError(f"walk_files: expected a `weight_map` from tensors to files in {index}") from error
    for name in names:
        # Of both systems: a name that stays in the folder on one may leave it on the other.
        kinds = (PurePosixPath(name), PureWindowsPath(name)) if isinstance(name, str) and name else ()
        if not kinds or any(kind.anchor or ".." in kind.parts for kind in kinds):
            raise WWMonitorError(f"walk_files: expected files in the folder of {index}, got {str(name)[:200]!r}")
        if not (index.parent / name).is_file():
            raise NoSuchFile(f"walk_files: {index.name} names {name!r}, which is not in {index.parent}")
    return tuple(index.parent / name for name in sorted(names))


def _said_of_parts(files: list[Path]) -> str:
    """Which parts of a model are not there, where the names tell that the files are parts."""
    parts = [match for file in files if (match := _SHARD.search(file.name))]
    if not parts or len(parts) >= int(parts[0][2]):
        return ""
    numbers = ", ".join(str(int(part[1])) for part in parts)
    total = int(parts[0][2])
    return f"walk_files: read part {numbers} of {total} of a model ({files[0].name}); give its folder or index for all"
