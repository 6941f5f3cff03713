"""The few largest eigenvalues of Gram matrices without the others: what decides whether a matrix has outliers.

The host takes a matrix at a time and iterates in float32, which only has to find directions, whose eigenvalues it
computes in float64. A device, whose float32 may be rounded further at the user's wish, iterates on all matrices of a
side in float64 and is read once every some steps. For what is not known then the caller computes the whole spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh, lapack

from ww_monitor.spectra.device import read_together

BLOCKS = (6, 16)
"""Start vectors of the first run, and of a second for matrices that have more outliers than the first can tell apart.
A product of a Gram matrix of side 768 with eight vectors takes as long as with four, but the small problem grows; of
twelve matrices with Student t elements a block of 4 left two unsettled, and needed 40 steps, one of 6 34, of 8 30."""

MISS = 1e-4
"""Probability, over the start vectors, of not seeing an eigenvalue that lies exactly at the threshold; one that lies
above it is missed less often, exponentially in the root of the distance. Our choice."""

RELATIVE_ERROR = 1e-9
"""Relative distance from the threshold up to which an eigenvalue is left undecided."""

_STOP = 1e-10
"""Estimated relative error of λmax at which the iteration stops: below the 1e-9 that is promised, because the estimate
knows only the Ritz values that have appeared."""

_FIRST_CHECK, _LONGEST_WAIT = 16, 12
"""Steps before the first look at the Ritz values, and at most between two looks. Few matrices are settled earlier."""

_NEIGHBOURS = 4
"""Ritz values that are looked at beside those that may be outliers: the error of λmax lies mostly along them."""

_STEPS_SHARE, _LEAST_STEPS, _BASIS_SHARE = 16, 32, 0.75
"""A sixteenth of the side is the limit of steps, or 32 where that is more, and the basis may have so much of the side:
beyond, the whole spectrum is cheaper (at side 768 it takes as long as 57 steps in float64)."""

_EXHAUSTED = 4096
"""A new direction of so many units of rounding beside the largest eigenvalue is none: the Krylov space is exhausted."""

_ROUNDING = 1e-5
"""What float32 may move an eigenvalue by, beside the largest. Ritz values that have moved more are not believed."""


@dataclass(frozen=True)
class Outliers:
    """Number of eigenvalues above the threshold and λmax, `[K]` on the host; they mean nothing where not `known`."""

    count: np.ndarray
    largest: np.ndarray
    known: np.ndarray


def read(tensor: torch.Tensor) -> np.ndarray:
    """The tensor on the host: the only place where shuffling waits for a device."""
    array: np.ndarray = read_together([tensor])[0].numpy()
    return array


Exact = Callable[[torch.Tensor], torch.Tensor]


def outliers(gram: torch.Tensor, *, threshold: float, seed: int, exact: Exact | None = None) -> Outliers:
    """#{λ > threshold} and λmax of symmetric positive semidefinite matrices, by block Lanczos from b random vectors.

    Each block is orthogonalised against the two before it and then against all (Golub & Underwood 1977). Ritz
    values never exceed eigenvalues, so those above the threshold are a lower bound of the count c. For the upper bound:
    b − c combinations of the start vectors are orthogonal to the c largest eigenvectors and, being chosen by
    coordinates that are independent of the others, random in their complement. That Lanczos' iteration from one of
    them has missed the largest eigenvalue λ there by more than ελ has a probability of at most 1.648 √M exp(−√ε (2k −
    1)) after k steps (Kuczyński & Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13, theorem 4.2), that all have missed
    it the (b − c)-th power; the block holds the spaces of all, and the power is brought below `MISS`. On the host a
    Cholesky factor is sought where that would take more steps than λmax: it leaves nothing to chance, and was as fast
    as ten steps at side 768.

    Args:
        gram: `[K, M, M]` float64, on the host or a device; or float32 of one matrix on the host.
        threshold: Eigenvalue from which on one counts as an outlier; positive.
        seed: Seed of the start vectors, nothing else is random.
        exact: Product of float64 rows `[b, M]` with the Gram matrix in float64, where `gram` is float32: its vectors
            then are directions, in which the eigenvalues are computed anew.

    Returns:
        Not known are: `BLOCKS[-1]` outliers or more, an eigenvalue at the threshold, a Krylov space that is exhausted,
        a matrix that is not finite, and what has not converged within the steps that are worth it.

    >>> values = torch.linspace(0.0, 10.0, 300, dtype=torch.float64)
    >>> values[7] = 30.0
    >>> outliers(torch.diag(values)[None], threshold=11.0, seed=0)
    Outliers(count=array([1]), largest=array([30.]), known=array([ True]))
    """
    result = Outliers(np.zeros(len(gram), np.int64), np.full(len(gram), np.nan), np.zeros(len(gram), bool))
    open_ = np.arange(len(gram))
    for block in BLOCKS:
        part = gram if len(open_) == len(gram) else gram[torch.from_numpy(open_).to(gram.device)]  # which copies
        verdicts = _Run(part, block, seed, exact).verdicts(threshold)
        for k, verdict in zip(open_, verdicts, strict=True):
            if verdict.to_go == 0:
                result.count[k], result.largest[k], result.known[k] = verdict.above, verdict.largest, True
        open_ = open_[[verdict.above >= block for verdict in verdicts]]
        if not len(open_):
            break
    return result


@dataclass(frozen=True)
class _Verdict:
    """What the Ritz values of one matrix say, and an estimate of the steps until they say enough (0: they do)."""

    above: int = 0
    largest: float = math.nan
    to_go: float = math.inf


class _Run:
    """Block Lanczos on all matrices `[K, M, M]` at once, from the same start vectors."""

    def __init__(self, gram: torch.Tensor, block: int, seed: int, exact: Exact | None) -> None:
        self.gram, self.block, self.steps, self.exact = gram, block, 0, exact
        side = gram.shape[1]
        self.rounding = _EXHAUSTED * torch.finfo(gram.dtype).eps
        self.limit = min(max(_LEAST_STEPS, side // _STEPS_SHARE), int(_BASIS_SHARE * side) // block)
        # of one matrix without the first axis: a product of batches takes twice as long
        self.matrix = gram[0] if len(gram) == 1 else gram
        self.basis = self.matrix.new_empty(*self.matrix.shape[:-2], (self.limit + 1) * block, side)
        generator = torch.Generator(device=gram.device).manual_seed(seed)
        start = torch.randn(block, side, generator=generator, dtype=gram.dtype, device=gram.device)
        self.basis[..., :block, :] = _orthonormal(start)[0]
        self.projected = np.zeros((len(gram), *2 * ((self.limit + 1) * block,)))

    def verdicts(self, threshold: float) -> list[_Verdict]:
        """One a matrix, as soon as all are settled or the steps are used up."""
        found = [_Verdict()] * len(self.gram)
        waiting, check = list(range(len(found))), _FIRST_CHECK
        while waiting and self.steps < self.limit:
            self._extend(min(check, self.limit))
            for k in waiting:
                found[k] = self._judge(self.projected[k], threshold)
            waiting = [k for k in waiting if 0 < found[k].to_go < math.inf]
            longest = max((found[k].to_go for k in waiting), default=0.0)
            check = self.steps + math.ceil(min(max(longest, 2), _LONGEST_WAIT))
        return found

    def _extend(self, steps: int) -> None:
        """Go on to so many steps; the host reads once."""
        b, new = self.block, []
        for step in range(self.steps, steps):
            v, known = self.basis[..., step * b : (step + 1) * b, :], self.basis[..., : (step + 1) * b, :]
            last = known[..., max(0, step - 1) * b :, :]  # against the others w is orthogonal but for rounding
            w = v @ self.matrix
            new.append((w @ v.mT).double())
            for rows in (last, known):
                w = w - (w @ rows.mT) @ rows
            self.basis[..., (step + 1) * b : (step + 2) * b, :], beside = _orthonormal(w)
            new.append(beside)
        blocks = read(torch.stack(new, -3)).reshape(len(self.gram), -1, b, b)
        for at in range(self.steps * b, steps * b, b):  # eigh reads the lower triangle
            own, beside_it = blocks[:, 2 * (at // b - self.steps)], blocks[:, 2 * (at // b - self.steps) + 1]
            self.projected[:, at : at + b, at : at + b] = own
            self.projected[:, at + b : at + 2 * b, at : at + b] = beside_it.swapaxes(1, 2)
        self.steps = steps

    def _judge(self, projected: np.ndarray, threshold: float) -> _Verdict:
        """Rayleigh–Ritz on the basis of one matrix: count, λmax, and whether another step would change them."""
        n = self.steps * self.block
        beside = projected[n : n + self.block, n - self.block : n]
        if not np.isfinite(projected[: n + self.block, : n + self.block]).all():  # also of a block without a factor
            return _Verdict()
        wanted = (max(0, n - self.block - _NEIGHBOURS), n - 1)
        values, vectors = eigh(projected[:n, :n], subset_by_index=wanted, driver="evr", check_finite=False)
        values, vectors = values[::-1], vectors[:, ::-1]
        residuals = np.linalg.norm(beside @ vectors[-self.block :], axis=0)
        above = int((values > threshold).sum())
        at_threshold = bool((np.abs(values - threshold) <= RELATIVE_ERROR * threshold).any())
        if above >= self.block or at_threshold or np.abs(beside.diagonal()).min() <= self.rounding * values[0]:
            return _Verdict(above)
        settled = _steps_to_certainty(values, residuals, above, threshold, self)
        if self.exact is None and _steps_to_certainty(values, 0 * residuals, above, threshold, self) > self.limit:
            return _Verdict(above)  # the next eigenvalue is too near to the threshold
        gap = max(1.0 - values[min(self.block, len(values) - 1)] / values[0], 1e-6)
        excess = _error(values, residuals) / (_STOP * values[0])
        to_go = max(math.log(max(excess, 1e-300)) / (4 * math.sqrt(gap)), 0.0)  # the error falls by exp(−4 √gap) a step
        if self.exact is None:
            to_go = max(to_go, settled - self.steps)
        elif to_go == 0:
            kept = above + _NEIGHBOURS
            rows = torch.from_numpy(vectors[:, :kept].T.astype(np.float32)) @ self.basis[:n]
            return self._refined(rows, values[:kept], above, threshold, certain=settled <= self.steps)
        # infinity gives up, but a bound that reaches the threshold now may fall with the residuals
        return _Verdict(above, float(values[0]), min(to_go, 2.0 * _LONGEST_WAIT))

    def _refined(
        self, rows: torch.Tensor, expected: np.ndarray, above: int, threshold: float, *, certain: bool
    ) -> _Verdict:
        """Rayleigh–Ritz in float64 on Ritz vectors `rows`; not known where it differs from float32 or is not sure."""
        assert self.exact is not None
        rows = torch.linalg.qr(rows.mT.double()).Q.mT
        image = self.exact(rows)
        values, rotation = np.linalg.eigh((image @ rows.mT).numpy())
        turn = torch.from_numpy(rotation.T)
        rows, image, values = (turn @ rows).flip(0), (turn @ image).flip(0), values[::-1]
        residuals = np.linalg.norm(image.numpy() - values[:, None] * rows.numpy(), axis=1)
        margin = _ROUNDING * max(values[0], threshold)
        known = (
            bool(np.abs(values - expected).max() <= margin)
            and bool(np.abs(values - threshold).min() > RELATIVE_ERROR * threshold)
            and int((values > threshold).sum()) == above
            and _error(values, residuals) <= RELATIVE_ERROR * values[0]
            and (certain or _none_beside(self.gram[0], rows[:above], values[:above], threshold - margin))
        )
        return _Verdict(above, float(values[0]), to_go=0.0) if known else _Verdict()


def _none_beside(gram: torch.Tensor, rows: torch.Tensor, values: np.ndarray, level: float) -> bool:
    """Whether no more eigenvalues than there are rows lie above the level: level − G + Σ λ uuᵀ has a Cholesky factor.

    By Weyl's inequality λ of G beyond the first c is at most λmax of G − Σ λ uuᵀ, for any c vectors u.
    """
    rest = gram.neg()
    rest.diagonal().add_(level)
    scaled = (rows * torch.from_numpy(np.sqrt(values))[:, None]).to(gram.dtype)
    # by columns, as the transpose of what lies by rows does, LAPACK takes it in place; [1] is 0 where it has a factor
    return not lapack.spotrf(rest.addmm_(scaled.mT, scaled).numpy().T, lower=1, clean=0, overwrite_a=1)[1]


def _orthonormal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and L with LQ = rows `[…, b, M]`; NaN where they are dependent."""
    if rows.dtype == torch.float32:  # on the host, where this is the faster; too few digits for the other
        q, r = torch.linalg.qr(rows.mT)
        return q.mT, r.mT.double()
    factor, failed = torch.linalg.cholesky_ex(rows @ rows.mT)
    factor = torch.where((failed == 0)[..., None, None], factor, float("nan"))
    return torch.linalg.solve_triangular(factor, rows, upper=False), factor


def _steps_to_certainty(values: np.ndarray, residuals: np.ndarray, above: int, threshold: float, run: _Run) -> float:
    """Steps k after which another eigenvalue above the threshold is missed with a probability of `MISS`.

    Its vector in the basis is orthogonal to the outliers' eigenvectors; the Ritz vectors differ from these, which moves
    the next Ritz value by the second term at most.
    """
    next_ = values[above] + float((residuals[:above] ** 2 / (values[:above] - values[above])).sum())
    distance = 1.0 - (next_ + (_ROUNDING * values[0] if run.exact else 0.0)) / threshold
    if distance <= 0:
        return math.inf
    needed = math.log(1.648 * math.sqrt(run.gram.shape[1])) - math.log(MISS) / (run.block - above)
    return (needed / math.sqrt(distance) + 1) / 2


def _error(values: np.ndarray, residuals: np.ndarray) -> float:
    """λmax − θmax ≤ min over j of Σ_{i ≤ j} r_i² / (θmax − θ_{j+1}), with Ritz values for the eigenvalues beyond j."""
    gaps = np.maximum(values[0] - values[1:], np.finfo(np.float64).tiny)
    return float((np.cumsum(residuals[:-1] ** 2) / gaps).min())
