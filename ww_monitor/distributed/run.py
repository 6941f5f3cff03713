"""The analysis of one model by all ranks that hold it: list, deal, read in rounds, analyse, gather."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist

from ww_monitor.distributed.deal import deal
from ww_monitor.distributed.inventory import Held, Job, describe, merge
from ww_monitor.distributed.ranks import Ranks, ranks_of, several
from ww_monitor.distributed.reach import can_gather, summed_side, sums_of
from ww_monitor.distributed.shards import Reading
from ww_monitor.engine import Options, analyze_matrices, snapshot_of
from ww_monitor.engine.rows import failed_layer
from ww_monitor.engine.sums import layer_of_gram
from ww_monitor.errors import LayerError, RankFailed, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.record import Layer, Snapshot


def analyze_on_ranks(
    items: Iterable[Matrix | Skipped],
    options: Options,
    *,
    group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
    step: int | None = None,
    epoch: int | None = None,
) -> Snapshot:
    """The snapshot of a model that several ranks hold, without findings; the same on every rank, bit for bit.

    A collective: every rank of the group calls it, each with what its own walker yields. Replicas are analysed once,
    dealt over their holders by cost; shards are summed or sent to the one rank that analyses their matrix, never more
    than one matrix at a time and rank; what differs between ranks under one name is named `name@rank<r>`. Without
    `torch.distributed`, or with one rank, it is `analyze_matrices`.

    Args:
        items: What the walker of this rank yields, after selection.
        options: How to analyse; the same on every rank.
        group: The ranks that analyse; `None` for all.
        timeout: Seconds that a rank waits for another, which may have a matrix more to analyse. The first call with a
            group and a timeout makes a gloo group of the same ranks; no group of the caller's changes.
        step: Optimizer step the weights belong to.
        epoch: Epoch they belong to.

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
        return _Analysis(ranks_of(group, timeout), options, step).run(items, epoch)


@dataclass(frozen=True)
class _Said:
    """What a rank has found: rows, what it could not read, what ended its work, and its seconds."""

    rows: dict[str, Layer]
    unread: dict[str, str]
    failure: str
    seconds: float


