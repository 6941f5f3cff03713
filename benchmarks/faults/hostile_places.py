"""Hostile files and places: lying headers, indices and configurations, pipes and links, bombs, HDF5."""

from __future__ import annotations

import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import safetensors.torch
import torch

from benchmarks.faults.hostile_pickles import Case, sound_zip, written

# --- safetensors, indices, folders


def headers() -> Iterator[Case]:
    """Lies of a safetensors file."""

    def tensor(shape: object = (8, 8), offsets: object = (0, 256), dtype: object = "F32") -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    big = 1 << 62
    cases: dict[str, object] = {
        "outside": tensor(offsets=(0, 10**9)),
        "backward": tensor(offsets=(256, 0)),
        "negative": tensor(offsets=(-1, 255)),
        "huge shape": tensor((big, big)),
        "negative shape": tensor((-8, -8)),
        "small": tensor((8, 9)),
        "text": tensor("8"),
        "type": tensor(dtype="X9"),
        "no type": tensor(dtype=None),
        "hole": tensor((8, 4), (128, 256)),
        "float": tensor((8.5, 8)),
        "list": [],
        "null": None,
        "zero": tensor((0, 8), (0, 0)),
        "deep": json.loads("[" * 500 + "]" * 500),
        "axes": tensor([1] * 5000, (0, 4)),
        "no offsets": {"dtype": "F32", "shape": [8, 8]},
        "four bits": tensor(dtype="F4"),
    }
    for what, entry in cases.items():
        text = json.dumps({"fc.weight": entry}).encode()
        yield f"header {what}", lambda folder, text=text: _with_header(folder, len(text), text)
    for what, (size, text) in {
        "long": (1 << 60, b"{}"),
        "longer than the file": (5000, b"{}"),
        "zero": (0, b""),
        "no json": (4, b"abcd"),
        "twice": (0, b""),
        "not utf-8": (4, b"\xff\xfe{}"),
        "very deep": (200_000, b"[" * 100_000 + b"]" * 100_000),
        "many": (0, b""),
    }.items():
        yield f"header {what}", lambda folder, size=size, text=text: _with_header(folder, size, text)
    entry = json.dumps(tensor()).encode()
    same = b'{"a.weight":' + entry + b',"b.weight":' + entry + b"}"
    yield "header overlap", lambda folder: _with_header(folder, len(same), same)


def _with_header(folder: Path, size: int, text: bytes) -> Path:
    return written(folder / "net.safetensors", struct.pack("<Q", size) + text + bytes(256))


def indices() -> Iterator[Case]:
    """Index files, and configurations of adapters."""
    names = [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "..",
        ".",
        "",
        "\0",
        "x" * 300,
        "C:\\x",
        "\\\\host\\x",
        3,
        None,
        [],
        {},
        "missing",
    ]
    texts = {repr(name)[:20]: json.dumps({"weight_map": {"fc.weight": name}}) for name in names}
    texts |= {
        "deep": "[" * 200_000,
        "deep map": '{"weight_map":' * 50_000,
        "list": "[]",
        "number": "1e999",
        "no map": "{}",
    }
    texts |= {"itself": json.dumps({"weight_map": {"a": "model.safetensors.index.json"}})}
    for what, text in texts.items():
        yield (
            f"index {what}",
            lambda folder, text=text: written(folder / "model.safetensors.index.json", text.encode()),
        )
        yield (
            f"index in folder {what}",
            lambda folder, text=text: written(folder / "model.safetensors.index.json", text.encode()).parent,
        )
    yield "index huge", _huge_index
    patterns = [
        "(a+)+$",
        "(",
        "(.*)*x",
        "a{1,99999}{1,99999}",
        ".*.*.*.*.*x",
        "[",
        "(?P<a>",
        "\\",
        "(?:a|a)*$",
        3,
        None,
    ]
    configs = [{"lora_alpha": 8, "alpha_pattern": {pattern: 4}} for pattern in patterns]
    configs += [{"lora_alpha": value} for value in ("x", None, [], {})] + [[], 3, None]
    for number, config in enumerate(configs):
        yield f"adapter {number}", lambda folder, config=config: _adapter(folder, json.dumps(config))
    yield "adapter deep", lambda folder: _adapter(folder, '{"a":' * 100_000)


def _huge_index(folder: Path) -> Path:
    path = folder / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    return path


