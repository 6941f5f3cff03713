"""The few largest eigenvalues of WᵀW, without its Gram matrix: what decides whether a matrix has outliers.

The iteration runs in float32 and only has to find directions; their eigenvalues and residuals are computed afterwards
in float64. Whatever is not settled within the bounds of this file is returned as not known, and the caller computes
the whole spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

MOST_OUTLIERS = 12
"""With more outliers than this, from 16 on at 3072 × 768, the whole spectrum was as cheap."""

MISS = 1e-4
"""Probability, over the start vector, of not seeing an eigenvalue that lies exactly at the threshold; one that lies
above it is missed less often, exponentially in the root of the distance. Our choice."""

RELATIVE_ERROR = 1e-9
"""Largest accepted estimate of the relative error of λmax, from its float64 residual; and the relative distance from
the threshold up to which an eigenvalue is left undecided."""

_FIRST_CHECK = 10
_LONGEST_WAIT = 12
"""Steps before the first look at the Ritz values, and at most between two looks."""

_NEIGHBOURS = 4
"""Ritz vectors beside the largest that are refined with it: its error lies mostly along them."""

_CHUNK = 1 << 16
"""Elements that are in float64 at a time: half a MiB, which stays in the cache and is reused by the allocator."""

_STOP = 1e-12
"""Estimated relative error of λmax at which the iteration stops. Far below what is asked for, because the estimate
knows only the Ritz values that have appeared: while the start vector hides the largest eigenvector, the second poses
as the largest."""

_ROUGH = 1e-3
"""Relative residual of the other outliers. Their own error is its square; only their number is reported."""

_STEPS_SHARE = 4
"""A quarter of the short side is the limit of steps: beyond, the whole spectrum is cheaper."""

_BREAKDOWN = 1e-5
"""A new direction this small beside the largest eigenvalue is float32 rounding: the Krylov space is exhausted."""


@dataclass(frozen=True)
class Outliers:
    """What lies above the threshold.

    Attributes:
        count: Number of eigenvalues above it.
        largest: λmax, whether above it or not.
    """

    count: int
    largest: float


@dataclass(frozen=True)
class _Run:
    """Vectors `[count, M]` of the outliers in a complement or, if it is shown to hold none, of its largest values."""

    vectors: np.ndarray
    complete: bool
    steps: int


@dataclass(frozen=True)
class _Ritz:
    """The largest Ritz values, descending, their coordinates `[steps, count]` in the basis, and residual norms."""

    values: np.ndarray
    coordinates: np.ndarray
    residuals: np.ndarray

    def above(self, threshold: float) -> int:
        """How many exceed the threshold."""
        return int((self.values > threshold).sum())

    def steps_to_go(self, threshold: float, *, side: int, steps: int, alone: bool) -> float:
        """0 if another step would change nothing that counts, else an estimate of how many are needed.

        λmax itself is of interest only where nothing was found before.
        """
        above = self.above(threshold)
        if above > MOST_OUTLIERS:
            return 0.0
        error = _error(self.values, self.residuals) / self.values[0]
        if above:
            worst = float((self.residuals[:above] / self.values[:above]).max())
            return self._until(max(error / _STOP, (worst / _ROUGH) ** 2))
        distance = 1.0 - self.values[0] / threshold
        needed = math.log(1.648 * math.sqrt(side) / MISS) / math.sqrt(distance)
        return max((needed + 1) / 2 - steps, self._until(error / _STOP) if alone else 0.0)

    def _until(self, excess: float) -> float:
        """Steps in which an error falls by this factor, from its rate exp(−4 √(relative gap)) a step."""
        gap = max(1.0 - self.values[1] / self.values[0], 1e-6)
        return max(math.log(max(excess, 1e-300)) / (4 * math.sqrt(gap)), 0.0)


def outliers(matrix: torch.Tensor, *, mean: float, std: float, threshold: float, seed: int) -> Outliers | None:
    """#{λ > threshold} and λmax of AᵀA, A = (W − mean)/std, by Lanczos' iteration v → Aᵀ(Av) from random starts.

    The iteration is Golub & Kahan's (1965) with the right vectors only, each orthogonalised against all before it,
    twice. Ritz values never exceed eigenvalues, so those above the threshold are a lower bound of the count. A run on
    the complement of what was found gives the upper bound: by Courant–Fischer the count is no larger once nothing in
    the complement of `count` vectors, be they exact or not, exceeds the threshold. This also finds repeated
    eigenvalues, of which one run sees a single copy. That a run has not missed the largest eigenvalue λ of its
    complement by more than ελ has a probability of at least 1 − 1.648 √M exp(−√ε (2k − 1)) after k steps
    (Kuczyński & Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13, theorem 4.2); it is brought below `MISS`.

    Args:
        matrix: `[N, M]` of any floating dtype, on the host.
        mean: Mean that is taken off.
        std: Unit of the entries, positive.
        threshold: In units of std², positive.
        seed: Seed of the start vectors, nothing else is random.

    Returns:
        None if it is not known: more than `MOST_OUTLIERS`, an eigenvalue at the threshold, a Krylov space that is
        exhausted, or no convergence within a quarter of the short side.

    >>> w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    >>> w[3, 7] = 60.0
    >>> outliers(w, mean=0.0, std=1.0, threshold=1100.0, seed=0)
    Outliers(count=1, largest=4150.12...)
    """
    if not (std > 0 and math.isfinite(1.0 / std)):
        return None
    with np.errstate(all="ignore"):  # overflow and NaN end in a size that is not finite
        return _outliers(matrix, mean, std, threshold, seed)


def _outliers(matrix: torch.Tensor, mean: float, std: float, threshold: float, seed: int) -> Outliers | None:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    a = _standardized(matrix, mean, std)
    a = a if a.shape[0] >= a.shape[1] else a.T
    rng = np.random.default_rng(seed)
    found = np.empty((0, a.shape[1]), dtype=np.float32)
    steps_left = a.shape[1] // _STEPS_SHARE
    while len(found) <= MOST_OUTLIERS:
        run = _run(a, rng, found, threshold=threshold, most_steps=steps_left)
        if run is None:
            return None
        if run.complete:
            beyond = run.vectors[: 1 if len(found) else _NEIGHBOURS]
            return _refined(tall, mean, std, np.vstack([found, beyond]), count=len(found), threshold=threshold)
        found = np.vstack([found, run.vectors])
        steps_left -= run.steps
    return None


def _standardized(matrix: torch.Tensor, mean: float, std: float) -> np.ndarray:
    """(W − mean)/std in float32, rounded once."""
    entries = matrix.reshape(-1)
    result = torch.empty(entries.shape, dtype=torch.float32)
    for start in range(0, len(entries), _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = (entries[part].double() - mean).mul_(1.0 / std)
    array: np.ndarray = result.view(matrix.shape).numpy()
    return array


def _run(
    a: np.ndarray, rng: np.random.Generator, found: np.ndarray, *, threshold: float, most_steps: int
) -> _Run | None:
    """Lanczos' iteration in the complement of `found`, until it is settled."""
    known = len(found)
    basis = np.empty((known + max(most_steps, 0), a.shape[1]), dtype=np.float32)
    basis[:known] = found
    on_diagonal: list[float] = []
    beside: list[float] = []
    v = _complement(rng.standard_normal((int(a.shape[1]),), dtype=np.float32), found)
    v /= np.linalg.norm(v)
    check = _FIRST_CHECK
    for step in range(1, most_steps + 1):
        basis[known + step - 1] = v
        product = a.T @ (a @ v)
        on_diagonal.append(float(v @ product))
        rest = _complement(product, basis[: known + step])
        size = float(np.linalg.norm(rest))
        if not math.isfinite(size):
            return None
        exhausted = size <= _BREAKDOWN * max(on_diagonal)
        if step >= check or exhausted:
            ritz = _ritz(on_diagonal, beside, size, threshold)
            above = ritz.above(threshold)
            if exhausted and not above:
                return None
            to_go = 0.0 if exhausted else ritz.steps_to_go(threshold, side=a.shape[1], steps=step, alone=known == 0)
            if to_go == 0:
                vectors = ritz.coordinates[:, : above or _NEIGHBOURS].T.astype(np.float32) @ basis[known : known + step]
                return _Run(vectors, complete=above == 0, steps=step)
            check = step + math.ceil(min(max(to_go, 2), _LONGEST_WAIT))
        beside.append(size)
        v = rest / np.float32(size)
    return None


