"""The ranks that analyse together: how they talk, and what is said when one of them is missing."""

from __future__ import annotations

import pickle
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ww_monitor.errors import RankFailed

Said = TypeVar("Said")

_GRACE = 2.0
"""Seconds that the living have to come as far as this rank or to fail as it did, before one that is missing is named;
twice as many where another rank that failed may know who it is."""

_WAITING, _TELLING = "waiting for ", "telling who is missing|"


class Ranks:
    """A process group, with a gloo group of our own beside it for what is no tensor of a shard.

    Making one is a collective of the group. No timeout, backend or default of the user's groups is changed.

    Args:
        group: The group; `None` for all ranks of the job.
        timeout: Seconds that a rank waits for another.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.group = group
        self.timeout = timedelta(seconds=timeout)
        self.members: Sequence[int] = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank = dist.get_rank(group)
        self.world = len(self.members)
        self._failure = ""
        self._waits = 0
        self._said = ""
        self._opened: set[str] = set()
        key = ",".join(map(str, self.members)) if group is not None else "all"
        # private: torch has no public way to the job's store, which keeps the last words of a rank that is gone
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"ww_monitor/{key}/{timeout}", store)
        self.heartbeat("making a group")
        try:
            self._control = dist.new_group(
                None if group is None else list(self.members),
                timeout=self.timeout,
                backend="gloo",
                use_local_synchronization=group is not None,  # else ranks outside the group would have to call too
            )
        except Exception as error:  # noqa: BLE001 - it is raised by whoever uses these ranks, now and later
            self._failed("a group of their own", error)

    def heartbeat(self, what: str) -> None:
        """Leave word of what this rank does next, for the others to read if it is not heard of again."""
        self._said = what
        with suppress(Exception):  # the words are a courtesy; who keeps the store may be the one that is gone
            self._store.set(str(self.rank), f"{self._waits}|{what}")

    def exchange(self, said: Said, what: str) -> list[Said]:
        """What every rank says, in the order of the ranks.

        Raises:
            RankFailed: naming the missing rank and what it last did.
        """
        heard: list[Any] = [None] * self.world
        self._together(what, lambda: dist.all_gather_object(heard, said, group=self._control))
        return heard

    def gather(self, said: Said, what: str) -> list[Said]:
        """What every rank says, in the order of the ranks, on the first rank; nothing on the others.

        Raises:
            RankFailed: naming the missing rank and what it last did.
        """
        heard: list[Any] = [None] * self.world if self.rank == 0 else []
        first, packed = self.members[0], _packed(said)
        self._together(what, lambda: dist.gather_object(packed, heard or None, first, group=self._control))
        return list(map(_unpacked, heard))

    def scatter(self, said: Sequence[Said], what: str) -> Said:
        """What the first rank says to this one.

        Args:
            said: Something for each rank, on the first rank.
            what: What is waited for, for the message if a rank is missing.

        Raises:
            RankFailed: naming the missing rank and what it last did.
        """
        heard: list[Any] = [None]
        given = list(map(_packed, said)) if self.rank == 0 else None
        first = self.members[0]
        self._together(what, lambda: dist.scatter_object_list(heard, given, first, group=self._control))
        found: Said = _unpacked(heard[0])
        return found

    def broadcast(self, said: Any, what: str) -> Any:
        """What the first rank says to all.

        Raises:
            RankFailed: naming the missing rank and what it last did.
        """
        heard: list[Any] = [_packed(said) if self.rank == 0 else None]
        self._together(what, lambda: dist.broadcast_object_list(heard, self.members[0], group=self._control))
        return _unpacked(heard[0])

    def _together(self, what: str, call: Callable[[], object]) -> None:
        self.check()
        self._waits += 1
        self.heartbeat(f"{_WAITING}{what}")
        try:
            call()
        except Exception as error:
            raise self._failed(what, error) from error
        self._waits += 1
        self.heartbeat(f"going on after {what}")

    def open(self, device: str) -> None:
        """Let all ranks of the group meet once before any two of them do; a collective of the group.

        NCCL makes its connections in the first call of a group, in which all of its ranks must take part.

        Args:
            device: Type of device that tensors will travel between.
        """
        if device not in self._opened:
            self._opened.add(device)
            met = torch.zeros(1, dtype=torch.float32, device=device)
            self.wait(dist.all_reduce(met, group=self.group, async_op=True), "a first meeting")

    def swap(self, sent: tuple[torch.Tensor, int] | None, received: tuple[torch.Tensor, int] | None, what: str) -> None:
        """Send a tensor to one rank while another is received, each given with its rank in the group.

        Raises:
            RankFailed: naming the missing rank and what it last did.
        """
        pairs = [(to, one) for to, one in ((dist.isend, sent), (dist.irecv, received)) if one is not None]
        # one at a time where that cannot block, so that it is known whose connection has failed
        batches = [[pair] for pair in pairs] if pairs[0][1][0].device.type == "cpu" else [pairs]
        begun: list[tuple[list[int], list[dist.Work]]] = []
        for batch in batches:
            peers = [one[1] for _, one in batch]
            operations = [
                # as bytes: on their way nothing is computed, and no backend has to know the type
                dist.P2POp(to, one[0].view(torch.uint8), self.members[one[1]], self.group)
                for to, one in batch
            ]
            try:
                begun.append((peers, dist.batch_isend_irecv(operations)))
            except Exception as error:
                raise self._failed(what, error, peers) from error
        for peers, works in begun:
            for work in works:
                self.wait(work, what, peers)

    def heartbeat_waiting(self, what: str) -> None:
        """Leave word that this rank waits for another; one that waits is not to blame."""
        self.heartbeat(f"{_WAITING}{what}")

    def wait(self, work: dist.Work | None, what: str, peers: Sequence[int] = ()) -> None:
        """Wait for a collective of tensors, or for what travels to or from some peers.

        Raises:
            RankFailed: naming the missing rank and what it last did.
        """
        start = time.monotonic()
        try:
            if work is not None:
                work.wait(self.timeout)
        except Exception as error:
            in_time = time.monotonic() - start < self.timeout.total_seconds()  # a peer that is late may wait as well
            raise self._failed(what, error, peers if in_time else ()) from error

    def check(self) -> None:
        """Fail at once where a rank was missing before.

        Raises:
            RankFailed: with the message of then.
        """
        if self._failure:
            raise RankFailed(self._failure)

    def _failed(self, what: str, error: Exception, closed: Sequence[int] = ()) -> RankFailed:
        """What is raised where a wait has failed; `closed` are the peers to whom the connection broke."""
        # gloo's begin with a line of its source in brackets, and end with advice
        cause = str(error).rpartition("] ")[2].partition(". ")[0].strip() or type(error).__name__
        try:
            missing = self._who_is_missing(closed)
        except Exception:  # noqa: BLE001 - who kept the store is gone
            missing = "rank 0 of the job may be missing: the store, which it keeps in most jobs, does not answer"
        self._failure = (
            f"analysis over {self.world} ranks: rank {self.rank} expected {what} within "
            f"{self.timeout.total_seconds():g} s; {missing} ({cause})"
        )
        return RankFailed(self._failure)

    def _who_is_missing(self, closed: Sequence[int]) -> str:
        """Who neither fails as this rank did nor has come further, with its last words; or whom another names for sure.

        The living that have nothing to do with a dead one fail late. It is the one at the end of a broken connection
        that does not fail; the ranks that meet it tell the others.
        """
        self._store.set(str(self.rank), f"{self._waits}|{_TELLING}")
        start = time.monotonic()
        while True:
            words = {rank: self._last_words(rank) for rank in range(self.world) if rank != self.rank}
            told = {rank: said for rank, (_, said) in words.items() if said.startswith(_TELLING)}
            known = next(filter(None, (said.removeprefix(_TELLING) for said in told.values())), "")
            silent = {
                rank: said
                for rank, (waits, said) in words.items()
                if rank not in told and (waits <= self._waits or rank in closed)
            }
            broken = {rank: said for rank, said in silent.items() if rank in closed}
            waited = time.monotonic() - start
            if known or len(silent) < 2 or waited > (_GRACE if broken or not told else 2 * _GRACE):
                break
            time.sleep(0.1)
        if known:
            return f"{'the others gave up: ' * known.startswith(f'rank {self.rank} ')}{known}"
        sure = next((few for few in (broken, silent) if len(few) == 1), {})
        missing = sure or self._behind({rank: words[rank] for rank in silent})
        if missing:
            sentence = "; ".join(f"rank {rank} is missing: it was last {said}" for rank, said in missing.items())
        elif silent:
            last = "; ".join(f"rank {rank} was last {said}" for rank, said in (broken or silent).items())
            sentence = f"one of these is missing: {last}"
        else:
            sentence = "every rank had come as far, but the connection failed"
        if sure:
            self._store.set(str(self.rank), f"{self._waits}|{_TELLING}{sentence}")
        return sentence

    def _behind(self, words: Mapping[int, tuple[int, str]]) -> dict[int, str]:
        """Those of some ranks that have not come as far as this one, by what they say."""
        behind = {rank: said for rank, (waits, said) in words.items() if waits < self._waits}
        return behind or {
            rank: said
            for rank, (waits, said) in words.items()
            if waits == self._waits and said != self._said and not said.startswith(_WAITING)
        }

    def _last_words(self, rank: int) -> tuple[int, str]:
        if not self._store.check([str(rank)]):
            return -1, "not heard of"
        waits, _, said = self._store.get(str(rank)).decode().partition("|")
        return int(waits), said


def _packed(said: object) -> bytes:
    """A message as it travels: what ranks say of many layers takes a tenth of its size, and their rows half."""
    return zlib.compress(pickle.dumps(said), 1)


def _unpacked(message: bytes) -> Any:
    return pickle.loads(zlib.decompress(message))


def exchange(said: Said, what: str, *, group: dist.ProcessGroup | None = None, timeout: float = 300.0) -> list[Said]:
    """What every rank says, in the order of the ranks, e.g. for a decision that all must take alike; a collective.

    Args:
        said: What this rank says; anything that can be pickled.
        what: What is waited for, for the message if a rank is missing.
        group: The ranks; `None` for all. Without `torch.distributed` there is one.
        timeout: Seconds that a rank waits for another.

    Raises:
        RankFailed: naming the missing rank and what it last did.
    """
    return ranks_of(group, timeout).exchange(said, what) if several(group) else [said]


def several(group: dist.ProcessGroup | None) -> bool:
    """Whether `torch.distributed` is in use and the group has more than this rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


_MADE: dict[tuple[int, float], tuple[weakref.ref[Any], Ranks]] = {}
"""By id of a group and timeout; the reference tells a group from one that is gone, whose id it may have."""


def ranks_of(group: dist.ProcessGroup | None, timeout: float) -> Ranks:
    """The ranks of a group, made once; a collective of the group the first time."""
    key = group or dist.group.WORLD
    found = _MADE.get((id(key), timeout))
    if found is None or found[0]() is not key:
        _MADE[id(key), timeout] = found = (weakref.ref(key), Ranks(group, timeout))
    return found[1]
