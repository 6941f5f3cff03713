"""A still: the weights of one optimizer step, copied so that training may go on while they are analysed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.monitor.frozen import Checked
from ww_monitor.monitor.update import Update

FREE_SHARE = 0.25
"""Share of a GPU's free memory that a still takes when no number of bytes is given; two of them may be alive."""


@dataclass(frozen=True)
class WeightCopy:
    """The weights of one step: copies of them, or the live ones where there are none.

    Attributes:
        step: Optimizer step that the weights belong to.
        epoch: Epoch that the weights belong to, where there is one.
        items: The matrices, each loading its copy.
        checked: Which rows need no copy because their weights have not changed.
        copies: The copies, by the names of their matrices.
        copied: One event a GPU, which the copies on it wait for.
        update: The optimizer step that led there, where it is measured.
    """

    step: int
    epoch: int | None
    items: Sequence[Matrix | Skipped]
    checked: Checked
    copies: Mapping[str, _Copy] = field(default_factory=dict)
    copied: Sequence[Any] = ()
    update: Update | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Work on the copies: on streams of low priority that begin when the copies are there."""
        with ExitStack() as stack:
            for event in self.copied:
                # 0 is CUDA's lowest; training's own has it too, unless it asks for more
                stream = torch.cuda.Stream(event.device, priority=0)  # type: ignore[no-untyped-call]
                stream.wait_event(event)
                event.synchronize()  # what went to pinned memory is read by the host
                stack.enter_context(torch.cuda.stream(stream))
            try:
                yield
            finally:
                for copy in self.copies.values():
                    copy.drop()

    def to_analyse(self) -> list[Matrix | Skipped]:
        """The matrices that have no row yet; each copy is freed when whoever loads it has done with it."""
        left = (item for item in self.items if item.name not in self.checked.rows)
        return [
            replace(item, load=self.copies[item.name].give)
            if isinstance(item, Matrix) and item.name in self.copies
            else item
            for item in left
        ]


class _Copy:
    """A copy of one matrix' weights, held until it is given away; it can be looked at while anyone holds it."""

    def __init__(self, weights: torch.Tensor) -> None:
        self._held: torch.Tensor | None = weights
        self._known = weakref.ref(weights)

    def peek(self) -> torch.Tensor:
        weights = self._known()
        if weights is None:
            raise RuntimeError("expected one load of a copied weight; its memory is free after that")
        return weights

    def give(self) -> torch.Tensor:
        weights = self.peek()
        self.drop()
        return weights

    def drop(self) -> None:
        if self._held is not None and self._held.device.type == "cuda":  # training's stream must not reuse it too early
            self._held.record_stream(torch.cuda.current_stream(self._held.device))
        self._held = None


@torch.no_grad()
def copy_weights(
    items: Sequence[Matrix | Skipped], checked: Checked, *, step: int, epoch: int | None, memory: int | None
) -> WeightCopy:
    """Copy the weights of one step, on their device while `memory` lasts, then to the host.

    Args:
        items: The matrices to analyse, as a walker yields them.
        checked: What is known of the frozen ones among them; a matrix whose row holds is not copied.
        step: Optimizer step that the weights belong to.
        epoch: Epoch that the weights belong to, where there is one.
        memory: Bytes on the device; `None` for a quarter of what is free.
    """
    copies: dict[str, _Copy] = {}
    taken: list[Matrix | Skipped] = []
    left: dict[torch.device, float] = {}
    for item in items:
        if isinstance(item, Matrix) and item.name not in checked.rows:
            try:
                weights = _copy(item.load(), left, memory)
            except Exception as error:  # noqa: BLE001 - the analysis reports it as this layer's
                taken.append(replace(item, load=partial(_raise, error)))
            else:
                copies[item.name] = _Copy(weights)
                taken.append(replace(item, load=copies[item.name].peek))
                del weights  # or the last one would be held here
        else:
            taken.append(item)
    return WeightCopy(step, epoch, taken, checked, copies, [_event(device) for device in left if device.type == "cuda"])


def _copy(weights: torch.Tensor, left: dict[torch.device, float], memory: int | None) -> torch.Tensor:
    device = weights.device
    if device not in left:
        left[device] = float("inf") if device.type == "cpu" else _allowed(device, memory)
    if weights.nbytes <= left[device]:
        left[device] -= weights.nbytes
        return weights.detach().clone()
    # only into pinned memory does CUDA copy while the host goes on
    pinned = torch.empty(weights.shape, dtype=weights.dtype, device="cpu", pin_memory=device.type == "cuda")
    return pinned.copy_(weights, non_blocking=True)


def _allowed(device: torch.device, memory: int | None) -> float:
    if memory is not None:
        return memory
    return FREE_SHARE * _free(device) if device.type == "cuda" else 0.0


def _free(device: torch.device) -> float:
    """Bytes that an allocation can have: what torch has reserved and not allocated counts as free too."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + idle)


def _event(device: torch.device) -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _raise(error: Exception) -> torch.Tensor:
    raise error
