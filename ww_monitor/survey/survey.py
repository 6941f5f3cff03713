"""The snapshots of one model, however its weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TypeVar

from ww_monitor.baseline import Baseline
from ww_monitor.distributed import analyze_on_ranks, exchange
from ww_monitor.engine import Options, analyze_matrices, snapshot_of
from ww_monitor.engine.threads import hold_to_one_thread
from ww_monitor.errors import check_choice, check_positive_int
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import Layer, Snapshot
from ww_monitor.schedule import Budget
from ww_monitor.survey.background import Background
from ww_monitor.survey.stills import Still, still
from ww_monitor.survey.unchanged import Unchanged

MODES = ("sync", "async")

Planned = TypeVar("Planned")

STEP_SHARE = 0.1
"""Share of a training step that `layers_per_step="auto"` takes for its layers (our choice: not felt in a step)."""


class Survey:
    """Makes the snapshots of one model; rows of frozen matrices are made once while their weights stay the same.

    Args:
        options: How to analyse.
        budget: Knows how long a training step takes.
        layers_per_step: `"all"`, a number, or `"auto"` for as many as take a tenth of a step.
        mode: `"sync"`, or `"async"` for copies that a thread analyses.
        still_bytes: Memory on the device for such a copy; see `ww_monitor.survey.stills.still`.
        across_ranks: Share the work among the processes of torch.distributed; every look is whole and made at once
            then.
        track_delta: Follow how far each matrix has moved from its weights at the first look.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.
    """

    def __init__(
        self,
        options: Options,
        budget: Budget,
        *,
        layers_per_step: int | str = "all",
        mode: str = "sync",
        still_bytes: int | None = None,
        across_ranks: bool = False,
        track_delta: bool = False,
    ) -> None:
        check_choice("Monitor", "mode", mode, MODES)
        if layers_per_step not in ("all", "auto"):
            check_positive_int("Monitor", "layers_per_step", layers_per_step)
        if still_bytes is not None:
            check_positive_int("Monitor", "still_bytes", still_bytes)
        self.options = options
        self.budget = budget
        self.layers_per_step = layers_per_step
        self.mode = mode
        self.still_bytes = still_bytes
        self.across_ranks = across_ranks
        self.track_delta = track_delta
        self._unchanged = Unchanged()
        self._baseline: Baseline | None = None
        self._read: dict[str, Layer] = {}
        self._seconds_per_cost = float("nan")
        self._background: Background[Still, Snapshot] | None = None

    @property
    def under_way(self) -> bool:
        """Whether some layers of a round have been read and others not."""
        return bool(self._read)

    @property
    def busy(self) -> bool:
        """Whether the background has work."""
        return self._background is not None and not self._background.idle

    def reads_now(self, *, whole: bool) -> bool:
        """Whether a look reads weights before it returns, and so waits for what made them."""
        return whole or self.across_ranks or self.mode == "sync"

    def look(
        self, items: Sequence[Matrix | Skipped], *, step: int, epoch: int | None, whole: bool = False
    ) -> Snapshot | None:
        """Read all layers or the next ones, or hand a copy of them to the background.

        Args:
            items: What a walker yields, after selection.
            step: Optimizer step.
            epoch: Epoch.
            whole: Read all of them now.

        Returns:
            The snapshot, or `None` while it is not complete.
        """
        if self.track_delta and self._baseline is None:
            self._baseline = Baseline.capture(items)
        if self.across_ranks:
            return self._look_on_ranks(items, step, epoch)
        if not self.reads_now(whole=whole):
            self._send(items, step, epoch)
            return None
        snapshot = self._look(items, step, epoch, whole=whole or self.layers_per_step == "all")
        return None if snapshot is None else self._counted(snapshot)

    def _look(self, items: Sequence[Matrix | Skipped], step: int, epoch: int | None, *, whole: bool) -> Snapshot | None:
        start = perf_counter()
        checked = self._unchanged.check(items)
        known, self._read = {**checked.rows, **self._read}, {}
        left = [item for item in items if isinstance(item, Skipped) or item.name not in known]
        now = left if whole else self._portion(left)
        read = analyze_matrices(now, self.options, step=step, epoch=epoch)
        self._unchanged.keep(checked, read.layers)
        self._time(now, perf_counter() - start)
        rows = {**known, **{layer.name: layer for layer in read.layers}}
        if len(now) < len(left):
            self._read = rows
            return None
        snapshot = self._assembled(items, rows, read)
        if self._baseline is not None:
            snapshot = snapshot.with_metrics(self._baseline.drift(items))
        return replace(snapshot, seconds=perf_counter() - start)

    def _look_on_ranks(self, items: Sequence[Matrix | Skipped], step: int, epoch: int | None) -> Snapshot:
        """The same snapshot on every rank, which all look alike."""
        snapshot = analyze_on_ranks(items, self.options, step=step, epoch=epoch)
        return snapshot.with_metrics(self._baseline.drift(items)) if self._baseline is not None else snapshot

    def agreed(self, value: Planned) -> Planned:
        """What the first rank has planned, on every rank; alone, the value itself."""
        return exchange(value, "the plan for the next look")[0] if self.across_ranks else value

    def _portion(self, left: Sequence[Matrix | Skipped]) -> list[Matrix | Skipped]:
        """The next layers of a round, with what is skipped at its end."""
        matrices = [item for item in left if isinstance(item, Matrix)]
        count = self._as_many_as_fit(matrices) if self.layers_per_step == "auto" else int(self.layers_per_step)
        return list(left) if count >= len(matrices) else list(matrices[:count])

    def _as_many_as_fit(self, matrices: Sequence[Matrix]) -> int:
        """How many take a tenth of a step together, at least one, at the rate of the last look."""
        allowed = STEP_SHARE * self.budget.seconds_per_step / self._seconds_per_cost
        total, count = 0.0, 0
        for matrix in matrices:
            total += matrix.cost
            if not total <= allowed:
                break
            count += 1
        return max(1, count)

    def _time(self, items: Sequence[Matrix | Skipped], seconds: float) -> None:
        cost = sum(item.cost for item in items if isinstance(item, Matrix))
        if cost:
            self._seconds_per_cost = seconds / cost

    def _send(self, items: Sequence[Matrix | Skipped], step: int, epoch: int | None) -> None:
        """Copy the weights and let the background analyse them."""
        if self._background is None:
            self._background = Background(self._analyse, prepare=hold_to_one_thread)
        checked = self._unchanged.check(items)
        self._background.put(still(items, checked, step=step, epoch=epoch, memory=self.still_bytes))

    def _analyse(self, taken: Still) -> Snapshot:
        """What the background does, on its thread: it changes nothing here."""
        start = perf_counter()
        with taken.reading():
            moved = {} if self._baseline is None else self._baseline.drift(taken.items)  # while every copy is there
            read = analyze_matrices(
                taken.to_analyse(), self.options, step=taken.step, epoch=taken.epoch, background=True
            )
            rows = {**taken.checked.rows, **{layer.name: layer for layer in read.layers}}
            snapshot = self._assembled(taken.items, rows, read)
            if self._baseline is not None:
                snapshot = snapshot.with_metrics(moved)
        return replace(snapshot, seconds=perf_counter() - start)

    def _assembled(self, items: Sequence[Matrix | Skipped], rows: Mapping[str, Layer], read: Snapshot) -> Snapshot:
        """One snapshot of rows that may have been read at different steps, in the order of the model."""
        layers = [rows[item.name] for item in items if isinstance(item, Matrix)]
        return snapshot_of(layers, read.skipped, self.options, step=read.step, epoch=read.epoch)

    def collect(self) -> Iterator[Snapshot]:
        """What the background has completed, oldest first.

        Raises:
            Exception: what an analysis raised, when its turn comes.
        """
        for done in self._background.finished() if self._background is not None else []:
            if done.error is not None:
                raise done.error
            if done.result is not None:
                self._unchanged.keep(done.job.checked, done.result.layers)
                yield self._counted(done.result)

    def _counted(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the number of dropped ones, where the background may drop some."""
        if self.mode != "async":
            return snapshot
        dropped = 0 if self._background is None else self._background.dropped
        return replace(snapshot, summary={**snapshot.summary, "snapshots_dropped": float(dropped)})

    def join(self, timeout: float) -> bool:
        """Wait for the background; false if it takes longer."""
        return self._background is None or self._background.join(timeout)

    def close(self, timeout: float) -> None:
        """Give up what waits for the background, and wait for what it is at."""
        if self._background is not None:
            self._background.close(timeout)

    def restart(self) -> None:
        """Forget what was seen and what is under way: another run begins."""
        self.close(0.0)
        self._background = None
        self._unchanged, self._baseline, self._read = Unchanged(), None, {}
