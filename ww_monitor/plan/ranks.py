"""One analysis on many ranks, before it is made: who analyses what, what moves, and what memory it takes.

Owners, rounds, blocks and workspace are what the functions of `ww_monitor.distributed` and of the engine say of weights
that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ww_monitor.description import Description, Rates, plan_matrices
from ww_monitor.distributed.assign import assign_owners, rounds
from ww_monitor.distributed.layout import Delivery, deliver
from ww_monitor.engine import Options
from ww_monitor.engine.measure import needs_weights
from ww_monitor.engine.run import workspace
from ww_monitor.errors import InvalidArgument, check_choice, check_positive_int
from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.metric import Loaded
from ww_monitor.plan.models import Config, configured
from ww_monitor.settings import Select
from ww_monitor.spectra.elements import Moments
from ww_monitor.walk.sharded import EvenShards

DTYPES: Mapping[str, torch.dtype] = {
    str(one).removeprefix("torch."): one for one in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
_MOST_RANKS = 1 << 14

OVERALL = (
    "without work", "cost of a rank", "max ÷ mean", "time (s)", "moved (GB)", "most sent by a rank (GB)",
    "workspace (GB)",
)  # fmt: skip
PER_RANK = ("rank", "matrices", "cost", "time (s)", "sent (GB)", "workspace (GB)")


@dataclass(frozen=True)
class RankPlan:
    """One analysis on many ranks, computed; the arrays have an entry a rank.

    Attributes:
        num_matrices: How many it analyses.
        costs: Multiply-adds of those, as they are assigned: M²N + M³ a slice.
        seconds: That it works, at the rates of the plan; what it waits, also for bytes that travel, is not in it.
        bytes_sent: The weights that it sends.
        peak_bytes: Its workspace at most, beside the model.
        total_seconds: Until the last is done; where weights are in shards all wait for the slowest of a round.
        description: The same analysis by one process.
    """

    num_matrices: np.ndarray
    costs: np.ndarray
    seconds: np.ndarray
    bytes_sent: np.ndarray
    peak_bytes: np.ndarray
    total_seconds: float
    description: Description

    @property
    def balance(self) -> float:
        """Largest cost of a rank over the mean; 1 is even."""
        return float(self.costs.max() / self.costs.mean()) if self.costs.any() else 1.0

    def overall(self) -> list[str]:
        """The cells of a table under `OVERALL`."""
        numbers = (
            self.costs.mean(), self.balance, self.total_seconds, self.bytes_sent.sum() / 1e9,
            self.bytes_sent.max() / 1e9, self.peak_bytes.max() / 1e9,
        )  # fmt: skip
        return [str((self.num_matrices == 0).sum()), *(f"{number:.3g}" for number in numbers)]

    def per_rank(self) -> list[list[str]]:
        """The cells of a table under `PER_RANK`, a line a rank."""
        numbers = zip(self.costs, self.seconds, self.bytes_sent / 1e9, self.peak_bytes / 1e9, strict=True)
        return [
            [str(rank), str(self.num_matrices[rank]), *(f"{one:.3g}" for one in line)]
            for rank, line in enumerate(numbers)
        ]


def plan_ranks(
    model: str | Path | Config | nn.Module | Iterable[Matrix | Skipped], world_size: int, *, sharding: str = "fsdp",
    dtype: str | torch.dtype = "float32", rates: Rates | None = None,
) -> RankPlan:  # fmt: skip
    """What `analyze_on_ranks` would do on so many ranks: cost, balance, bytes and memory of each, from shapes alone.

    It is assumed that no layer is near a trap: one that is arrives whole at its owner.

    Args:
        model: A name of `BUILT_IN`, a Hugging Face `config.json` or its folder, what stands in one, a module or a state
            dict, also on the meta device, or what a walker yields (of whose matrices the rows are taken to be what is
            cut, as of a state dict's).
        world_size: Number of ranks.
        sharding: `"fsdp"` (FSDP2, every stored tensor cut along its first dimension over all ranks) or `"ddp"`.
        dtype: The type of the stored weights; FSDP2 keeps float32 unless the model was made in less.
        rates: Speed of a rank; `None` measures this host.

    Raises:
        InvalidArgument: naming the argument, its value and the choices; or if there is nothing to analyse.

    >>> fc = Matrix("fc", "dense", (1, 4096, 1024), torch.zeros)
    >>> float(plan_ranks([fc], 8, rates=Rates(gram=2e10, solve=8e9)).bytes_sent.sum()) / (4096 * 1024 * 4)
    0.875
    """
    check_positive_int("plan", "world_size", world_size)
    check_choice("plan", "sharding", sharding, ("fsdp", "ddp"))
    dtype = str(dtype).removeprefix("torch.")
    check_choice("plan", "dtype", dtype, DTYPES)
    if world_size > _MOST_RANKS:
        raise InvalidArgument(f"plan: world_size must be at most {_MOST_RANKS}; got {world_size}")
    known = configured(model) if isinstance(model, str | Path | Mapping | nn.Module) else model
    items = list(Select().apply(known))
    matrices = [one for one in items if isinstance(one, Matrix)]
    if not matrices:
        left_out = "; ".join(f"{one.name!r}: {one.reason}" for one in items[:3] if isinstance(one, Skipped))
        raise InvalidArgument(f"plan: expected a model with a matrix to analyse; got none ({left_out or 'empty'})")
    description = plan_matrices(items, rates=rates)
    seconds, costs = np.array([row.seconds for row in description.rows]), [matrix.cost for matrix in matrices]
    owners = assign_owners(costs, [range(world_size)] * len(costs), world_size)
    number, cost, busy = (np.bincount(np.array(owners, dtype=int), of, world_size) for of in (None, costs, seconds))
    if sharding == "ddp" or world_size == 1:
        sent, peak = _moved(matrices, owners, DTYPES[dtype], world_size, sharded=False)
        return RankPlan(number, cost, busy, sent, peak, float(busy.max()), description)
    sent, peak = _moved(matrices, owners, DTYPES[dtype], world_size, sharded=True)
    total = sum(float(seconds[together].max()) for together in rounds(costs, owners))
    return RankPlan(number, cost, busy, sent, peak, total, description)


def _moved(
    matrices: Sequence[Matrix], owners: Sequence[int], dtype: torch.dtype, world: int, *, sharded: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`[world]` bytes that each rank sends, and the most that it needs at a time."""
    sent, peak = np.zeros(world), np.zeros(world)
    for matrix, owner in zip(matrices, owners, strict=True):
        most = workspace(Loaded([matrix], [torch.empty((1, *matrix.shape), dtype=dtype, device="meta")], dtype))
        rows, lies = range(matrix.shape[1]), matrix.shards
        if sharded and lies is not None and not isinstance(lies, EvenShards):  # computed of the whole, by every rank
            sent += (world - 1) / world * math.prod(matrix.shape) * dtype.itemsize
            peak = np.maximum(peak, most)
        elif sharded:
            lies = lies if isinstance(lies, EvenShards) else EvenShards((), axis=1, places=rows, size=len(rows))
            delivery, by_rank, held = _without_owner(matrix.shape, lies, world, dtype.itemsize)
            most = most if delivery.short_axis is None else 0  # a solver works in the Gram matrix that has come
            most += replace(delivery, owner=owner).bytes_held(owner, dtype.itemsize)
            sent += by_rank
            sent[owner] -= by_rank[owner]  # its own part stays
            peak = np.maximum(peak, held)
        peak[owner] = max(peak[owner], most)
    return sent, peak


@lru_cache(maxsize=512)
def _without_owner(
    shape: tuple[int, int, int], shards: EvenShards, world: int, itemsize: int
) -> tuple[Delivery, np.ndarray, np.ndarray]:
    """A delivery to nobody, with the bytes that each rank sends and needs: layers of one shape differ by the owner."""
    matrix, sent, held = Matrix("", Kind.DENSE, shape, torch.empty), np.zeros(world), np.zeros(world)
    delivery = deliver(matrix, -1, shards.parts(shape, world), whole=_reads_weights(shape))
    for rank in delivery.parts:
        sent[rank], held[rank] = delivery.bytes_sent(rank, itemsize), delivery.bytes_held(rank, itemsize)
    return delivery, sent, held


@lru_cache(maxsize=4096)
def _reads_weights(shape: tuple[int, int, int]) -> bool:
    """Whether the default analysis needs the entries of a harmless matrix, which is full of ±1."""
    one = torch.ones(shape[0], dtype=torch.float64, device="cpu")
    sums = Moments(0 * one, one * (shape[1] * shape[2]), -one, one, 0 * one)
    return needs_weights(Matrix("", Kind.DENSE, shape, torch.empty), sums, Options())
