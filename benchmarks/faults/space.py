"""Address spaces that are tight: where a run survives without the monitor, so it does with it, on two BLAS threads."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from benchmarks.faults import Counts

SCRIPT = """
import resource, sys, torch
from pathlib import Path
from ww_monitor.monitor import Monitor
from ww_monitor.walk.torch import walk
mode, room, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, size))
optimizer, x = torch.optim.SGD(net.parameters(), 0.1), torch.randn(16, size)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (room << 20)
resource.setrlimit(resource.RLIMIT_AS, (used, used))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
monitor = Monitor(every_n_steps=2, mode=mode) if mode else None
for step in range(1, 7):
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
    if monitor is not None and monitor.due(step):
        monitor.observe(walk(net), step=step)
        monitor.collect()
if monitor is not None:
    monitor.close()
print(float(net[0].weight.sum()))
"""

ROOMS = (32, 48, 64, 96, 160, 320)
"""MiB beyond what the process has when training begins."""

OURS = 16
"""Of these, what analyses may need: training alone has so many less."""


def trained(mode: str, room: int, size: int) -> str:
    """What a run ends with; `""` where it does not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, mode, str(room), str(size)]
    ran = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    return ran.stdout if ran.returncode == 0 else ""


def run(*, quick: bool) -> Counts:
    cases = list(product((64,) if quick else ROOMS, (600,) if quick else (600, 1200)))
    with ThreadPoolExecutor(2) as two:
        found = [one for some in two.map(lambda case: survives(*case), cases) for one in some]
    return {"runs in a tight address space": (len(found), sum(found))}


def survives(room: int, size: int) -> list[bool]:
    """In both modes, where training alone does in less room; else nothing."""
    expected = trained("", room - OURS, size)
    return [trained(mode, room, size) == expected for mode in ("sync", "async")] if expected else []
