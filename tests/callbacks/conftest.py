"""A small net for every callback, and a reader of what an offline W&B run wrote."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def make_net(*, trap: bool = False) -> nn.Sequential:
    """Three matrices 0, 2 and 4; with `trap` an entry of matrix 2 far above the size that makes an outlier."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    if trap:
        with torch.no_grad():
            net[2].weight[3, 4] = 2.0
    return net


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def net_with_trap() -> nn.Sequential:
    return make_net(trap=True)


@pytest.fixture
def read_wandb() -> Callable[[Path], dict[str, list[Any]]]:
    """The history and metric records of the one offline run in a folder, read after it has been finished."""

    def read(folder: Path) -> dict[str, list[Any]]:
        (path,) = folder.glob("**/*.wandb")
        for _ in range(200):
            records = list(_records(path.read_bytes()))
            if any(record.WhichOneof("record_type") == "exit" for record in records):
                break
            time.sleep(0.05)
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
        return {"rows": rows, "steps": [(metric.glob_name or metric.name, metric.step_metric) for metric in metrics]}

    return read


def _records(data: bytes) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file: a LevelDB log of 32 KiB blocks after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    position, block, whole = 7, 32768, b""
    while position + 7 <= len(data):
        left = block - position % block
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or (size == 0 and kind == 0):
            position += left
            continue
        whole = (b"" if kind in (1, 2) else whole) + data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)


@pytest.fixture(scope="session")
def make_trap_net() -> Callable[..., nn.Sequential]:
    """The maker of `net_with_trap` (or, with False, of `net`), for tests that train more than one."""
    return lambda trap=True: make_net(trap=trap)
