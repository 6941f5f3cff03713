"""What the first rank concludes from what all hold: who does what, and in the end the snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ww_monitor.distributed.assign import assign_owners, rounds
from ww_monitor.distributed.frozen import FrozenRows
from ww_monitor.distributed.inventory import Held, Job, merge
from ww_monitor.distributed.layout import Delivery, delivery_of, sums_of
from ww_monitor.engine import Options, snapshot_of
from ww_monitor.engine.rows import unread
from ww_monitor.errors import LayerError, WWMonitorError
from ww_monitor.record import Layer, Skipped, Snapshot
from ww_monitor.spectra.elements import Moments


@dataclass(frozen=True)
class Task:
    """What one rank has to do for one matrix.

    Attributes:
        name: The row's name in the snapshot.
        place: Position of the matrix in what the walker of this rank yields.
        owner: The rank that analyses it.
        delivery: How its shards come to the owner; `None` where all of it lies there, or must be read by all together.
        sums: Over its entries, for the owner of a matrix that arrives as a Gram matrix.
    """

    name: str
    place: int
    owner: int
    delivery: Delivery | None = None
    sums: Moments | None = None


@dataclass
class Orders:
    """What one rank has to do.

    Attributes:
        rounds: Matrices in shards; at most one of each owner in a round.
        alone: Matrices that lie whole on this rank and are analysed here.
        devices: The types of device that weights travel between, on any rank.
        error: What all ranks must raise instead.
    """

    rounds: list[list[Task]] = field(default_factory=list)
    alone: list[Task] = field(default_factory=list)
    devices: tuple[str, ...] = ()
    error: Exception | None = None


@dataclass(frozen=True)
class RankResult:
    """What a rank has found: rows, what it could not read, what ended its work, and its seconds."""

    rows: dict[str, Layer]
    unread: dict[str, str]
    failure: str
    seconds: float


class Decision:
    """Who does what in one analysis, and the snapshot that comes of it; on the first rank only.

    Args:
        lists: What each rank holds.
        options: How to analyse.
        frozen: Rows that may still hold.
        step: Optimizer step the weights belong to.

    Raises:
        WWMonitorError: if a rank does not list what others hold with it.
    """

    def __init__(
        self, lists: Sequence[Sequence[Held]], options: Options, frozen: FrozenRows | None, step: int | None
    ) -> None:
        self._options, self._frozen, self._step = options, frozen, step
        self._world = len(lists)
        self._listed, self._skipped = merge(lists)
        rows = {job.name: None if frozen is None else frozen.known(job, options) for job in self._listed}
        self._known: dict[str, Layer | Skipped] = {name: row for name, row in rows.items() if row is not None}
        self._jobs = [job for job in self._listed if job.name not in self._known]
        costs, holders = [job.matrix.cost for job in self._jobs], [job.holders for job in self._jobs]
        self._owners = assign_owners(costs, holders, self._world)

    def orders(self) -> list[Orders]:
        """What each rank has to do."""
        found = [Orders() for _ in range(self._world)]
        shared: list[tuple[Job, int]] = []
        for job, owner in zip(self._jobs, self._owners, strict=True):
            if job.error(owner):  # its row will say so; nobody need read it again
                continue
            if job.sharded:
                shared.append((job, owner))
            else:
                found[owner].alone.append(Task(job.name, job.place[owner], owner))
        devices: set[str] = set()
        for numbers in rounds([job.matrix.cost for job, _ in shared], [owner for _, owner in shared]):
            for orders in found:
                orders.rounds.append([])
            for job, owner in (shared[number] for number in numbers):
                devices |= self._order(job, owner, found)
        for orders in found:
            # a rank that has no part in a round neither sends nor waits, and may be a round ahead
            orders.rounds = [tasks for tasks in orders.rounds if tasks]
            orders.devices = tuple(sorted(devices))
        return found

    def _order(self, job: Job, owner: int, found: Sequence[Orders]) -> set[str]:
        """Add a matrix in shards to the last round; the devices that its parts travel between."""
        delivery = delivery_of(job, owner, self._options)
        in_rows = delivery is not None and delivery.short_axis is not None
        for rank in job.team(owner):
            task = Task(job.name, job.place[rank], owner)
            if delivery is None:
                found[rank].rounds[-1].append(task)
            elif rank == owner or rank in delivery.parts:
                sums = sums_of(job, owner) if in_rows and rank == owner else None
                found[rank].rounds[-1].append(replace(task, delivery=delivery.for_rank(rank), sums=sums))
        return set() if delivery is None else {job.held[owner].device}

    def snapshot(self, results: Sequence[RankResult], epoch: int | None) -> Snapshot:
        """The rows of all ranks in the order of the model, with the seconds of the slowest.

        Raises:
            LayerError: if something failed that no row can tell, or any layer with `options.strict`.
        """
        failure = next((f"{one.failure} on rank {rank}" for rank, one in enumerate(results) if one.failure), "")
        if failure:
            raise LayerError(failure)
        made = [self._row(job, owner, results) for job, owner in zip(self._jobs, self._owners, strict=True)]
        if self._frozen is not None:
            self._frozen.keep(self._jobs, made, self._options)
        rows = self._known | {job.name: row for job, row in zip(self._jobs, made, strict=True)}
        found = [rows[job.name] for job in self._listed]
        return snapshot_of(
            [row for row in found if isinstance(row, Layer)],
            [*self._skipped, *(row for row in found if isinstance(row, Skipped))],
            self._options,
            step=self._step,
            epoch=epoch,
            seconds=max(one.seconds for one in results),
        )

    def _row(self, job: Job, owner: int, results: Sequence[RankResult]) -> Layer | Skipped:
        """The row of its owner, or the reason why a rank could not read its part."""
        reason = job.error(owner) or next((one.unread[job.name] for one in results if job.name in one.unread), "")
        if reason:
            unread(job.matrix, WWMonitorError(reason), self._options, step=self._step)  # which raises with `strict`
            return Skipped.unread(job.name, str(job.matrix.kind), job.matrix.shape, reason)
        row = results[owner].rows[job.name]
        return replace(row, status=f"{row.status} on rank {owner}") if row.status.startswith("error:") else row
