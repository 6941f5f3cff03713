"""Correlation traps: outliers that stay when the entries of a matrix are shuffled, and what causes them.

Shuffling leaves only the histogram of the elements. An outlier of the shuffled matrix therefore has one of two
causes: entries with |w| > σ(NM)^¼, or a mean with |mean| > σ(NM)^-¼ (Baik, Ben Arous & Péché 2005; for rank-one
perturbations of rectangular matrices Benaych-Georges & Nadakuditi 2012). Only the first is a trap here: every
function below works on the de-meaned matrix and reports the mean apart.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.elements import Elements
from ww_monitor.spectra.lanczos import outliers
from ww_monitor.spectra.marchenko_pastur import (
    SIGNIFICANCE,
    johnstone,
    tracy_widom_quantile,
    tracy_widom_sf,
)

HEADROOM_TO_SHUFFLE = 0.8
"""Below this headroom the shuffled spectrum is not computed and no trap is counted. Measured at the level of 0.1 % on
16,000 matrices of independent elements at five shapes with a headroom below 0.8 (`tests/spectra/test_traps.py` has a
smaller version): 0.04 % of the shuffles had an outlier for Gaussian, uniform and log-normal (σ = ½) elements, 0.5 %
for Laplace, and 0.3, 0.3, 0.5, 1.0 and 2.5 % for Student t with 8, 7, 6, 5 and 4 degrees of freedom; two of the
matrices had one in at least half of three shuffles, which makes a finding. Heavier tails do not stay below 0.8. What
the rule does miss is many entries crowded just under the limit, as if clipped there: Student t with 3 degrees of
freedom clipped at 0.79 has an outlier in a quarter of the shuffles."""

REPLICAS = 3
"""Shuffles of a matrix that is not skipped. Our choice: enough to see whether a trap depends on the shuffle."""

LEAST_LANCZOS_SIDE = 256
"""Short side from which Lanczos' iteration beats the whole spectrum on the host, measured in CPU seconds."""

CACHED_BYTES = 256 << 20
"""Memory for permutations that are kept: three of 4096 × 4096. Drawing one takes longer than the iteration that it
serves, so a matrix looked at again and again should find its own. Our choice."""


@dataclass(frozen=True)
class Shuffled:
    """The largest eigenvalues of shuffled matrices, each field `[B, replicas]`.

    Attributes:
        num_traps: Eigenvalues above the Tracy–Widom quantile.
        severity: λmax divided by the upper Marchenko–Pastur edge.
        p_value: Probability that a random matrix has an eigenvalue as large.
    """

    num_traps: torch.Tensor
    severity: torch.Tensor
    p_value: torch.Tensor


def shuffled(
    matrices: torch.Tensor,
    stats: Elements,
    *,
    seed: int,
    replicas: int = REPLICAS,
    significance: float = SIGNIFICANCE,
) -> Shuffled:
    """#{λ(shuffled W − mean) > σ²(centre + q·scale)}: traps counted against Johnstone's Tracy–Widom law.

    Each replica permutes all matrices of one shape alike, from a generator of its own: the global random state is
    not touched, and a series over training steps shares its random numbers.

    On the host only the numbers asked for are computed, by Lanczos' iteration; matrices that are small, or for which it
    comes to no certain answer, get their whole spectrum, and so does everything on a GPU, in one batch. Both give the
    same counts, and the same λmax to 1e-9.

    Args:
        matrices: `[B, N, M]`.
        stats: Their `elements`.
        seed: Seed of replica 0; replica r uses its own stream.
        replicas: Number of shuffles.
        significance: Probability of a false trap in one replica of one matrix.
    """
    rows, columns = matrices.shape[1:]
    long_side, short_side = max(rows, columns), min(rows, columns)
    centre, scale = (float(t) for t in johnstone(torch.tensor(float(long_side)), torch.tensor(float(short_side))))
    threshold = centre + tracy_widom_quantile(significance) * scale
    measure = _by_lanczos if short_side >= LEAST_LANCZOS_SIDE and not matrices.is_cuda else _by_full_spectrum
    counts, largest = [], []
    for replica in range(replicas):
        order = permutation(rows * columns, seed=seed, replica=replica).to(matrices.device)
        mixed = matrices.flatten(1).index_select(1, order).view(matrices.shape)
        count, value = measure(mixed, stats, threshold, stream(seed, replica))
        counts.append(count)
        largest.append(value)
    eigenvalue = torch.stack(largest, 1)
    severity = eigenvalue / (long_side**0.5 + short_side**0.5) ** 2
    return Shuffled(torch.stack(counts, 1), severity, tracy_widom_sf((eigenvalue - centre) / scale))


def _by_full_spectrum(
    matrices: torch.Tensor, stats: Elements, threshold: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count above the threshold and λmax, both in units of σ², from all eigenvalues."""
    mean, variance = stats.mean.to(matrices.device), stats.std.to(matrices.device).square()
    spectrum = eigenvalues(matrices.double() - mean[:, None, None]).values
    return (spectrum > (variance * threshold)[:, None]).sum(1), spectrum[:, -1] / variance


def _by_lanczos(
    matrices: torch.Tensor, stats: Elements, threshold: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without the spectrum, matrix by matrix, where that comes to an answer."""
    counts = torch.zeros(len(matrices), dtype=torch.int64)
    largest = torch.zeros(len(matrices), dtype=torch.float64)
    for b, matrix in enumerate(matrices):
        mean, std = float(stats.mean[b]), float(stats.std[b])
        found = outliers(matrix, mean=mean, std=std, threshold=threshold, seed=seed)
        if found is not None:
            counts[b], largest[b] = found.count, found.largest
        else:
            alone = Elements(*(value[b : b + 1] for value in vars(stats).values()))
            counts[b : b + 1], largest[b : b + 1] = _by_full_spectrum(matrix[None], alone, threshold, seed)
    return counts, largest


def permutation(size: int, *, seed: int, replica: int) -> torch.Tensor:
    """A permutation of `size` that depends on nothing but its arguments, int32 where that suffices.

    The last ones are kept, up to `CACHED_BYTES`, and handed out again: do not write into them.
    """
    return _CACHE.get(size, stream(seed, replica))


def stream(seed: int, replica: int) -> int:
    """Seed of the generators of one replica."""
    return (seed * 1_000_003 + replica) % (1 << 63)


class _Cache:
    """Permutations used last, for all threads. Two threads may draw the same one at once, then one is dropped."""

    def __init__(self) -> None:
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
        drawn = _draw(size, seed)
        if drawn.nbytes <= CACHED_BYTES:
            with self._lock:
                self._kept[size, seed] = drawn
                while sum(order.nbytes for order in self._kept.values()) > CACHED_BYTES:
                    self._kept.popitem(last=False)
        return drawn


_CACHE = _Cache()


def _draw(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int32 if size < 1 << 31 else torch.int64
    return torch.randperm(size, generator=generator, dtype=dtype)
