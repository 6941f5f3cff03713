"""Permutations, permuted weights, and their Gram matrices."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from ww_monitor.errors import InvalidArgument, as_python
from ww_monitor.spectra.device import accelerator_of
from ww_monitor.spectra.eigenvalues import tall_of
from ww_monitor.spectra.elements import Elements
from ww_monitor.spectra.stop import stop_if_told

CACHED_BYTES = 256 << 20
"""Memory of this process for permutations that are kept, unless `keep_permutations` says otherwise: three of
4096 × 4096. Drawing one takes longer than the iteration that it serves, so a matrix looked at again and again should
find its own. Our choice."""

DRAW_COPIES = 10
"""Bytes that a device takes to draw a permutation, over its own: torch sorts random keys of 8 bytes and the places with
them, which are there as they were, sorted, and as workspace (our estimate; not measured)."""

_CHUNK, _BLOCK = 1 << 16, 128
"""Entries that the host holds in float64 at a time (half a MiB stays in a core's cache), and columns of a Gram matrix
that are made together (measured: 15 ms at 3072 × 768 where the whole product takes 24)."""

_SMALL_MEAN = 0.1
"""Mean beside the standard deviation up to which it is taken off the Gram matrix and not off the entries: the products
of means are then no more than those of the entries where N is 10,000."""


def on_host(tensor: torch.Tensor) -> bool:
    """Whether it is the host that shuffles: a device that solves its own matrices does so itself."""
    accelerator = accelerator_of(tensor.device)
    return accelerator is None or bool(accelerator.refusal())


def permutation(size: int, *, seed: int, replica: int) -> torch.Tensor:
    """A permutation of `size` that depends on nothing but its arguments, int32 where that suffices.

    The last ones are kept (`keep_permutations`) and handed out again: do not write into them.
    """
    return _CACHE.get(size, stream(seed, replica))


def keep_permutations(nbytes: int) -> None:
    """Keep the permutations used last, up to so many bytes in this process; 0 keeps none. Any thread may say so.

    A permutation takes 4 bytes an entry of the largest matrix that is shuffled. No number of a snapshot depends on it.

    Args:
        nbytes: Bytes on the host; 256 MiB until it is called.

    Raises:
        InvalidArgument: if it is no integer of at least 0.
    """
    nbytes = as_python(nbytes)
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
        raise InvalidArgument(f"keep_permutations: nbytes must be an integer >= 0; got {nbytes!r}")
    _CACHE.limit(nbytes)


def stream(seed: int, replica: int) -> int:
    """Seed of the generators of one replica."""
    return (seed * 1_000_003 + replica) % (1 << 63)  # neighbouring seeds share none in a million replicas


def draw(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """A permutation drawn on a device: with the law of the host's, and other numbers."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch.int32 if size < 1 << 31 else torch.int64
    return torch.randperm(size, generator=generator, dtype=dtype, device=device)


def bytes_to_draw(size: int) -> int:
    """Bytes that a device takes to draw a permutation of `size`."""
    return DRAW_COPIES * size * (4 if size < 1 << 31 else 8)


class _Cache:
    """Permutations used last, for all threads. Two threads may draw the same one at once, then one is dropped."""

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(order.nbytes for order in self._kept.values())

    def get(self, size: int, seed: int) -> torch.Tensor:
        with self._lock:
            if (size, seed) in self._kept:
                self._kept.move_to_end((size, seed))
                return self._kept[size, seed]
        drawn = draw(size, seed, torch.device("cpu"))  # without the lock: others draw theirs meanwhile
        if drawn.nbytes <= self._limit:
            with self._lock:
                self._kept[size, seed] = drawn
        self.limit(self._limit)
        return drawn

    def limit(self, nbytes: int) -> None:
        with self._lock:
            self._limit = nbytes
            self._shrink()

    def unlock(self) -> None:
        self._lock = threading.Lock()

    def _shrink(self) -> None:
        while sum(order.nbytes for order in self._kept.values()) > self._limit:
            self._kept.popitem(last=False)


_CACHE = _Cache()
if hasattr(os, "register_at_fork"):  # another thread may have had the lock, and does not go on in a child
    os.register_at_fork(after_in_child=_CACHE.unlock)


def mixed(matrices: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """`[K, N, M]` with the entries of each in this order."""
    shape, order = matrices[0].shape, order.to(matrices[0].device)
    # index_select takes a third of the time that indexing does
    return torch.stack([one.reshape(-1).index_select(0, order).view(shape) for one in matrices])


def gram_of_shuffled(matrices: Sequence[torch.Tensor], stats: Elements, order: torch.Tensor) -> torch.Tensor:
    """AᵀA `[K, M, M]` of the short side, A = (shuffled W − mean)/σ, float64, summed over some rows at a time.

    The matrices are of one shape and device, the permutation is there or on the host.
    """
    by_rows = tall_of(order.view(matrices[0].shape))
    short_side, device = by_rows.shape[1], matrices[0].device
    flat = [one.reshape(-1) for one in matrices]
    mean = stats.mean.to(device)[:, None]
    gram = torch.zeros(len(flat), short_side, short_side, dtype=torch.float64, device=device)
    for start in range(0, len(by_rows), short_side):  # as large as the Gram matrices
        stop_if_told()
        part = by_rows[start : start + short_side].reshape(-1).to(device)
        rows = torch.stack([one.index_select(0, part) for one in flat]).double().sub_(mean)
        rows = rows.view(len(flat), -1, short_side)
        gram.baddbmm_(rows.mT, rows)
    return gram.mul_(stats.std.to(device).square().reciprocal()[:, None, None])


class Shuffled:
    """A = (shuffled W − mean)/σ of one matrix on the host, as many rows as columns or more."""

    def __init__(self, matrix: torch.Tensor, stats: Elements, order: torch.Tensor) -> None:
        space = np.empty(matrix.numel() * matrix.element_size(), np.uint8)  # in large pages, unlike torch's
        mixed = torch.index_select(matrix.reshape(-1), 0, order, out=torch.from_numpy(space).view(matrix.dtype))
        self._rows = tall_of(mixed.view(matrix.shape))
        self._mean, self._std = float(stats.mean), float(stats.std)

    def gram(self) -> torch.Tensor:
        """AᵀA `[M, M]` in float32, from entries rounded once: good for directions and the first five digits."""
        exact = self._rows.dtype == torch.float64 or abs(self._mean) > _SMALL_MEAN * self._std
        rows = self._rows.double().sub_(self._mean).float() if exact else self._rows.float()
        gram = torch.empty(2 * rows.shape[1:], dtype=torch.float32, device="cpu")
        for start in range(0, len(gram), _BLOCK):  # each product once: a little over half of them
            stop_if_told()
            here, after = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            torch.mm(rows[:, here].mT, rows[:, start:], out=gram[here, start:])
            gram[after, here] = gram[here, after].mT
        if not exact:  # of a small mean the products are cleared by those of the columns' sums
            half = rows.sum(0).mul_(-self._mean).add_(0.5 * len(rows) * self._mean**2)
            gram.add_(half).add_(half[:, None])
        return gram.mul_(self._std**-2)

    def image(self, vectors: torch.Tensor) -> torch.Tensor:
        """V AᵀA `[b, M]` of `[b, M]`, in float64."""
        stop_if_told()
        image, shift = torch.zeros_like(vectors), vectors.sum(1, keepdim=True).mul_(self._mean)
        sums = torch.zeros_like(shift)
        for part in torch.split(self._rows, max(1, _CHUNK // self._rows.shape[1])):
            rows = part.double()
            along = (vectors @ rows.mT).sub_(shift)  # V Aᵀ: the mean is taken off the products
            image.addmm_(along, rows)
            sums += along.sum(1, keepdim=True)
        return image.sub_(self._mean * sums).div_(self._std**2)
