"""One analysis on many ranks, before it is made: who analyses what, what moves, and what memory it takes.

The dealing is the package's own; how a matrix in shards is read is what `ww_monitor.distributed` does with what
FSDP2 leaves of it on each rank. All is computed from shapes.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ww_monitor.distributed import deal
from ww_monitor.distributed.inventory import Held
from ww_monitor.errors import check_choice, check_positive_int
from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.plan.architectures import Config, Laid, architecture
from ww_monitor.plan.description import Rates, measured_rates, operations
from ww_monitor.settings import Select

SHARDINGS = ("fsdp", "ddp")
"""`"fsdp"`: FSDP2, every stored tensor cut along its first dimension over all ranks; `"ddp"`: a replica on each."""

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BLOCKS = 2 * 8 * (1 << 20)
"""Bytes of the two blocks that a rank needs to sum a Gram matrix (see `distributed.shards`)."""

ROW_BYTES = 600
"""Of a row of the default preset as the ranks exchange it, pickled (measured)."""


@dataclass(frozen=True)
class RankShare:
    """What one rank does.

    Attributes:
        rank: Its number.
        num_matrices: How many it analyses.
        cost: Multiply-adds of those, as they are dealt: M²N + M³ a slice, or M³ where the ranks share the M²N.
        seconds: That it works, at the rates of the plan; what it waits is not in it.
        bytes_sent: Of weights and Gram matrices.
        peak_bytes: Workspace at most, beside the model and its lists of what the others hold.
    """

    rank: int
    num_matrices: int
    cost: float
    seconds: float
    bytes_sent: float
    peak_bytes: float


@dataclass(frozen=True)
class RankPlan:
    """One analysis on many ranks, computed.

    Attributes:
        world_size: Number of ranks.
        sharding: One of `SHARDINGS`.
        shares: One a rank.
        num_matrices: That are analysed.
        num_skipped: That are left out.
        seconds: Until the last rank is done; where weights are in shards the ranks wait for the slowest after each
            round of one matrix an owner. The time that bytes travel is not in it.
        bytes_told: That each rank receives of what the others hold, and of their rows.
        rates: What seconds are computed from.
    """

    world_size: int
    sharding: str
    shares: tuple[RankShare, ...]
    num_matrices: int
    num_skipped: int
    seconds: float
    bytes_told: float
    rates: Rates

    @property
    def cost(self) -> float:
        """Of a rank, the mean."""
        return sum(share.cost for share in self.shares) / self.world_size

    @property
    def balance(self) -> float:
        """Largest cost of a rank over the mean; 1 is even."""
        return max(share.cost for share in self.shares) / self.cost if self.cost else 1.0

    @property
    def num_idle(self) -> int:
        """How many ranks own nothing."""
        return sum(not share.num_matrices for share in self.shares)

    @property
    def bytes_moved(self) -> float:
        """Weights and Gram matrices that all ranks send together."""
        return sum(share.bytes_sent for share in self.shares)

    @property
    def bytes_sent(self) -> float:
        """The most that one rank sends of them."""
        return max(share.bytes_sent for share in self.shares)

    @property
    def peak_bytes(self) -> float:
        """The most workspace that a rank needs."""
        return max(share.peak_bytes for share in self.shares)


def plan_ranks(
    model: str | Path | Config | Iterable[Laid | Matrix | Skipped],
    world_size: int,
    *,
    sharding: str = "fsdp",
    dtype: str = "float32",
    rates: Rates | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_size: int = 8,
    max_size: int | None = None,
) -> RankPlan:
    """What `analyze_on_ranks` would do on so many ranks: cost, balance, bytes and memory of each, from shapes alone.

    A matrix in shards of which each part has the whole short side is summed: every rank sends M² float64 towards the
    owner. Any other is sent to its owner. It is assumed that no layer is near a trap, which would be sent as well.

    Args:
        model: A name of `BUILT_IN`, a Hugging Face `config.json` or its folder, what stands in one, or what a walker
            yields of any model (then the first dimension of each stored tensor is taken to be the rows).
        world_size: Number of ranks.
        sharding: `"fsdp"` or `"ddp"`.
        dtype: Of the stored weights; FSDP2 keeps float32 unless the model was made in less.
        rates: Speed of a rank; `None` measures this host.
        include: As in `describe`.
        exclude: As in `describe`.
        min_size: As in `describe`.
        max_size: As in `describe`.

    Raises:
        InvalidArgument: naming the argument, its value and the choices.

    >>> plan = plan_ranks("llama-3-70b", 64, rates=Rates(gram=2e10, solve=8e9))
    >>> round(plan.balance, 2), plan.num_idle
    (1.07, 0)
    """
    check_positive_int("plan", "world_size", world_size)
    check_choice("plan", "sharding", sharding, SHARDINGS)
    check_choice("plan", "dtype", dtype, DTYPES)
    select = Select(include=include, exclude=exclude, min_size=min_size, max_size=max_size)
    laid, num_skipped = _wanted(architecture(model) if isinstance(model, str | Path | Mapping) else model, select)
    speed = measured_rates() if rates is None else rates
    size = DTYPES[dtype].itemsize
    items = [_Item(one, world_size, sharding == "fsdp" and world_size > 1, size, speed) for one in laid]
    owners = deal([item.cost for item in items], [range(world_size)] * len(items), world_size)
    shares = tuple(_shares(items, owners, world_size))
    shared = any(item.sharded for item in items)
    return RankPlan(
        world_size,
        sharding,
        shares,
        len(items),
        num_skipped,
        _in_rounds(items, owners, world_size) if shared else max(share.seconds for share in shares),
        _told(items, shares, world_size),
        speed,
    )


def _wanted(items: Iterable[Laid | Matrix | Skipped], select: Select) -> tuple[list[Laid], int]:
    """What is analysed, and how many are not."""
    wanted, left_out = [], 0
    for item in items:
        laid = Laid(item) if isinstance(item, Matrix) else item
        if isinstance(laid, Skipped) or select.reason_to_skip(laid.matrix):
            left_out += 1
        else:
            wanted.append(laid)
    return wanted, left_out


@dataclass(frozen=True)
class _Item:
    """A matrix, as it lies on the ranks.

    Attributes:
        laid: The matrix.
        world: Number of ranks.
        sharded: Whether each holds a part only.
        size: Bytes of an entry.
        rates: Speed of a rank.
    """

    laid: Laid
    world: int
    sharded: bool
    size: int
    rates: Rates

    @property
    def matrix(self) -> Matrix:
        return self.laid.matrix

    @cached_property
    def parts(self) -> np.ndarray:
        """`[world]` rows of the matrix on each rank, where it is in shards; `torch.chunk`'s cut, as FSDP2 does it."""
        rows, ranks = self.matrix.shape[1], np.arange(self.world)
        if self.laid.stack is not None:
            place, count = self.laid.stack
            return np.where(ranks == place // -(-count // self.world), rows, 0)
        chunk = -(-rows // self.world)
        return np.clip(rows - ranks * chunk, 0, chunk)

    @cached_property
    def summed(self) -> bool:
        """Whether each part has all of the short side, so that Gram matrices are added up."""
        return self.sharded and (self.matrix.shape[2] == self.matrix.short_side or int((self.parts > 0).sum()) == 1)

    @cached_property
    def cost(self) -> float:
        """The owner's work, as `distributed.run.work` has it."""
        return float(self.matrix.shape[0] * self.matrix.short_side**3) if self.summed else self.matrix.cost

    @cached_property
    def gram_seconds(self) -> float:
        return operations(self.matrix.shape)[0] / self.rates.gram

    @cached_property
    def owner_seconds(self) -> float:
        """Of what the owner does alone."""
        solve = operations(self.matrix.shape)[1] / self.rates.solve
        return solve if self.summed else solve + self.gram_seconds

    @property
    def shared_seconds(self) -> np.ndarray:
        """`[world]` of the Gram matrix's part on each rank."""
        return self.parts / self.matrix.shape[1] * self.gram_seconds

    @property
    def gram_bytes(self) -> int:
        return 8 * self.matrix.shape[0] * self.matrix.short_side**2

    @property
    def part_bytes(self) -> np.ndarray:
        """`[world]` of the weights on each rank."""
        return self.parts * self.matrix.shape[0] * self.matrix.shape[2] * self.size

    @property
    def peak_bytes(self) -> float:
        """At the owner, on a host: the Gram matrix, or the weights and what the engine sets aside."""
        if self.summed:
            return self.gram_bytes + _BLOCKS
        slices, rows, columns = self.matrix.shape
        weights = slices * rows * columns * self.size
        workspace = 8 * self.matrix.short_side**2 + weights  # as `engine.run` counts it
        return workspace + (weights + float(self.part_bytes.max()) if self.sharded else 0.0)


def _shares(items: Sequence[_Item], owners: Sequence[int], world: int) -> Iterator[RankShare]:
    number, cost, seconds, sent, peak = (np.zeros(world) for _ in range(5))
    if any(item.summed for item in items):
        peak += _BLOCKS
    for item, owner in zip(items, owners, strict=True):
        number[owner] += 1
        cost[owner] += item.cost
        seconds[owner] += item.owner_seconds
        peak[owner] = max(peak[owner], item.peak_bytes)
        if item.summed:
            seconds += item.shared_seconds
        if item.sharded:
            sends = np.full(world, float(item.gram_bytes)) if item.summed else item.part_bytes.astype(float)
            sends[owner] = 0.0
            sent += sends
    for rank in range(world):
        yield RankShare(rank, int(number[rank]), *(float(one[rank]) for one in (cost, seconds, sent, peak)))


def _in_rounds(items: Sequence[_Item], owners: Sequence[int], world: int) -> float:
    """Seconds of all rounds, the ranks waiting for the slowest after each."""
    total = 0.0
    for together in _rounds(items, owners):
        shared = sum((item.shared_seconds for item in together if item.summed), np.zeros(world))
        total += float(np.max(shared)) + max(item.owner_seconds for item in together)
    return total


def _rounds(items: Sequence[_Item], owners: Sequence[int]) -> list[list[_Item]]:
    """At most one matrix an owner, the most expensive first, as `distributed.run.rounds` has them."""
    queues: dict[int, list[_Item]] = defaultdict(list)
    for item, owner in sorted(zip(items, owners, strict=True), key=lambda pair: -pair[0].cost):
        queues[owner].append(item)
    longest = max(map(len, queues.values()), default=0)
    return [[queues[owner][r] for owner in sorted(queues) if r < len(queues[owner])] for r in range(longest)]


def _told(items: Sequence[_Item], shares: Sequence[RankShare], world: int) -> float:
    """Bytes that each rank hears: from every other a list of what it holds and its rows, all as long as the longest."""
    if world == 1:
        return 0.0
    listed = len(pickle.dumps([_held(item) for item in items], protocol=4))
    return float(world - 1) * (listed + ROW_BYTES * max(share.num_matrices for share in shares))


def _held(item: _Item) -> Held:
    """What the first rank says of a matrix."""
    matrix = item.matrix
    plain = Held(matrix.name, matrix.kind, matrix.shape, matrix.role, ranks=(0,), content=1 << 60)
    if not item.sharded:
        return plain
    slices, _, columns = matrix.shape
    return Held(
        matrix.name,
        matrix.kind,
        matrix.shape,
        matrix.role,
        ranks=tuple(range(item.world)),
        sharded=True,
        content=1 << 60,
        index=(range(slices), range(int(item.parts[0])), range(columns)),
        split=(item.world, 1),
        sums=((0.5,) * slices,) * 5,
    )