def _complement(v: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """V minus its projection on orthonormal rows, twice because once leaves rounding behind."""
    for _ in range(2):
        v = v - (rows @ v) @ rows
    return v


def _ritz(on_diagonal: list[float], beside: list[float], rest: float, threshold: float) -> _Ritz:
    """The Ritz values above the threshold and some more, descending."""
    steps = len(on_diagonal)
    wanted = _NEIGHBOURS
    while True:
        values, vectors = eigh_tridiagonal(
            on_diagonal, beside, select="i", select_range=(max(0, steps - wanted), steps - 1)
        )
        if values[0] <= threshold or wanted >= min(steps, MOST_OUTLIERS + 1):
            return _Ritz(values[::-1], vectors[:, ::-1], rest * np.abs(vectors[-1, ::-1]))
        wanted *= 2


def _refined(
    tall: torch.Tensor, mean: float, std: float, basis: np.ndarray, *, count: int, threshold: float
) -> Outliers | None:
    """Rayleigh–Ritz in float64 on the span of the rows of `basis`."""
    q = np.linalg.qr(basis.T.astype(np.float64)).Q
    image = np.zeros((q.shape[1], q.shape[0]))
    rows = max(1, _CHUNK // tall.shape[1])
    for start in range(0, tall.shape[0], rows):
        part = (tall[start : start + rows].double() - mean).mul_(1.0 / std).numpy()
        image += (q.T @ part.T) @ part
    values, rotation = np.linalg.eigh(image @ q)
    residuals = np.linalg.norm(image.T @ rotation - (q @ rotation) * values, axis=0)
    values, residuals = values[::-1], residuals[::-1]
    decided = bool((np.abs(values - threshold) > RELATIVE_ERROR * threshold).all())
    if not decided or int((values > threshold).sum()) != count:
        return None
    if not _error(values, residuals) <= RELATIVE_ERROR * values[0]:
        return None
    return Outliers(count=count, largest=float(values[0]))


def _error(values: np.ndarray, residuals: np.ndarray) -> float:
    """λmax − θmax ≤ min over j of Σ_{i ≤ j} r_i² / (θmax − θ_{j+1}), with Ritz values for the eigenvalues beyond j."""
    gaps = np.maximum(values[0] - values[1:], np.finfo(np.float64).tiny)
    return float((np.cumsum(residuals[:-1] ** 2) / gaps).min())
