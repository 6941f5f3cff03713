"""What training has queued on its accelerators: waited for before the time of the monitor's own work counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch


def wait_for_queued() -> float:
    """Wait for the current stream of every accelerator in use; how many seconds that took.

    An analysis that reads weights now waits for them anyway. What this process has not used is left alone.
    """
    start = perf_counter()
    for wait in _waits(_accelerator()):
        wait()
    return perf_counter() - start


def _accelerator() -> Any:
    """`torch.cuda` or the like of it, `None` if there is none."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda
    known = getattr(torch, "accelerator", None)  # from torch 2.6 on
    kind = None if known is None else known.current_accelerator()
    return None if kind is None else torch.get_device_module(kind)


def _waits(module: Any) -> Iterator[Callable[[], object]]:
    if hasattr(module, "is_initialized"):
        if module.is_initialized():
            for number in range(module.device_count()):
                if module.memory_reserved(number):  # a stream of another device would put a context there
                    yield module.current_stream(number).synchronize
    elif hasattr(module, "current_allocated_memory") and module.current_allocated_memory():  # one device: MPS
        yield module.synchronize
