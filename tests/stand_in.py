"""A device that solves its own matrices, here on the host's tensors: it records what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ww_monitor.spectra.device import ACCELERATORS, Accelerator


@dataclass
class Asked:
    """What the engine has asked of the device.

    Attributes:
        singles: Side of each matrix that was solved alone.
        batches: Side and number of each batch.
        reads: How many tensors the host has read, one entry a read.
    """

    singles: list[int] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)


def use_stand_in(monkeypatch, *, free=1 << 34, refusal="", latency=0.0, solve=None):
    """Let every tensor of the host count as one of a device that solves its own matrices.

    Args:
        monkeypatch: Undoes it.
        free: Bytes that the device has.
        refusal: Why it solves none.
        latency: Seconds that it says it takes for a short side.
        solve: In place of its solver.
    """
    asked = Asked()

    class StandIn(Accelerator):
        def refusal(self):
            return refusal

        def free_memory(self):
            return free

        def allocated(self):
            return 0

        def seconds(self, side, count):
            return latency

        def single(self, gram):
            asked.singles.append(len(gram))
            return (solve or torch.linalg.eigvalsh)(gram)

        def batched(self, gram):
            asked.batches.append((gram.shape[-1], len(gram)))
            return (solve or torch.linalg.eigvalsh)(gram)

        def read(self, tensors):
            asked.reads.append(len(tensors))
            return super().read(tensors)

    monkeypatch.setitem(ACCELERATORS, "cpu", StandIn)
    return asked
