"""A small net for every callback."""

from __future__ import annotations

from collections.abc import Callable

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


@pytest.fixture(scope="session")
def make_trap_net() -> Callable[..., nn.Sequential]:
    """The maker of `net_with_trap` (or, with False, of `net`), for tests that train more than one."""
    return lambda trap=True: make_net(trap=trap)