def _adapter(folder: Path, config: str) -> Path:
    name = "a" * 60 + "!"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    safetensors.torch.save_file(factors, folder / "adapter_model.safetensors")
    return written(folder / "adapter_config.json", config.encode()).parent


def places() -> Iterator[Case]:
    """What is no regular file."""

    def linked(target: str) -> Callable[[Path, str], None]:
        return lambda folder, name: (folder / name).symlink_to(target)

    kinds: dict[str, Callable[[Path, str], object]] = {
        "pipe": lambda folder, name: os.mkfifo(folder / name),
        "folder": lambda folder, name: (folder / name).mkdir(),
        "socket": lambda folder, name: socket.socket(socket.AF_UNIX).bind(str(folder / name)),
        "loop": linked("net.pt"),
        "dangling": linked("nothing"),
        "zero": linked("/dev/zero"),
        "null": linked("/dev/null"),
        "up": linked(".."),
        "missing": lambda folder, name: None,
        "unreadable": lambda folder, name: sound_zip(folder / name).chmod(0),
    }
    for what, make in kinds.items():
        for name in (
            "net.pt",
            "net.safetensors",
            "model.safetensors",
            "net.weights.h5",
            "model.safetensors.index.json",
        ):

            def place(folder: Path, make=make, name=name) -> Path:
                make(folder, name)
                return folder if name.startswith("model") else folder / name

            yield f"{what} {name}", place
    yield "name too long", lambda folder: folder / ("x" * 5000 + ".pt")
    yield "zero byte", lambda folder: folder / "a\0.pt"


# --- archives and HDF5


def archives() -> Iterator[Case]:
    """Bombs, and HDF5 that is not what it seems."""
    yield "bomb", lambda folder: _bomb(folder / "net.pt", "net/data.pkl")
    yield "bomb of keras", lambda folder: _bomb(folder / "net.keras", "model.weights.h5")
    yield "no pickle", lambda folder: _zipped(folder / "net.pt", {"net/version": b"3"})
    yield "many entries", lambda folder: _zipped(folder / "net.pt", {f"net/{i}": b"" for i in range(20_000)})
    yield "outside", lambda folder: _zipped(folder / "net.pt", {"../../data.pkl": b"\x80\x02}.", "/x/data/0": b""})
    yield "empty archive", lambda folder: _zipped(folder / "net.pt", {})
    fills: dict[str, Callable[[h5py.File], object]] = {
        "external link": lambda file: file.__setitem__("layers", h5py.ExternalLink("/etc/passwd", "/")),
        "soft loop": lambda file: file.__setitem__("layers", h5py.SoftLink("/layers")),
        "hard loop": lambda file: file.create_group("layers/a").__setitem__("b", file["layers"]),
        "external numbers": lambda file: file.create_dataset("x", (64, 4), "u1", external=[("/etc/passwd", 0, 256)]),
        "large": lambda file: file.create_dataset("layers/d/vars/0", (1 << 20, 1 << 20), "f4"),
        "packed": lambda file: file.create_dataset(
            "layers/d/vars/0", (1 << 14, 1 << 14), "f4", compression="gzip", fillvalue=1.0
        ),
        "deep": lambda file: file.create_group("/".join(["a"] * 3000)),
        "text": lambda file: file.create_dataset("layers/d/vars/0", data=[[b"a", b"b"]] * 20),
        "attribute": lambda file: file.attrs.__setitem__("model_config", "{"),
        "lambda": lambda file: file.attrs.__setitem__(
            "model_config", json.dumps({"class_name": "Lambda", "config": {}})
        ),
        "nothing": lambda file: None,
        "scalar": lambda file: file.create_dataset("layers/d/vars/0", data=3.0),
    }
    for what, fill in fills.items():
        for name in ("net.weights.h5", "net.keras") if what not in ("attribute", "lambda") else ("net.h5",):
            yield f"hdf5 {what} {name}", lambda folder, fill=fill, name=name: _filled(folder, fill, name)


def _bomb(path: Path, name: str) -> Path:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as entry,
    ):
        for _ in range(256):
            entry.write(bytes(1 << 22))
    return path


def _zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def _filled(folder: Path, fill: Callable[[h5py.File], object], name: str) -> Path:
    path = folder / ("inner.h5" if name.endswith(".keras") else name)
    with h5py.File(path, "w") as file:
        fill(file)
    if path.name == name:
        return path
    return _zipped(folder / name, {"config.json": b"{}", "model.weights.h5": path.read_bytes()})
