"""Correlation traps: outliers that stay when the entries of a matrix are shuffled, and what causes them.

Shuffling leaves only the histogram of the elements. An outlier of the shuffled matrix therefore has one of two
causes: entries with |w| > σ(NM)^¼, or a mean with |mean| > σ(NM)^-¼ (Baik, Ben Arous & Péché 2005; for rank-one
perturbations of rectangular matrices Benaych-Georges & Nadakuditi 2012). Only the first is a trap here: every
function below works on the de-meaned matrix and reports the mean apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ww_monitor.spectra.eigenvalues import eigenvalues
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

_TRIM_ROUNDS = 50


@dataclass(frozen=True)
class Elements:
    """The element histogram of B matrices in four numbers, each field `[B]` float64.

    Attributes:
        mean: Mean of the bulk: of the entries within `std · (NM)^¼` of it.
        std: Standard deviation of the same entries.
        headroom: max|w − mean| / (std (NM)^¼); 1 = a trap is expected. NaN for a constant matrix.
        mean_shift: |mean| (NM)^¼ / std; 1 = the mean is an outlier of its own. NaN for a constant matrix.
    """

    mean: torch.Tensor
    std: torch.Tensor
    headroom: torch.Tensor
    mean_shift: torch.Tensor


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


@dataclass(frozen=True)
class LargeEntries:
    """The K largest entries above the threshold, largest first.

    Attributes:
        index: `[K, 3]` slice, row and column, as stored.
        value: `[K]` the weights.
        headroom: `[K]` |w − mean| / (std (NM)^¼), each above 1.
    """

    index: torch.Tensor
    value: torch.Tensor
    headroom: torch.Tensor


def elements(matrices: torch.Tensor) -> Elements:
    """Headroom = max|w − mean| / (σ (NM)^¼), mean_shift = |mean| (NM)^¼ / σ, with σ trimmed of entries above σ(NM)^¼.

    Mean and σ are those of the entries that are not trimmed; this repeats until as many are kept as before. Without it
    a few large entries would hide in the variance that they inflate and drag the mean. O(NM), no eigensolve.

    Args:
        matrices: `[B, N, M]`, finite, any floating dtype.

    >>> w = torch.randn(100, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> w[3, 7] = 12.0
    >>> round(elements(w[None]).headroom.item(), 2)       # 12 / 5000^¼ = 1.43
    1.42
    """
    flat = matrices.flatten(1)
    count = flat.shape[1]
    mean = flat.sum(1, dtype=torch.float64) / count
    low, high = flat.aminmax(dim=1)
    largest = torch.maximum(high.double() - mean, mean - low.double())
    std = (
        ((torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square() / count) - mean.square())
        .clamp(min=0)
        .sqrt()
    )
    reach = count**0.25
    needs_care = (largest > std * reach) | (std < 1e-3 * mean.abs())
    for b in torch.nonzero(needs_care).flatten().tolist():
        mean[b], std[b] = _trimmed(flat[b].double(), reach)
        largest[b] = (flat[b].double() - mean[b]).abs().amax()
    std = torch.where(std > 1e-12 * mean.abs(), std, float("nan"))
    return Elements(mean=mean, std=std, headroom=largest / (std * reach), mean_shift=mean.abs() * reach / std)


def _trimmed(entries: torch.Tensor, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the entries within `reach` standard deviations of the mean, iterated."""
    kept = entries
    for _ in range(_TRIM_ROUNDS):
        mean, std = kept.mean(), kept.std(correction=0)
        inside = entries[(entries - mean).abs() <= std * reach]
        if len(inside) == len(kept):
            break
        kept = inside
    return mean, std


def large_entries(matrices: torch.Tensor, stats: Elements, *, limit: int = 8) -> LargeEntries:
    """{(s, i, j): |w_sij − mean_s| > σ_s (NM)^¼}, the addresses of the traps.

    Args:
        matrices: `[slices, N, M]` of one layer.
        stats: Its `elements`, one row a slice.
        limit: At most this many entries.
    """
    reach = (matrices.shape[1] * matrices.shape[2]) ** 0.25
    ratio = (matrices.double() - stats.mean[:, None, None]).abs() / (stats.std * reach)[:, None, None]
    top = torch.nan_to_num(ratio, nan=0.0).flatten().topk(min(limit, ratio.numel()))
    above = top.values > 1.0
    where = top.indices[above]
    plane, rest = where // matrices[0].numel(), where % matrices[0].numel()
    index = torch.stack([plane, rest // matrices.shape[2], rest % matrices.shape[2]], 1)
    return LargeEntries(index, matrices.flatten()[where], top.values[above])


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

    Args:
        matrices: `[B, N, M]`.
        stats: Their `elements`.
        seed: Seed of replica 0; replica r uses its own stream.
        replicas: Number of shuffles.
        significance: Probability of a false trap in one replica of one matrix.
    """
    b, rows, columns = matrices.shape
    long_side, short_side = max(rows, columns), min(rows, columns)
    centre, scale = (float(t) for t in johnstone(torch.tensor(float(long_side)), torch.tensor(float(short_side))))
    variance = stats.std.square()
    centred = (matrices.double() - stats.mean[:, None, None]).flatten(1)
    counts, severities, deviates = [], [], []
    for replica in range(replicas):
        order = permutation(rows * columns, seed=seed, replica=replica).to(matrices.device)
        spectrum = eigenvalues(centred[:, order].view(b, rows, columns)).values
        counts.append((spectrum > (variance * (centre + tracy_widom_quantile(significance) * scale))[:, None]).sum(1))
        severities.append(spectrum[:, -1] / (variance * (long_side**0.5 + short_side**0.5) ** 2))
        deviates.append((spectrum[:, -1] / variance - centre) / scale)
    p_value = tracy_widom_sf(torch.stack(deviates, 1))
    return Shuffled(torch.stack(counts, 1), torch.stack(severities, 1), p_value)


def permutation(size: int, *, seed: int, replica: int) -> torch.Tensor:
    """A permutation of `size` that depends on nothing but its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + replica) % (1 << 63))
    return torch.randperm(size, generator=generator)
