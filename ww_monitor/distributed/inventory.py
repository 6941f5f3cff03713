"""What every rank holds → what there is to analyse: replicas counted once, shards put together.

Each rank describes its items to the first one, before anything else; that one concludes who does what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ww_monitor.errors import WWMonitorError
from ww_monitor.kind import Kind
from ww_monitor.matrix import Index, Matrix, Piece, Skipped

SUMS = 5
"""Σ w, Σ w², smallest, largest entry and number of zeros, of each slice."""

Box = tuple[Index, Index, Index]
"""Slices, rows and columns, whose product is a part of a matrix."""

_TOGETHER = 1 << 19
"""Entries that are summed at a time on the host (4 MiB in float64)."""


@dataclass(frozen=True)
class Held:
    """What one rank says of one item that it holds.

    Attributes:
        name: The name of the item on that rank.
        kind: The kind of the matrix.
        shape: The shape of the whole matrix.
        role: The role of the matrix.
        frozen: Whether this rank leaves it alone in training.
        reason: Why it was left out; `None` for a matrix.
        ranks: The members of the group that hold it between them; the rank alone where all of it is there.
        sharded: Whether `load` is a collective.
        error: What reading it raised, or `""`.
        content: A checksum of the bits that lie there, `None` where they were not read.
        index: Which part lies there, where it is one that can be read alone.
        replica: Which of the replicas in the mesh the part belongs to.
        device: The type of device that the part travels from.
        sums: `SUMS` a slice of the part.
        groups: The groups of the whole matrix.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    role: str = ""
    frozen: bool = False
    reason: str | None = None
    ranks: tuple[int, ...] = ()
    sharded: bool = False
    error: str = ""
    content: int | None = None
    index: Box | None = None
    replica: tuple[int, ...] = ()
    device: str = "cpu"
    sums: tuple[tuple[float, ...], ...] = ()
    groups: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Job:
    """One matrix to analyse.

    Attributes:
        name: Its name in the snapshot, unique.
        matrix: Its shape and kind; without weights.
        teams: The sets of ranks of which each holds all of it between them; a rank is in one at most.
        held: What each rank of the teams says of it.
        place: Rank → position in its list.
    """

    name: str
    matrix: Matrix
    teams: tuple[tuple[int, ...], ...]
    held: Mapping[int, Held]
    place: Mapping[int, int]

    @property
    def holders(self) -> list[int]:
        """The ranks that may analyse it."""
        return sorted(self.held)

    @property
    def sharded(self) -> bool:
        """Whether ranks must work together to read it."""
        return any(held.sharded for held in self.held.values())

    def team(self, owner: int) -> tuple[int, ...]:
        """The ranks that read it together with its owner."""
        return next(team for team in self.teams if owner in team)

    def error(self, owner: int) -> str:
        """What reading it raised on a rank of the team, with that rank, or `""`."""
        return next((f"{e} on rank {r}" for r in self.team(owner) if (e := self.held[r].error)), "")


# --- what a rank says


@torch.no_grad()
def describe(items: Sequence[Matrix | Skipped], rank: int, members: Sequence[int]) -> list[Held]:
    """What a rank holds, with the checksums and sums of what lies there; one read of the device for all.

    Args:
        items: What the walker of this rank yields.
        rank: This rank in the group.
        members: The ranks of the group by their number in the job.

    Raises:
        WWMonitorError: if a matrix is spread over ranks that are not all in the group.
    """
    read = [_numbers(item) for item in items]
    fetched = iter(_fetch([numbers for numbers in read if isinstance(numbers, torch.Tensor)]))
    held = []
    for item, numbers in zip(items, read, strict=True):
        if isinstance(item, Skipped):
            held.append(Held(item.name, str(item.kind), tuple(item.shape), reason=item.reason))
        else:
            held.append(_held(item, rank, members, next(fetched) if isinstance(numbers, torch.Tensor) else numbers))
    return held


