"""Correlation traps: outliers that stay when the entries of a matrix are shuffled, and what causes them.

Shuffling leaves only the histogram of the elements. An outlier of the shuffled matrix therefore has one of two
causes: entries with |w| > σ(NM)^¼, or a mean with |mean| > σ(NM)^-¼ (Baik, Ben Arous & Péché 2005; for rank-one
perturbations of rectangular matrices Benaych-Georges & Nadakuditi 2012). Only the first is a trap: the mean is removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ww_monitor.spectra import lanczos, shuffle
from ww_monitor.spectra.device import accelerator_of
from ww_monitor.spectra.eigenvalues import eigenvalues, eigenvalues_of_gram
from ww_monitor.spectra.elements import Elements
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE, johnstone, tracy_widom_quantile, tracy_widom_sf

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

CLEARLY_BELOW, CLEARLY_ABOVE = 3.5, 5.0
"""A first shuffle with λmax so many Tracy–Widom scales below or above the threshold is the only one. Both were chosen,
of thirteen pairs tried, on a pilot of the first seed of `python -m benchmarks.early_stop`: 250 matrices of each of 26
laws of elements at each of four shapes. 53 % of the 20,487 that are shuffled are decided by one shuffle, and of these
0.31 % would be decided otherwise by three and 0.19 % by fifteen; three say other than fifteen in 5.4 % of all. Matrices
of another seed, on which nothing was chosen, gave 0.22 % and 0.19 % of 3,143. Laws that put λmax at the threshold are
far worse, though few of theirs are decided early: with one entry of 1.3 σ(NM)^¼ 6 % of 1,000 are, and 8 of those some
60 get another verdict than by three shuffles; with 1.2, 9 of some 170."""

LEAST_LANCZOS_SIDE = 384
"""Short side from which Lanczos' iteration beats the whole spectrum on the host, measured in CPU seconds: on the
weights of all-MiniLM-L6-v2, with a short side of 384, 16 ms a shuffle against 25."""

MEMORY = 256 << 20
"""Bytes that a device may take for shuffled weights at a time where more of it is free, for a single matrix more. Our
choice, a quarter of the GiB that a look may take."""


@dataclass(frozen=True)
class Shuffled:
    """The largest eigenvalues of shuffled matrices, `[K, replicas]` float64 on the host; NaN in replicas not drawn.

    Attributes:
        num_traps: Eigenvalues above the Tracy–Widom quantile.
        severity: λmax divided by the upper Marchenko–Pastur edge.
        p_value: Probability that a random matrix has an eigenvalue as large.
        permuted_on: What has permuted them and why, where it is not the device that has them; `""` else.
    """

    num_traps: torch.Tensor
    severity: torch.Tensor
    p_value: torch.Tensor
    permuted_on: str = ""

    @property
    def mean_count(self) -> torch.Tensor:
        """`[K]` mean number of traps of the replicas that were drawn."""
        return self.num_traps.nanmean(1)

    @property
    def mean_severity(self) -> torch.Tensor:
        """`[K]` mean severity of the replicas that were drawn."""
        return self.severity.nanmean(1)

    @property
    def median_p_value(self) -> torch.Tensor:
        """`[K]` median probability over the replicas that were drawn; of two the smaller."""
        return self.p_value.nanmedian(1).values


@dataclass(frozen=True)
class Edge:
    """Johnstone's law of λmax for unit variance, and the quantile from which a trap counts, in scales above the centre.

    `upper` is the upper Marchenko–Pastur edge.
    """

    centre: float
    scale: float
    quantile: float
    upper: float

    @classmethod
    def of(cls, shape: Sequence[int], significance: float = SIGNIFICANCE) -> Edge:
        """That of `[N, M]` matrices, with this probability of a false trap."""
        n, m = float(max(shape)), float(min(shape))
        sides = (torch.tensor(side, dtype=torch.float64, device="cpu") for side in (n, m))
        centre, scale = (float(t) for t in johnstone(*sides))
        return cls(centre, scale, tracy_widom_quantile(significance), (n**0.5 + m**0.5) ** 2)

    @property
    def threshold(self) -> float:
        """The λ above which an eigenvalue is a trap."""
        return self.centre + self.quantile * self.scale

    def is_clear(self, largest: torch.Tensor) -> torch.Tensor:
        """Whether λmax of one shuffle is so far from the threshold that no other shuffle is asked."""
        above = (largest - self.threshold) / self.scale
        return (above < -CLEARLY_BELOW) | (above > CLEARLY_ABOVE)


def shuffled(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    stats: Elements,
    *,
    seed: int,
    replicas: int = REPLICAS,
    significance: float = SIGNIFICANCE,
    stop_early: bool = True,
    memory: int | None = None,
) -> Shuffled:
    """#{λ(shuffled W − mean) > σ²(centre + q·scale)}: traps counted against Johnstone's Tracy–Widom law.

    Each replica permutes all matrices alike, from a generator of its own: a series over training steps shares its
    random numbers. A device draws its own: what depends on them, as a λmax at the threshold does, is the same as on the
    host in law only; planted traps are counted alike. Where half of what is free does not suffice to draw a
    permutation, the host draws it; where it does not suffice for one matrix, the host shuffles.

    Only these numbers are computed, by Lanczos' iteration; matrices that are small, or for which it comes to no certain
    answer, get their whole spectrum, with the same counts and λmax to 1e-9. On the host matrix by matrix, on a device
    as many at once as the memory allows, and the host waits for it a few times in all.

    Args:
        matrices: K of one shape `[N, M]` and one device, any floating dtype.
        stats: Their `elements`, K rows.
        seed: Seed of replica 0; replica r uses its own stream.
        replicas: Number of shuffles.
        significance: Probability of a false trap in one replica of one matrix.
        stop_early: Draw no further replica of a matrix whose first is clear by `CLEARLY_BELOW` or `CLEARLY_ABOVE`, or
            of which more than half have said the same.
        memory: Bytes that a device may take at a time, at most half of what is free, `MEMORY` if None; a single matrix
            may need more.
    """
    edge, (rows, columns) = Edge.of(matrices[0].shape, significance), matrices[0].shape
    counts = torch.full((len(matrices), replicas), float("nan"), dtype=torch.float64, device="cpu")
    largest, open_ = counts.clone(), torch.arange(len(matrices), dtype=torch.int64, device="cpu")
    here, iterate = [one.detach() for one in matrices], min(rows, columns) >= LEAST_LANCZOS_SIDE
    one = 8 * (4 * min(rows, columns) ** 2 + (0 if iterate else 2 * rows * columns))
    accelerator, on_host = accelerator_of(here[0].device), shuffle.on_host(here[0])
    spare = math.inf if on_host or accelerator is None else accelerator.spare()
    on_device = not on_host and one <= spare
    draws = on_device and shuffle.bytes_to_draw(rows * columns) <= spare
    if not on_device:
        here = [matrix.cpu() for matrix in here]
    at_once = 1 if iterate and not on_device else max(1, int(min(memory or MEMORY, spare)) // one)
    measure = (_by_lanczos if on_device else _by_rows) if iterate else _by_full_spectrum
    with torch.autocast(here[0].device.type, enabled=False):  # the host's products are in float32
        for replica in range(replicas):
            stream = shuffle.stream(seed, replica)
            if draws:
                order = shuffle.draw(rows * columns, stream, here[0].device)
            else:
                order = shuffle.permutation(rows * columns, seed=seed, replica=replica)
            for which in torch.split(open_, at_once):
                part = [here[k] for k in which.tolist()]
                found = measure(part, stats.take(which), order, edge.threshold, stream)
                counts[which, replica], largest[which, replica] = found
            del order  # a device's memory may not have room for the next beside it
            if stop_early:
                open_ = open_[~_is_decided(counts[open_], largest[open_, 0], edge)]
            if not len(open_):
                break
    p_value = tracy_widom_sf((largest - edge.centre) / edge.scale)
    return Shuffled(counts, largest / edge.upper, p_value, "" if on_host or draws else "cpu: no memory")


def _is_decided(counts: torch.Tensor, first: torch.Tensor, edge: Edge) -> torch.Tensor:
    """`[K]` whether the rest of the replicas could hardly change the verdict of `[K, replicas]` counts."""
    majority = counts.shape[1] / 2  # a replica not drawn is NaN and speaks for neither
    return edge.is_clear(first) | ((counts > 0).sum(1) > majority) | ((counts == 0).sum(1) > majority)


def _by_lanczos(
    matrices: Sequence[torch.Tensor], stats: Elements, order: torch.Tensor, threshold: float, seed: int
) -> torch.Tensor:
    """Count above the threshold and λmax `[2, K]`, from the whole spectrum where the iteration does not settle them."""
    gram = shuffle.gram_of_shuffled(matrices, stats, order)
    found = lanczos.outliers(gram, threshold=threshold, seed=seed)
    result = torch.from_numpy(np.stack([found.count.astype(np.float64), found.largest]))
    unknown = torch.from_numpy(~found.known)
    if unknown.any():
        left = gram[unknown.to(gram.device)]
        trace = left.diagonal(dim1=1, dim2=2).sum(1)
        spectrum = eigenvalues_of_gram(left, trace, long_side=max(matrices[0].shape)).values
        result[:, unknown] = _count_and_largest(spectrum, threshold)
    return result


def _by_rows(
    matrices: Sequence[torch.Tensor], stats: Elements, order: torch.Tensor, threshold: float, seed: int
) -> torch.Tensor:
    """The same of a matrix on the host, where float32 is the faster: directions by it, their eigenvalues from rows."""
    rows = shuffle.Shuffled(matrices[0], stats, order)
    found = lanczos.outliers(rows.gram()[None], threshold=threshold, seed=seed, exact=rows.image)
    if not found.known[0]:  # such as outliers beside which float32 rounds the others away
        return _by_lanczos(matrices, stats, order, threshold, seed)
    return torch.from_numpy(np.stack([found.count.astype(np.float64), found.largest]))


def _by_full_spectrum(
    matrices: Sequence[torch.Tensor], stats: Elements, order: torch.Tensor, threshold: float, seed: int
) -> torch.Tensor:
    """Count above the threshold and λmax `[2, K]` from all eigenvalues of all matrices."""
    stack = shuffle.mixed(matrices, order).double()
    spectrum = eigenvalues(stack.sub_(stats.mean.to(stack.device)[:, None, None])).values
    variance = stats.std.square()
    return _count_and_largest(spectrum / variance.to(spectrum.device)[:, None], threshold)


def _count_and_largest(spectrum: torch.Tensor, threshold: float) -> torch.Tensor:
    return torch.from_numpy(lanczos.read(torch.stack([(spectrum > threshold).sum(1).double(), spectrum[:, -1]])))
