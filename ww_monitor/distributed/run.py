"""The analysis of one model by all ranks that hold it: list, assign, move shards in rounds, analyse, gather."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from ww_monitor.distributed.frozen import FrozenRows
from ww_monitor.distributed.inventory import Held, describe
from ww_monitor.distributed.orders import Decision, Orders, RankResult, Task
from ww_monitor.distributed.ranks import Ranks, ranks_of, several
from ww_monitor.distributed.shards import Shipment, deliver_all
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.engine.measure import layer_of_gram
from ww_monitor.errors import RankFailed, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import UNREAD, Layer, Snapshot

Found = TypeVar("Found")


def analyze_on_ranks(
    items: Iterable[Matrix | Skipped],
    options: Options,
    *,
    group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
    step: int | None = None,
    epoch: int | None = None,
    frozen: FrozenRows | None = None,
) -> Snapshot:
    """The snapshot of a model that several ranks hold, without findings; the same on every rank, bit for bit.

    A collective: every rank of the group calls it, each with what its own walker yields. Each matrix has one owner,
    assigned by cost among the ranks that hold it; replicas are analysed once. Shards travel to the owner a block at a
    time: into its Gram matrix where each has the whole short side and nothing else is asked of the weights, else the
    matrix is put together there, one at a time. What differs between ranks under one name is named `name@rank<r>`.
    Without `torch.distributed`, or with one rank, it is `analyze_matrices`.

    Args:
        items: What the walker of this rank yields, after selection.
        options: How to analyse; the same on every rank.
        group: The ranks that analyse; `None` for all.
        timeout: Seconds that a rank waits for another, which may have a matrix more to analyse. The first call with a
            group and a timeout makes a gloo group of the same ranks; no group of the caller's changes.
        step: Optimizer step the weights belong to.
        epoch: Epoch they belong to.
        frozen: The rows that earlier calls have found of frozen matrices. While their weights stay the same they are
            neither sent nor analysed again; new ones are added. Given on every rank or on none.

    Returns:
        The snapshot, with the seconds of the slowest rank. The row of a layer that could not be read or analysed has
        the status `error: … on rank <r>`.

    Raises:
        RankFailed: if a rank is not heard of in time, naming it and what it last did; from then on at once.
        LayerError: if `options.strict` and a layer fails, on every rank.
        WWMonitorError: if shards lie outside the group, or a rank does not list what others hold with it.
    """
    if not several(group):
        return analyze_matrices(items, options, step=step, epoch=epoch)
    with torch.no_grad():
        return _Analysis(ranks_of(group, timeout), options, step).run(items, epoch, frozen)


@dataclass
class _Analysis:
    """One rank's part of one analysis."""

    ranks: Ranks
    options: Options
    step: int | None
    items: Sequence[Matrix | Skipped] = ()
    rows: dict[str, Layer] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def run(self, items: Iterable[Matrix | Skipped], epoch: int | None, frozen: FrozenRows | None) -> Snapshot:
        start = time.perf_counter()
        decision, orders = self._ordered(items, frozen)
        for device in orders.devices:
            self.ranks.open(device)
        for tasks in orders.rounds:
            self._round(tasks)
        alone = [self._announced(self._matrix(task)) for task in orders.alone]
        self._keep(partial(self._rows_of, alone))
        result = RankResult(self.rows, self.unread, self.failure, time.perf_counter() - start)
        results = self.ranks.gather(result, "the rows of the others")
        said = _tried(lambda: decision.snapshot(results, epoch)) if decision is not None else None
        heard: Snapshot | Exception = self.ranks.broadcast(said, "the rows of the others")
        if isinstance(heard, Exception):
            raise heard
        return heard

    # --- who does what

    def _ordered(self, items: Iterable[Matrix | Skipped], frozen: FrozenRows | None) -> tuple[Decision | None, Orders]:
        """What this rank has to do, and on the first rank what all do; where one could not list, an error on all."""
        self.ranks.check()
        self.ranks.heartbeat("listing its matrices")
        failure: Exception | None = None
        mine: list[Held] = []
        try:
            self.items = list(items)
            mine = describe(self.items, self.ranks.rank, self.ranks.members)
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        said = mine, "" if failure is None else f"{type(failure).__name__}: {failure}"
        heard = self.ranks.gather(said, "the lists of the others")
        decision = _tried(lambda: self._decided(heard, frozen)) if heard else None
        if isinstance(decision, Exception):
            orders = [Orders(error=decision)] * self.ranks.world
        else:
            orders = [] if decision is None else decision.orders()
        own = self.ranks.scatter(orders, "what it has to do")
        to_raise = failure or own.error  # who failed raises its own, the others what the first rank says of it
        if to_raise is not None:
            raise to_raise
        return (None if isinstance(decision, Exception) else decision), own

    def _decided(self, heard: Sequence[tuple[list[Held], str]], frozen: FrozenRows | None) -> Decision:
        for rank, (_, reason) in enumerate(heard):
            if reason:
                raise RankFailed(f"analysis over {len(heard)} ranks: rank {rank} could not list its matrices: {reason}")
        return Decision([held for held, _ in heard], self.options, frozen, self.step)

    def _matrix(self, task: Task) -> Matrix:
        """The matrix of a task as the walker of this rank gave it, under the name of its row."""
        item = self.items[task.place]
        assert isinstance(item, Matrix)
        return replace(item, name=task.name)

    def _announced(self, matrix: Matrix) -> Matrix:
        def load() -> torch.Tensor:
            self.ranks.heartbeat(f"analysing layer {matrix.name!r}")
            return matrix.load()

        return replace(matrix, load=load)

    # --- matrices in shards

    def _round(self, tasks: Sequence[Task]) -> None:
        """Bring at most one matrix to each owner; then all owners analyse theirs."""
        analyse: Callable[[], Sequence[Layer]] | None = None
        for task in tasks:
            if task.delivery is None:
                analyse = self._read_together(task) or analyse
        shipments = {
            task.owner: Shipment(self._matrix(task), task.delivery, self.ranks.rank)
            for task in tasks
            if task.delivery is not None
        }
        deliver_all(self.ranks, shipments)
        for shipment in shipments.values():
            if shipment.error:
                self._cannot(shipment.matrix, shipment.error)
        own = next((task for task in tasks if task.owner == self.ranks.rank and task.delivery is not None), None)
        if own is not None:
            analyse = self._arrived(shipments.pop(self.ranks.rank), own)
        del shipments
        if analyse is not None:
            self._keep(analyse)

    def _read_together(self, task: Task) -> Callable[[], Sequence[Layer]] | None:
        """Read a matrix that only all of its ranks can read, which then all hold for a moment; the owner keeps it."""
        matrix = self._matrix(task)
        self.ranks.heartbeat(f"reading its shard of layer {matrix.name!r}")
        try:
            weights = matrix.load()
        except Exception as error:  # noqa: BLE001 - the others go on, whatever happens here
            self._cannot(matrix, f"{type(error).__name__}: {error}")
            return None
        return partial(self._rows_of, [_loaded(matrix, weights)]) if task.owner == self.ranks.rank else None

    def _arrived(self, shipment: Shipment, task: Task) -> Callable[[], Sequence[Layer]] | None:
        """What analyses a matrix of which all shards have come."""
        arrived, matrix, sums = shipment.end(), shipment.matrix, task.sums
        if arrived is None or shipment.error:
            return None
        if sums is None:
            return partial(self._rows_of, [_loaded(matrix, arrived)])
        dtype = shipment.piece.dtype
        return lambda: [layer_of_gram(matrix, arrived, sums, dtype, self.options, step=self.step)]

    def _cannot(self, matrix: Matrix, error: str) -> None:
        self.unread[matrix.name] = f"{error} on rank {self.ranks.rank}"

    # --- rows

    def _rows_of(self, matrices: Sequence[Matrix]) -> Sequence[Layer]:
        found = analyze_matrices(matrices, self.options, step=self.step)
        for item in found.skipped:
            self.unread[item.name] = f"{item.reason.removeprefix(f'{UNREAD}: ')} on rank {self.ranks.rank}"
        return found.layers

    def _keep(self, analyse: Callable[[], Sequence[Layer]]) -> None:
        """Analyse; what fails is told at the end, for until then the others count on this rank."""
        try:
            self.rows.update((row.name, row) for row in analyse())
        except Exception as error:  # noqa: BLE001 - raised on every rank by the first one's snapshot
            self.failure = self.failure or str(error)


def _loaded(matrix: Matrix, weights: torch.Tensor) -> Matrix:
    return replace(matrix, load=lambda: weights, shards=None)


def _tried(step: Callable[[], Found]) -> Found | Exception:
    """What the first rank concludes, or an error that it can send to the others."""
    try:
        return step()
    except WWMonitorError as error:
        return error
    except Exception as error:  # noqa: BLE001 - raised on every rank, or the others would wait for this one
        return WWMonitorError(f"analysis over ranks: {type(error).__name__}: {error}")