@dataclass
class _Analysis:
    """One rank's part of one analysis."""

    ranks: Ranks
    options: Options
    step: int | None
    items: list[Matrix | Skipped] = field(default_factory=list)
    rows: dict[str, Layer] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def run(self, items: Iterable[Matrix | Skipped], epoch: int | None) -> Snapshot:
        start = time.perf_counter()
        jobs, skipped = merge(self._listed(items))
        owners = deal([work(job, self.options) for job in jobs], [job.holders for job in jobs], self.ranks.world)
        readable = [(job, owner) for job, owner in zip(jobs, owners, strict=True) if not job.error(owner)]
        for together in rounds([(job, owner) for job, owner in readable if job.sharded], self.options):
            self._round(together)
        own = [self._mine(job) for job, owner in readable if owner == self.ranks.rank and not job.sharded]
        self._keep(partial(self._rows_of, list(map(self._announced, own))))
        said = _Said(self.rows, self.unread, self.failure, time.perf_counter() - start)
        heard = self.ranks.exchange(said, "the rows of the others")
        layers = [self._row(job, owner, heard) for job, owner in zip(jobs, owners, strict=True)]
        seconds = max(one.seconds for one in heard)
        return snapshot_of(layers, skipped, self.options, step=self.step, epoch=epoch, seconds=seconds)

    def _listed(self, items: Iterable[Matrix | Skipped]) -> list[list[Held]]:
        """What every rank holds; where one could not list it, an error on all."""
        self.ranks.check()
        self.ranks.say("listing its matrices")
        failure: Exception | None = None
        mine: list[Held] = []
        try:
            self.items = list(items)
            mine = describe(self.items, self.ranks.rank, self.ranks.members)
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        heard = self.ranks.exchange(
            (mine, failure and f"{type(failure).__name__}: {failure}"), "the lists of the others"
        )
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(heard):
            if reason:
                raise RankFailed(f"analysis over {len(heard)} ranks: rank {rank} could not list its matrices: {reason}")
        return [held for held, _ in heard]

    def _mine(self, job: Job) -> Matrix:
        """The matrix of a job as the walker of this rank gave it, under the name of the job."""
        item = self.items[job.place[self.ranks.rank]]
        assert isinstance(item, Matrix)
        return replace(item, name=job.name)

    def _announced(self, matrix: Matrix) -> Matrix:
        def load() -> torch.Tensor:
            self.ranks.say(f"analysing layer {matrix.name!r}")
            return matrix.load()

        return replace(matrix, load=load)

    # --- matrices in shards

    def _round(self, together: Sequence[tuple[Job, int]]) -> None:
        """Read at most one matrix for each owner, one after the other; then all owners analyse theirs."""
        analyse: Callable[[], Sequence[Layer]] | None = None
        for job, owner in together:
            if self.ranks.rank in job.team(owner):
                read = self._read(job, owner)
                analyse = read if owner == self.ranks.rank else analyse
        if analyse is not None:
            self._keep(analyse)

    def _read(self, job: Job, owner: int) -> Callable[[], Sequence[Layer]] | None:
        """This rank's part of reading a matrix; at the owner what analyses it."""
        matrix = self._mine(job)
        self.ranks.say(f"reading its shard of layer {job.name!r}")
        reading, side = Reading(self.ranks, matrix, owner), summed_side(job, owner, self.options)
        piece, sums = None if matrix.shards is None else matrix.shards.piece, sums_of(job, owner)
        gram = weights = None
        if piece is not None and sums is not None and side is not None:
            gram = reading.gram(piece, side)
        elif piece is not None and can_gather(job, owner):
            weights = reading.gathered(piece, {rank: job.held[rank].index or ((), (), ()) for rank in job.team(owner)})
        else:
            weights = reading.whole()
        if reading.error:
            self.unread[job.name] = f"{reading.error} on rank {self.ranks.rank}"
            return None
        if gram is not None and piece is not None and sums is not None:
            return lambda: [layer_of_gram(matrix, gram, sums, piece.dtype, self.options, step=self.step)]
        if weights is not None:
            return partial(self._rows_of, [replace(matrix, load=lambda: weights, shards=None)])
        return None

    # --- rows

    def _rows_of(self, matrices: Sequence[Matrix]) -> Sequence[Layer]:
        return analyze_matrices(matrices, self.options, step=self.step).layers

    def _keep(self, analyse: Callable[[], Sequence[Layer]]) -> None:
        """Analyse; what fails is told at the end, for until then the others count on this rank."""
        try:
            self.rows.update((row.name, row) for row in analyse())
        except Exception as error:  # noqa: BLE001 - raised on every rank in `_row`
            self.failure = self.failure or str(error)

    def _row(self, job: Job, owner: int, heard: Sequence[_Said]) -> Layer:
        """The row of its owner, or one with the reason why a rank could not read its part."""
        failure = next((f"{said.failure} on rank {rank}" for rank, said in enumerate(heard) if said.failure), "")
        if failure:
            raise LayerError(failure)
        reason = job.error(owner) or next((said.unread[job.name] for said in heard if job.name in said.unread), "")
        if reason:
            row = failed_layer(job.matrix, WWMonitorError(reason), self.options, step=self.step)
            return replace(row, status=f"error: {reason}")
        row = heard[owner].rows[job.name]
        return replace(row, status=f"{row.status} on rank {owner}") if row.status.startswith("error:") else row


# --- what the ranks conclude


def work(job: Job, options: Options) -> float:
    """The owner's: M³ a slice where the ranks that hold the parts share the M²N of the Gram matrix, else all of it."""
    if job.sharded and summed_side(job, job.holders[0], options) is not None:
        return float(job.matrix.shape[0] * job.matrix.short_side**3)
    return job.matrix.cost


def rounds(shared: Iterable[tuple[Job, int]], options: Options) -> list[list[tuple[Job, int]]]:
    """Matrices in shards with their owners: at most one for each owner a round, the most expensive first."""
    queues: dict[int, list[tuple[Job, int]]] = defaultdict(list)
    for job, owner in sorted(shared, key=lambda one: -work(one[0], options)):
        queues[owner].append((job, owner))
    longest = max(map(len, queues.values()), default=0)
    return [[queues[owner][r] for owner in sorted(queues) if r < len(queues[owner])] for r in range(longest)]