def _numbers(item: Matrix | Skipped) -> torch.Tensor | str | None:
    """`[1 + …]` int64: the checksum and the bits of the sums; or what reading raised; nothing if it is a collective."""
    if isinstance(item, Skipped) or (item.shards is not None and item.shards.piece is None):
        return None
    try:
        if item.shards is None or item.shards.piece is None:
            return checksum(item.load())[None]
        piece = item.shards.piece.load()
        # bits of the sums beside the checksum, so that one read of the device brings both
        return torch.cat([checksum(piece)[None], _sums(piece).flatten().view(torch.int64)])
    except Exception as error:  # noqa: BLE001 - whatever a walker throws costs this layer only
        return f"{type(error).__name__}: {error}"


def checksum(weights: torch.Tensor) -> torch.Tensor:
    """Σ_i (i + 1) Σ_j bits_ij mod 2⁶⁴ over the rows of `[S, N, M]`, a scalar on their device; exact in any order."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total, start = torch.zeros((), dtype=torch.int64, device=weights.device), 1
    for part in _in_rows(weights.view(sizes[weights.element_size()])):
        rows = part.sum(1, dtype=torch.int64)
        total += (rows * torch.arange(start, start + len(rows), dtype=torch.int64, device=rows.device)).sum()
        start += len(rows)
    return total


def _in_rows(weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """`[rows, M]` after one another; on the host few at a time, for torch copies there what it sums in another type."""
    few = max(1, _TOGETHER // max(1, weights.shape[2])) if weights.device.type == "cpu" else weights.shape[1]
    for one in weights:
        yield from one.split(max(1, few))


def _sums(piece: torch.Tensor) -> torch.Tensor:
    """The sums of each slice of a part, `[SUMS, S]` float64."""
    sums = torch.zeros(SUMS, len(piece), dtype=torch.float64, device=piece.device)
    sums[2], sums[3] = math.inf, -math.inf
    for one, of_slice in zip(piece, sums.unbind(1), strict=True):
        for part in _in_rows(one[None]) if one.numel() else ():  # amin has no value of nothing
            entries = part.double()
            of_slice[0] += entries.sum()
            of_slice[1] += torch.linalg.vector_norm(entries).square()
            of_slice[2] = torch.minimum(of_slice[2], entries.amin())
            of_slice[3] = torch.maximum(of_slice[3], entries.amax())
            of_slice[4] += (entries == 0).sum()
    return sums


def _fetch(numbers: Sequence[torch.Tensor]) -> list[list[int]]:
    """All of them on the host, with one wait for each device."""
    found: list[list[int]] = [[] for _ in numbers]
    for device in {one.device for one in numbers}:
        places = [i for i, one in enumerate(numbers) if one.device == device]
        together = torch.cat([numbers[i] for i in places]).tolist()
        for i in places:
            found[i], together = together[: len(numbers[i])], together[len(numbers[i]) :]
    return found


def _held(matrix: Matrix, rank: int, members: Sequence[int], numbers: list[int] | str | None) -> Held:
    shards = matrix.shards
    together = (members[rank],) if shards is None else shards.ranks
    outside = sorted(set(together) - set(members))
    if outside:
        raise WWMonitorError(
            f"layer {matrix.name!r}: expected its shards on the ranks of the group, {list(members)}; got some on "
            f"{outside}"
        )
    ranks = _in_group(tuple(together), tuple(members))
    error, known = (numbers, []) if isinstance(numbers, str) else ("", numbers or [])
    plain = Held(
        matrix.name,
        str(matrix.kind),
        matrix.shape,
        matrix.role,
        matrix.frozen,
        ranks=ranks,
        sharded=shards is not None,
        error=error,
        content=known[0] if known else None,
        groups=matrix.groups,
    )
    piece = shards.piece if shards is not None else None
    return plain if piece is None else _with_piece(plain, piece, known)


@lru_cache(maxsize=64)
def _in_group(together: tuple[int, ...], members: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of some ranks in their group: one object for all matrices, which a message holds once."""
    return tuple(sorted(members.index(one) for one in together))


