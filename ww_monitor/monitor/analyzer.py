"""The snapshots of one model, however its weights are read: now, as copies in the background, or by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

from ww_monitor.baseline import Baseline
from ww_monitor.distributed import FrozenRows, analyze_on_ranks, exchange
from ww_monitor.engine import Options, analyze_matrices, snapshot_of
from ww_monitor.engine.threads import hold_to_one_thread, room_for_blas
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.monitor.background import Background, Done
from ww_monitor.monitor.copies import WeightCopy, copy_weights
from ww_monitor.monitor.frozen import Checked, FrozenRowCache
from ww_monitor.monitor.update import UNKNOWN, Before, Update
from ww_monitor.record import Snapshot
from ww_monitor.settings import RunOptions

Planned = TypeVar("Planned")


class Analyzer:
    """Makes the snapshots of one model; rows of frozen matrices are made once while their weights stay the same.

    Args:
        options: How to analyse.
        run: Its `mode`, `copy_budget_bytes`, `track_delta` and `track_updates`.
        across_ranks: Share the work among the processes of torch.distributed; every analysis is made at once then.
    """

    def __init__(self, options: Options, run: RunOptions, *, across_ranks: bool = False) -> None:
        self.options = options
        self.mode = run.mode
        self.copy_budget_bytes = run.copy_budget_bytes
        self.track_delta, self.track_updates = run.track_delta, run.track_updates
        self.across_ranks = across_ranks
        self._forget()

    def _forget(self) -> None:
        self._frozen_rows, self._frozen_on_ranks = FrozenRowCache(), FrozenRows()
        self._baseline: Baseline | None = None
        self.before: Before | None = None
        self._background: Background[WeightCopy, Snapshot] = Background(self._analyse, prepare=hold_to_one_thread)

    @property
    def busy(self) -> bool:
        """Whether the background has work."""
        return not self._background.idle

    @property
    def lacks_baseline(self) -> bool:
        """Whether distances will count from the weights of the next analysis."""
        return self.track_delta and self._baseline is None

    def reads_now(self, *, whole: bool) -> bool:
        """Whether an analysis reads weights before it returns, and so waits for what made them.

        In a tight address space every one does: training lacks what a thread of the background would take.
        """
        return whole or self.across_ranks or self.mode == "sync" or not room_for_blas(2)

    def analyze(
        self, items: Sequence[Matrix | Skipped], *, step: int, epoch: int | None, whole: bool = False
    ) -> Snapshot | None:
        """Analyse all layers, or hand a copy of them to the background.

        Args:
            items: What a walker yields, after selection.
            step: Optimizer step that the weights belong to.
            epoch: Epoch that the weights belong to, where there is one.
            whole: Analyse now and return the snapshot, whatever the mode.

        Returns:
            The snapshot, or `None` where the background makes it.
        """
        if self.lacks_baseline:
            self._baseline = Baseline.capture(items)
        # over ranks the first decides which rows hold: ranks that differ would wait for one another
        checked = Checked({}, {}) if self.across_ranks else self._frozen_rows.check(items)
        now = self.reads_now(whole=whole)
        update = self._update_to(step, items, copied=not now)
        if now:
            live = WeightCopy(step, epoch, items, checked, update=update)
            return self.completed(Done(live, self._analyse(live, background=False)))
        taken = copy_weights(items, checked, step=step, epoch=epoch, memory=self.copy_budget_bytes)
        self._background.put(replace(taken, update=update))
        return None

    def _update_to(self, step: int, items: Sequence[Matrix | Skipped], *, copied: bool) -> Update | None:
        """The update that led to `step`, if the weights before it are held, which they are no longer then."""
        before, self.before = self.before, None
        if before is None or not before.step < step <= before.until:
            return UNKNOWN if self.track_updates else None
        return before.to(items, copied=copied)

    def agreed(self, value: Planned) -> Planned:
        """What the first rank has planned, on every rank; alone, the value itself."""
        return exchange(value, "the plan for the next analysis")[0] if self.across_ranks else value

    def _analyse(self, taken: WeightCopy, *, background: bool = True) -> Snapshot:
        """The snapshot of one step, whose weights may be copies; it changes nothing here, for the background runs it.

        Rows of frozen matrices that still hold take their places among those that are made now.
        """
        start = perf_counter()
        at: dict[str, Any] = {"step": taken.step, "epoch": taken.epoch}
        with taken.reading():
            moved = None if self._baseline is None else self._baseline.drift(taken.items)  # while every copy is there
            changed = None if taken.update is None else taken.update.changes(taken.items)
            if self.across_ranks:
                frozen = self._frozen_on_ranks
                snapshot = analyze_on_ranks(taken.items, self.options, **at, frozen=frozen)  # the slowest one's seconds
            else:
                read = analyze_matrices(taken.to_analyse(), self.options, **at, background=background)
                rows = {**taken.checked.rows, **{layer.name: layer for layer in read.layers}}
                layers = [rows[item.name] for item in taken.items if isinstance(item, Matrix) and item.name in rows]
                snapshot = snapshot_of(layers, read.skipped, self.options, **at, seconds=perf_counter() - start)
        for values in (moved, changed):
            snapshot = snapshot if values is None else snapshot.with_metrics(values)
        return snapshot

    def next_done(self) -> Done[WeightCopy, Snapshot] | None:
        """What the background has completed and nobody has taken, the oldest; `None` if there is nothing."""
        return self._background.next_done()

    def completed(self, done: Done[WeightCopy, Snapshot]) -> Snapshot:
        """The snapshot of an analysis that is over, with the number of dropped ones where the background may drop some.

        Raises:
            Exception: what the analysis raised.
        """
        snapshot = done.get()
        self._frozen_rows.keep(done.job.checked, snapshot.layers)
        if self.mode != "async":
            return snapshot
        return replace(snapshot, summary={**snapshot.summary, "snapshots_dropped": float(self._background.dropped)})

    def join(self, timeout: float) -> bool:
        """Wait for the background; false if it takes longer."""
        return self._background.join(timeout)

    def close(self, timeout: float) -> None:
        """Give up what waits for the background, and wait for what it is at."""
        self._background.close(timeout)

    def restart(self) -> None:
        """Forget what was seen and what is under way: another run begins."""
        self.close(0.0)
        self._forget()
