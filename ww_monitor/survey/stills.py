"""A still: the weights of one optimizer step, copied so that training may go on while they are analysed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.survey.unchanged import Checked

FREE_SHARE = 0.25
"""Share of a GPU's free memory that a still takes when no number of bytes is given; two of them may be alive."""


@dataclass(frozen=True)
class Still:
    """Copies of the weights of one step.

    Attributes:
        step: Optimizer step.
        epoch: Epoch.
        items: The matrices, each loading its copy.
        checked: Which rows need no copy because their weights have not changed.
        copied: One event a GPU, which the copies on it wait for.
    """

    step: int
    epoch: int | None
    items: Sequence[Matrix | Skipped]
    checked: Checked
    copied: Sequence[Any] = ()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Work on the copies: on streams of low priority that begin when the copies are there."""
        with ExitStack() as stack:
            for event in self.copied:
                stream = torch.cuda.Stream(event.device, priority=0)  # type: ignore[no-untyped-call]
                stream.wait_event(event)
                event.synchronize()  # what went to pinned memory is read by the host
                stack.enter_context(torch.cuda.stream(stream))
            yield


@torch.no_grad()
def still(
    items: Sequence[Matrix | Skipped], checked: Checked, *, step: int, epoch: int | None, memory: int | None
) -> Still:
    """Copy the weights of one step, on their device while `memory` lasts, then to the host.

    Args:
        items: The matrices.
        checked: Theirs; a row that holds is not copied.
        step: Optimizer step.
        epoch: Epoch.
        memory: Bytes on the device; `None` for a quarter of what is free.
    """
    copies: list[Matrix | Skipped] = []
    left: dict[torch.device, float] = {}
    for item in items:
        if isinstance(item, Matrix) and item.name not in checked.rows:
            try:
                weights = _copy(item.load(), left, memory)
            except Exception as error:  # noqa: BLE001 - the analysis reports it as this layer's
                copies.append(replace(item, load=partial(_raise, error)))
            else:
                copies.append(replace(item, load=partial(_give, weights)))
        else:
            copies.append(item)
    return Still(step, epoch, copies, checked, [_event(device) for device in left if device.type == "cuda"])


def _copy(weights: torch.Tensor, left: dict[torch.device, float], memory: int | None) -> torch.Tensor:
    device = weights.device
    if device not in left:
        left[device] = float("inf") if device.type == "cpu" else _allowed(device, memory)
    if weights.nbytes <= left[device]:
        left[device] -= weights.nbytes
        return weights.detach().clone()
    pinned = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=device.type == "cuda")
    return pinned.copy_(weights, non_blocking=True)


def _allowed(device: torch.device, memory: int | None) -> float:
    if memory is not None:
        return memory
    return FREE_SHARE * float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0.0


def _event(device: torch.device) -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _give(weights: torch.Tensor) -> torch.Tensor:
    return weights


def _raise(error: Exception) -> torch.Tensor:
    raise error
