"""Hostile files that torch may have written: damaged ones, garbage, pickles with code, bombs, odd contents."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import safetensors.torch
import torch
from torch import nn

TENSORS = {"fc.weight": torch.randn(24, 16), "fc.bias": torch.randn(24), "out.weight": torch.randn(9, 24)}
TORCH = ("bin", "pt", "pth", "ckpt")

Case = tuple[str, Callable[[Path], Path]]
"""A name, and a function that makes the file in a folder of its own and returns its path."""


# --- sound files, to be damaged


def sound_zip(path: Path) -> Path:
    torch.save(TENSORS, path)
    return path


def _legacy(path: Path) -> Path:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    return path


def _script(path: Path) -> Path:
    torch.jit.trace(nn.Linear(16, 24), torch.ones(1, 16)).save(str(path))
    return path


def _safetensors(path: Path) -> Path:
    safetensors.torch.save_file(TENSORS, path)
    return path


def _hdf5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = TENSORS["fc.weight"].numpy()
    return path


SOUND = {
    "zip": (sound_zip, "net.pt"),
    "legacy": (_legacy, "net.pt"),
    "script": (_script, "net.pt"),
    "safetensors": (_safetensors, "net.safetensors"),
    "hdf5": (_hdf5, "net.weights.h5"),
}


def damaged() -> Iterator[Case]:
    """Cut, changed in places, prolonged."""
    for kind, (write, name) in SOUND.items():

        def edit(change: Callable[[bytes], bytes], write=write, name=name) -> Callable[[Path], Path]:
            def make(folder: Path) -> Path:
                path = write(folder / name)
                path.write_bytes(change(path.read_bytes()))
                return path

            return make

        for cut in (1, 2, 8, 30, 100, 333):
            yield f"{kind} cut by {cut}", edit(lambda data, cut=cut: data[:-cut])
        for left in (0, 1, 7, 8, 9, 64, 200):
            yield f"{kind} cut to {left}", edit(lambda data, left=left: data[:left])
        yield f"{kind} cut to half", edit(lambda data: data[: len(data) // 2])
        yield f"{kind} twice", edit(lambda data: data + data)
        yield f"{kind} shifted", edit(lambda data: b"\0" + data)
        for seed in range(16):
            yield f"{kind} changed {seed}", edit(lambda data, seed=seed: _changed(data, seed))


def _changed(data: bytes, seed: int) -> bytes:
    """Some bytes replaced, most of them in the first and last 600, where the structure is."""
    draw, edited = random.Random(seed), bytearray(data)
    for _ in range(1 + seed % 8):
        place = draw.choice([draw.randrange(min(600, len(data))), -1 - draw.randrange(min(600, len(data)))])
        edited[place] = draw.randrange(256)
    return bytes(edited)


def garbage() -> Iterator[Case]:
    """Anything under a name of ours."""
    contents = {
        "empty": b"",
        "text": b"hello\n" * 40,
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "json": b'{"a": 1}',
        "pickle": pickle.dumps({"a": 1}),
        "random": random.Random(0).randbytes(5000),
    }
    names = (
        *(f"net.{end}" for end in TORCH),
        "net.pth.tar",
        "net.safetensors",
        "net.weights.h5",
        "model.safetensors.index.json",
    )
    for what, content in contents.items():
        for name in names:
            yield f"{what} as {name}", lambda folder, name=name, content=content: written(folder / name, content)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- pickles


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def _calls() -> dict[str, object]:
    trace = "import os; open(os.environ['TRACE'], 'w')"
    return {
        "exec": Call(exec, trace),
        "eval": Call(eval, "open(__import__('os').environ['TRACE'], 'w')"),
        "system": Call(os.system, "touch $TRACE"),
        "popen": Call(os.popen, "touch $TRACE"),
        "subprocess": Call(subprocess.call, ["sh", "-c", "touch $TRACE"]),
        "import": Call(importlib.import_module, "this"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "partial": Call(functools.partial(os.system, "touch $TRACE")),
        "compile": Call(compile, trace, "", "exec"),
        "load": Call(torch.load, "/nowhere"),
        "module": nn.Linear(3, 3),
        "bytearray": Call(bytearray, 10**11),
    }


def _raw() -> dict[str, bytes]:
    """Pickles by their operations."""
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    )
    return {
        "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep dicts": b"\x80\x02" + b"}X\x05\0\0\0model" * 50_000 + b"N" + b"s" * 50_000 + b".",
        "laughs": laughs + b".",
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 50,
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
        "bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"N.",
        "global": b"\x80\x02cposix\nsystem\nX\x0c\0\0\0touch $TRACE\x85R.",
        "instance": b"\x80\x02(X\x0c\0\0\0touch $TRACEios\nsystem\n.",
        "extension": b"\x80\x02\x82\x01.",
        "no end": b"\x80\x02}",
        "itself": b"\x80\x02}q\0X\x05\0\0\0modelh\0s.",
    }


def pickles() -> Iterator[Case]:
    """Code and bombs in each of three containers."""
    for what, content in _calls().items():
        for legacy in (True, False):
            yield (
                f"call {what} legacy={legacy}",
                lambda folder, content=content, legacy=legacy: _saved(folder, content, legacy),
            )
        yield (
            f"call {what} script",
            lambda folder, c=content: _archive(folder, pickle.dumps({"w": c}, 2), "constants.pkl"),
        )
    for what, data in _raw().items():
        yield f"raw {what}", lambda folder, data=data: written(folder / "net.pt", data)
        yield f"raw {what} zip", lambda folder, data=data: _archive(folder, data, "version")
        yield f"raw {what} script", lambda folder, data=data: _archive(folder, data, "constants.pkl")
    for legacy in (True, False):
        for what, (old, new) in {
            "shape": (b"K\x18K\x10\x86", b"J\xff\xff\xff\x7fK\x10\x86"),
            "negative": (b"K\x18K\x10\x86", b"J\xff\xff\xff\xffK\x10\x86"),
            "storage": (b"M\x80\x01", b"J\xff\xff\xff\x7f"),
            "rank": (b"K\x18K\x10\x86", b"K\x18\x85"),
        }.items():
            yield f"lying {what} legacy={legacy}", lambda folder, *a, o=old, n=new, g=legacy: _lying(folder, o, n, g)


def _saved(folder: Path, content: object, legacy: bool) -> Path:
    torch.save({**TENSORS, "x": content}, folder / "net.pt", _use_new_zipfile_serialization=not legacy)
    return folder / "net.pt"


def _archive(folder: Path, data: bytes, beside: str) -> Path:
    with zipfile.ZipFile(folder / "net.pt", "w") as archive:
        archive.writestr("net/data.pkl", data)
        archive.writestr(f"net/{beside}", b"3\n")
        archive.writestr("net/data/0", bytes(64))
    return folder / "net.pt"


def _lying(folder: Path, old: bytes, new: bytes, legacy: bool) -> Path:
    path = (_legacy if legacy else sound_zip)(folder / "sound.pt")
    if legacy:
        return written(folder / "net.pt", path.read_bytes().replace(old, new))
    with zipfile.ZipFile(path) as sound, zipfile.ZipFile(folder / "net.pt", "w") as archive:
        for name in sound.namelist():
            data = sound.read(name)
            archive.writestr(name, data.replace(old, new) if name.endswith(".pkl") else data)
    return folder / "net.pt"


def contents() -> Iterator[Case]:
    """Files that torch itself writes, with something odd in them."""
    loop: dict[str, object] = {**TENSORS}
    loop["model"] = {"model": loop}
    deep: object = TENSORS
    for _ in range(400):
        deep = {"model": deep}
    odd = {
        "coo": torch.eye(9).to_sparse(),
        "csr": torch.eye(9).to_sparse_csr(),
        "meta": torch.ones(9, 9, device="meta"),
        "expanded": torch.ones(1).expand(10**6, 10**6),
        "complex": torch.ones(9, 9, dtype=torch.complex64),
        "empty": torch.ones(0, 9),
        "many axes": torch.ones([1] * 40),
        "nan": torch.full((9, 9), float("nan")),
    }
    cases = {name: {**TENSORS, f"{name}.weight": tensor} for name, tensor in odd.items()}
    cases |= {f"{name} alone": {f"{name}.weight": tensor} for name, tensor in odd.items()}
    cases |= {
        "loop": loop,
        "deep": deep,
        "list": [TENSORS],
        "numbers": {i: i for i in range(1000)},
        "one": torch.ones(9, 9),
    }
    for name, content in cases.items():
        yield f"content {name}", lambda folder, content=content: _saved_alone(folder, content)


def _saved_alone(folder: Path, content: object) -> Path:
    torch.save(content, folder / "net.pt")
    return folder / "net.pt"