def _with_piece(held: Held, piece: Piece, known: Sequence[int]) -> Held:
    coordinate = piece.mesh.get_coordinate() or ()
    floats = torch.tensor(known[1:], dtype=torch.int64, device="cpu").view(torch.float64)
    return replace(
        held,
        index=piece.index,
        replica=tuple(at for dim, at in enumerate(coordinate) if dim not in piece.sharded),
        device=piece.mesh.device_type,
        sums=tuple(map(tuple, floats.view(SUMS, -1).tolist())) if known else (),
    )


# --- what the first rank concludes


def merge(lists: Sequence[Sequence[Held]]) -> tuple[list[Job], list[Skipped]]:
    """What there is to analyse and what was left out, by first holder and position there.

    A matrix with the same name, shape and content on several ranks is a replica and held by all of them. Where the
    content differs (experts or stages with local names) each has a row of its own, named `name@rank<first holder>`.

    Args:
        lists: What each rank of the group says.

    Raises:
        WWMonitorError: if a rank does not list what others hold with it.
    """
    found: dict[str, list[tuple[int, int, Held]]] = {}
    for rank, held in enumerate(lists):
        for place, one in enumerate(held):
            found.setdefault(one.name, []).append((rank, place, one))
    jobs: list[tuple[tuple[int, int], Job]] = []
    skipped: list[tuple[tuple[int, int], Skipped]] = []
    for name, entries in found.items():
        matrices = [entry for entry in entries if entry[2].reason is None]
        if not matrices:
            rank, place, one = entries[0]
            skipped.append(((rank, place), Skipped(name, one.kind, one.shape, one.reason or "")))
        groups = _by_content(name, matrices)
        for group in groups:
            job = _job(name if len(groups) == 1 else f"{name}@rank{group[0][0]}", group)
            jobs.append(((group[0][0], group[0][1]), job))
    return [job for _, job in sorted(jobs, key=lambda one: one[0])], [one for _, one in sorted(skipped, key=_first)]


def _first(entry: tuple[tuple[int, int], Skipped]) -> tuple[int, int]:
    return entry[0]


Entries = list[tuple[int, int, Held]]


def _by_content(name: str, entries: Entries) -> list[Entries]:
    """The entries of one name, those of equal content together; a plain one that cannot be read joins its like."""
    copies: dict[tuple[int, ...], Entries] = {}
    for entry in entries:
        copies.setdefault(entry[2].ranks, []).append(entry)
    groups: dict[object, Entries] = {}
    unreadable: list[Entries] = []
    for ranks, copy in copies.items():
        if tuple(entry[0] for entry in copy) != ranks:
            absent = sorted(set(ranks) - {entry[0] for entry in copy})
            raise WWMonitorError(
                f"layer {name!r}: expected it on the ranks {list(ranks)}; rank {absent} does not have it"
            )
        first = copy[0][2]
        if first.error and not first.sharded:
            unreadable.append(copy)
            continue
        content = tuple(entry[2].content for entry in copy)
        # contents that no rank alone can read are not compared: each team's matrix is its own
        key = (first.shape, first.kind, ranks if None in content else content)
        groups.setdefault(key, []).extend(copy)
    if not groups and unreadable:
        return [[entry for copy in unreadable for entry in copy]]
    return list(groups.values())


def _job(name: str, entries: Entries) -> Job:
    first = entries[0][2]
    slices, rows, columns = first.shape
    return Job(
        name,
        Matrix(name, Kind(first.kind), (slices, rows, columns), _nothing, first.role, groups=first.groups),
        tuple(dict.fromkeys(held.ranks for _, _, held in entries)),
        {rank: held for rank, _, held in entries},
        {rank: place for rank, place, _ in entries},
    )


def _nothing() -> torch.Tensor:
    raise WWMonitorError("what was heard of a matrix has no weights")
