"""Address spaces that are tight: where a run survives without the monitor, so it does with it, on two BLAS threads.

    python -m benchmarks.faults.space [--quick]

Each run is a child of one process that has loaded all and used nothing. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import torch

from benchmarks.faults import Counts
from ww_monitor.monitor import Monitor
from ww_monitor.walk.torch import walk

ROOMS = (32, 48, 64, 96, 160, 320)
"""MiB beyond what the process has when training begins."""

OURS = 16
"""Of these, what analyses may need: training alone has so many less."""

SECONDS = 20
"""Of processor time; a run takes one or two, and a library that waits for memory that never comes takes all."""


def train(mode: str, room: int, size: int) -> float:
    """A number that the weights of a run make which ends."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, size))
    optimizer, x = torch.optim.SGD(net.parameters(), 0.1), torch.randn(16, size)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (room << 20)
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    monitor = Monitor(every_n_steps=2, mode=mode) if mode else None  # type: ignore[arg-type]
    for step in range(1, 7):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        if monitor is not None and monitor.due(step):
            monitor.observe(walk(net), step=step)
            monitor.collect()
    if monitor is not None:
        monitor.close()
    return float(net[0].weight.sum())


def trained(mode: str, room: int, size: int) -> str:
    """What a run ends with, in a child; `""` where it does not."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        told = b""
        try:
            told = str(train(mode, room, size)).encode()
        finally:
            os.write(writer, told)
            os._exit(not told)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read().decode()
    return found if os.waitpid(child, 0)[1] == 0 else ""


def survives(room: int, size: int) -> list[bool]:
    """In both modes, where training alone does in less room; else nothing."""
    expected = trained("", room - OURS, size)
    return [trained(mode, room, size) == expected for mode in ("sync", "async")] if expected else []


def run(*, quick: bool) -> Counts:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.faults.space", *["--quick"] * quick]
    ran = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return {"runs in a tight address space": tuple(json.loads(ran.stdout.splitlines()[-1]))}  # type: ignore[dict-item]


def main() -> None:
    quick = "--quick" in sys.argv
    warnings.simplefilter("ignore")
    cases = product((64,) if quick else ROOMS, (600,) if quick else (600, 1200))
    found = []
    for room, size in cases:
        results = survives(room, size)
        found += results
        print(f"{room} MiB, {size} × {size}: {results}", file=sys.stderr, flush=True)
    print(json.dumps([len(found), sum(found)]))


if __name__ == "__main__":
    main()
