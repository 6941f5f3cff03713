"""The browser in which tests look at pages."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ww_monitor import Monitor
from ww_monitor.walk.torch import walk

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

NEEDS_A_BROWSER = [
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="the pages are looked at in a browser; `apt-get install chromium`, or put one of "
        f"{', '.join(BROWSERS)} on the PATH",
    ),
    # the browser's driver leaves its event loop to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def train(monitor_of: Callable[[nn.Module], Monitor]) -> Monitor:
    """A few steps with the monitor looking; an entry of `encoder.2` is set to make a trap on the way."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64)), "head": nn.Linear(64, 24)}
    )
    monitor, optimizer = monitor_of(net), torch.optim.SGD(net.parameters(), lr=0.5)
    x, y = torch.randn(64, 48), torch.arange(64) % 24
    for step in range(41):
        if monitor.due(step):
            monitor.observe(walk(net), step=step)
        if step == 22:
            with torch.no_grad():
                net["encoder"][2].weight[3, 4] = 3.0
        optimizer.zero_grad()
        nn.functional.cross_entropy(net["head"](net["encoder"](x)), y).backward()
        optimizer.step()
    monitor.close()
    return monitor
