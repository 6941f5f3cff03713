"""Snapshots into TensorBoard: scalars under the shared keys, and a histogram of log10 λ a layer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from ww_monitor.errors import MissingDependency
from ww_monitor.record import Histogram, Snapshot


class TensorBoard:
    """Writes with a `torch.utils.tensorboard.SummaryWriter`.

    Args:
        target: A log folder, for which a writer is made and closed; or a writer, which stays its owner's.

    Raises:
        MissingDependency: if tensorboard is not installed.
    """

    def __init__(self, target: str | Path | Any) -> None:
        self._owned = isinstance(target, (str, Path))
        self.writer: Any = _summary_writer(str(target)) if self._owned else target

    def write(self, snapshot: Snapshot) -> None:
        """Scalars, then histograms, at the snapshot's step."""
        step = snapshot.step or 0
        for key, value in snapshot.scalars().items():
            self.writer.add_scalar(key, value, step)
        write_histograms(self.writer, snapshot, step)

    def close(self) -> None:
        """Flush; a writer made here is closed."""
        self.writer.flush()
        if self._owned:
            self.writer.close()


def write_histograms(writer: Any, snapshot: Snapshot, step: int) -> None:
    """One histogram of log10 λ a layer, tag `ww_esd/<layer>`."""
    for layer in snapshot.layers:
        if layer.esd is not None:
            _add_histogram(writer, f"ww_esd/{layer.name}", layer.esd, step)


def _add_histogram(writer: Any, tag: str, esd: Histogram, step: int) -> None:
    edges = esd.edges
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    total = sum(esd.counts)
    writer.add_histogram_raw(
        tag,
        min=esd.low,
        max=esd.high,
        num=total,
        sum=sum(c * x for c, x in zip(esd.counts, centres, strict=True)),
        sum_squares=sum(c * x * x for c, x in zip(esd.counts, centres, strict=True)),
        bucket_limits=list(edges[1:]),
        bucket_counts=list(esd.counts),
        global_step=step,
    )


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency("TensorBoard: needs tensorboard; pip install 'ww-monitor[tensorboard]'") from error
    return SummaryWriter(folder)
