"""The table of metrics: name → function of a batch of spectra, unit, source, how to read it, model-level value.

A new metric is one decorated function here; snapshots, trackers, the README and `ww-monitor metrics` loop over the
table. A function gets a `Batch` and returns `[B]`; its docstring is the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ww_monitor.errors import InvalidArgument
from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.marchenko_pastur import Bulk, bulk
from ww_monitor.spectra.powerlaw import SMALL_SAMPLE, TailFit, fit_tail
from ww_monitor.spectra.status import Status

PRESETS = ("default", "weightwatcher")

POOR_FIT = 1.25
"""ks · √n_tail above which a tail is no power law: the 1 % point of the Kolmogorov–Smirnov test with an estimated
exponential scale (Lilliefors 1969, JASA 64), since ln λ of a power-law tail is exponential. The choice of xmin makes
it lenient."""


@dataclass
class Batch:
    """What was measured of B matrices of one shape.

    Attributes:
        slice_eigenvalues: `[B, R, M]` float64, ascending in the last dimension, in the scale of the layer.
        status: `[B]` `Status` of the eigensolve.
        long_side: N of a slice.
        dtype: Storage precision of the weights.
        preset: Whose definitions to use.
        trap_headroom, mean_shift, num_traps, trap_severity, trap_p_value: `[B]`, NaN where not measured.
        randomized: weightwatcher's shuffled spectra by row, under that preset.
    """

    slice_eigenvalues: torch.Tensor
    status: torch.Tensor
    long_side: int
    dtype: torch.dtype
    preset: str
    trap_headroom: torch.Tensor
    mean_shift: torch.Tensor
    num_traps: torch.Tensor
    trap_severity: torch.Tensor
    trap_p_value: torch.Tensor
    randomized: Sequence[weightwatcher.Randomized | None] = ()

    @property
    def slices(self) -> int:
        """R, slices of a layer."""
        return self.slice_eigenvalues.shape[1]

    @property
    def short_side(self) -> int:
        """M of a slice."""
        return self.slice_eigenvalues.shape[2]

    @cached_property
    def eigenvalues(self) -> torch.Tensor:
        """`[B, R·M]` pooled over the slices, ascending."""
        return self.slice_eigenvalues.flatten(1).sort(1).values

    @cached_property
    def floor(self) -> torch.Tensor:
        """`[B]` eigenvalues at or below it are numerically zero.

        The larger of the solver's error, N·2⁻⁵²·λmax, and the largest eigenvalue that rounding the weights to their
        storage precision makes by itself: (eps²/12)·mean(w²)·(√N + √M)², uniform rounding errors being a random
        matrix. weightwatcher's floor is 1e-5, whatever the scale.
        """
        if self.preset == "weightwatcher":
            return torch.full_like(self.eigenvalues[:, 0], weightwatcher.EIGENVALUE_FLOOR)
        n, m = self.long_side, self.short_side
        mean_square = self.eigenvalues.sum(1) / (self.slices * n * m)
        rounding = torch.finfo(self.dtype).eps ** 2 / 12 * mean_square * (n**0.5 + m**0.5) ** 2
        return torch.maximum(rounding, n * torch.finfo(torch.float64).eps * self.eigenvalues[:, -1])

    @cached_property
    def tail(self) -> TailFit:
        """The power-law fit."""
        return fit_tail(self.eigenvalues, floor=self.floor, allow_short=self.preset == "weightwatcher")

    @cached_property
    def bulk(self) -> Bulk:
        """The random bulk, from the closed form."""
        return bulk(self.eigenvalues, long_side=self.long_side, short_side=self.short_side, slices=self.slices)

    @cached_property
    def density_fits(self) -> list[weightwatcher.DensityFit | None]:
        """Weightwatcher's Marchenko–Pastur fits of the eigenvalues."""
        return [self._density_fit(row) for row in self.eigenvalues.cpu().numpy()]

    @cached_property
    def randomized_fits(self) -> list[weightwatcher.DensityFit | None]:
        """Weightwatcher's Marchenko–Pastur fits of the pooled shuffled eigenvalues."""
        return [self._density_fit(draw.pooled) if draw else None for draw in self.randomized]

    def _density_fit(self, row: np.ndarray) -> weightwatcher.DensityFit | None:
        return weightwatcher.fit_density(row, long_side=self.long_side, short_side=self.short_side)

    def per_row(self, values: Sequence[float]) -> torch.Tensor:
        """`[B]` from one number a row."""
        return torch.tensor(values, dtype=torch.float64, device=self.eigenvalues.device)


Function = Callable[[Batch], torch.Tensor]
Reducer = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    """Mean of the known values."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        name: Column, and part of the key.
        function: `Batch` → `[B]` float64, NaN where not known.
        definition: First line of the function's docstring.
        unit: Unit, `"1"` for a pure number.
        read: How to read it.
        source: Where the definition comes from.
        reduce: Known layer values → the model's value.
        needs: The measurement beyond the eigenvalues: `""`, `"elements"`, `"shuffled"` or `"randomized"`.
        standard: Computed when no metrics are named; the others cost a multiple of the rest.
    """

    name: str
    function: Function
    definition: str
    unit: str
    read: str
    source: str
    reduce: Reducer
    needs: str = ""
    standard: bool = True


TABLE: dict[str, dict[str, Metric]] = {preset: {} for preset in PRESETS}
"""Metrics by preset and name, in the order of the columns."""


def metric(
    *,
    unit: str = "1",
    source: str,
    read: str = "",
    reduce: Reducer = mean,
    needs: str = "",
    standard: bool = True,
    default: bool = True,
    weightwatcher: str = "",
) -> Callable[[Function], Function]:
    """Enter a function into the table.

    Args:
        unit: Unit of the value.
        source: Author, year and place of the definition.
        read: How to read the value.
        reduce: From the known values of the layers to the model's.
        needs: See `Metric.needs`.
        standard: See `Metric.standard`.
        default: Whether the default preset has it, under the function's name.
        weightwatcher: Its column under the other preset; `""` where that preset has it not.
    """

    def enter(function: Function) -> Function:
        definition = (function.__doc__ or "").strip().splitlines()[0]
        for preset, name in (("default", function.__name__ if default else ""), ("weightwatcher", weightwatcher)):
            if name:
                TABLE[preset][name] = Metric(name, function, definition, unit, read, source, reduce, needs, standard)
        return function

    return enter


def choose(names: Sequence[str] | str | None, preset: str) -> list[Metric]:
    """The metrics of these names; the standard ones for `None`, every one for `"all"`.

    Raises:
        InvalidArgument: naming what is unknown and what there is.
    """
    if preset not in TABLE:
        raise InvalidArgument(f"preset must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}")
    table = TABLE[preset]
    if names is None:
        return [entry for entry in table.values() if entry.standard]
    if names == "all":
        return list(table.values())
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        raise InvalidArgument(f"metrics must be among {', '.join(map(repr, table))}; got {unknown[0]!r}")
    return [table[name] for name in wanted]


def verdicts(batch: Batch) -> list[str]:
    """What each row's numbers can be trusted for, the first that applies.

    - `not_finite`, `zero`, `solver_failed`: there is no spectrum.
    - `degenerate`: all eigenvalues are equal to within 64 storage roundings (an orthogonal matrix).
    - `rank_deficient`: fewer than half of the eigenvalues are numerically not zero.
    - `few_eigenvalues`: fewer than 20, where alpha has a standard error of more than a quarter of alpha − 1.
    - `random_like`: no eigenvalue exceeds what a random matrix has, so alpha describes noise.
    - `poor_fit`: the tail is no power law (`POOR_FIT`).
    - `ok`.
    """
    tail, n = batch.tail, batch.eigenvalues.shape[1]
    smallest = torch.where(batch.eigenvalues > batch.floor[:, None], batch.eigenvalues, float("inf")).amin(1)
    closeness = min(0.5, 64 * torch.finfo(batch.dtype).eps)
    flat = (batch.eigenvalues[:, -1] / smallest - 1 < closeness) & (tail.num_fitted > n / 2)
    tests = [
        ("degenerate", flat),
        ("rank_deficient", tail.num_fitted < n / 2),
        ("few_eigenvalues", (tail.num_fitted < SMALL_SAMPLE) | (tail.status == Status.FEW_EIGENVALUES)),
        ("degenerate", tail.status == Status.DEGENERATE),
        ("random_like", batch.bulk.num_spikes == 0),
        ("poor_fit", tail.ks * tail.n_tail.sqrt() > POOR_FIT),
    ]
    rows = []
    for b, status in enumerate(batch.status.tolist()):
        known = [Status(status).label] if status != Status.OK else [name for name, hit in tests if bool(hit[b])]
        rows.append(known[0] if known else "ok")
    return rows


def statuses(batch: Batch) -> list[str]:
    """`"ok"`, or why each row has no spectrum or no tail."""
    combined = torch.where(batch.status == Status.OK, batch.tail.status, batch.status)
    return [Status(status).label for status in combined.tolist()]


CSN = "Clauset, Shalizi & Newman 2009, SIAM Review 51"
HTSR = "Martin & Mahoney 2021, JMLR 22 (165)"
PREDICTING = "Martin, Peng & Mahoney 2021, Nature Communications 12, 4122"
WW = "weightwatcher 0.7.7"


@metric(weightwatcher="alpha", source=CSN, read="2–6: a trained layer; < 2: over-trained; large: little correlation")
def alpha(batch: Batch) -> torch.Tensor:
    """Exponent of the power-law tail of the eigenvalue density, p(λ) ∝ λ^-alpha for λ ≥ xmin."""
    return batch.tail.alpha


@metric(weightwatcher="sigma", source=CSN, read="alpha is known to about ± sigma")
def sigma(batch: Batch) -> torch.Tensor:
    """Standard error of alpha, (alpha − 1)/√n_tail."""
    return batch.tail.sigma


@metric(weightwatcher="D", source=CSN, read="smaller is a better fit; compare with 1/√n_tail")
def ks(batch: Batch) -> torch.Tensor:
    """Kolmogorov–Smirnov distance between the tail and its power law."""
    return batch.tail.ks


@metric(weightwatcher="xmin", unit="weight²", source=CSN, read="where the tail begins")
def xmin(batch: Batch) -> torch.Tensor:
    """Smallest eigenvalue of the tail, the one that minimises ks."""
    return batch.tail.xmin


@metric(source=CSN, read="below 20 alpha is a rough figure")
def n_tail(batch: Batch) -> torch.Tensor:
    """Number of eigenvalues in the tail."""
    return torch.where(batch.tail.status == Status.OK, batch.tail.n_tail, float("nan"))


@metric(
    weightwatcher="alpha_weighted",
    source=PREDICTING,
    read="smaller mean over layers: better test accuracy within a family",
)
def alpha_hat(batch: Batch) -> torch.Tensor:
    """Alpha weighted by scale, alpha · log10 λmax."""
    return batch.tail.alpha * lambda_max(batch).log10()


@metric(weightwatcher="log_alpha_norm", source=PREDICTING, read="as alpha_hat, smoother")
def log_alpha_norm(batch: Batch) -> torch.Tensor:
    """log10 of the Schatten norm Σ λ^alpha."""
    powers = batch.tail.alpha[:, None] * batch.eigenvalues.log()
    return torch.logsumexp(powers, 1) / math.log(10)


@metric(weightwatcher="log_norm", unit="log10 weight²", source=PREDICTING, read="the scale of the layer")
def log_norm(batch: Batch) -> torch.Tensor:
    """log10 of the squared Frobenius norm, Σ λ."""
    return norm(batch).log10()


@metric(
    weightwatcher="log_spectral_norm", unit="log10 weight²", source=PREDICTING, read="the scale of the largest mode"
)
def log_spectral_norm(batch: Batch) -> torch.Tensor:
    """log10 of the largest eigenvalue (squared spectral norm)."""
    return lambda_max(batch).log10()


@metric(
    weightwatcher="stable_rank",
    source="Rudelson & Vershynin 2007, J. ACM 54 (21)",
    read="small: few modes carry the layer",
)
def stable_rank(batch: Batch) -> torch.Tensor:
    """Σ λ / λmax."""
    return norm(batch) / lambda_max(batch)


@metric(source=HTSR + ", §3.1", read="1: flat spectrum; falls as correlations form")
def entropy(batch: Batch) -> torch.Tensor:
    """−Σ p ln p / ln rank with p = λ/Σλ and rank = #{λ > floor}."""
    p = batch.eigenvalues / norm(batch)[:, None]
    rank = (batch.eigenvalues > batch.floor[:, None]).sum(1)
    flatness = -torch.special.xlogy(p, p).sum(1) / rank.log()
    return torch.where(rank > 1, flatness, float("nan"))


@metric(
    source="Johnstone 2001, Annals of Statistics 29; Kritchman & Nadler 2009, IEEE TSP 57",
    read="0: cannot be told from random",
)
def num_spikes(batch: Batch) -> torch.Tensor:
    """Eigenvalues above the Tracy–Widom quantile of the random bulk."""
    return torch.where(torch.isfinite(batch.bulk.variance), batch.bulk.num_spikes.double(), float("nan"))


@metric(source="Johnstone 2001, Annals of Statistics 29", read="small: the largest mode is learnt, not noise")
def spike_p_value(batch: Batch) -> torch.Tensor:
    """Probability that the random bulk alone has an eigenvalue as large as λmax."""
    return batch.bulk.p_value


@metric(source=HTSR + ", §3.2", read="1: random; falls as spikes rise above the bulk")
def mp_softrank(batch: Batch) -> torch.Tensor:
    """Upper Marchenko–Pastur edge of the bulk over λmax."""
    return batch.bulk.edge_max / lambda_max(batch)


@metric(
    weightwatcher="trap_headroom",
    needs="elements",
    reduce=max,
    read="above 1 a trap is expected; 0.8 is near",
    source="Baik, Ben Arous & Péché 2005, Annals of Probability 33; Prakash & Martin 2026, arXiv 2605.12394",
)
def trap_headroom(batch: Batch) -> torch.Tensor:
    """Largest de-meaned entry over the size that makes an outlier by itself, max|w − mean| / (σ (NM)^¼)."""
    return batch.trap_headroom


@metric(
    needs="shuffled",
    reduce=sum,
    read="0 is healthy; 1 or more that persist: the layer is memorising",
    source="Prakash & Martin 2025, arXiv 2506.04434; counted here per shuffle of the de-meaned matrix",
)
def num_traps(batch: Batch) -> torch.Tensor:
    """Outliers of the shuffled de-meaned matrix, mean over replicas: correlation traps."""
    return batch.num_traps


@metric(
    needs="shuffled",
    reduce=max,
    read="1 = at the edge; grows with the largest entry",
    source="Prakash & Martin 2026, arXiv 2605.12394",
)
def trap_severity(batch: Batch) -> torch.Tensor:
    """λmax of the shuffled de-meaned matrix over its Marchenko–Pastur edge."""
    return batch.trap_severity


@metric(
    needs="shuffled",
    reduce=min,
    read="small: the trap is no accident of the shuffle",
    source="Johnstone 2001, Annals of Statistics 29",
)
def trap_p_value(batch: Batch) -> torch.Tensor:
    """Probability that a random matrix has an eigenvalue as large as the shuffled one's, median over replicas."""
    return batch.trap_p_value


@metric(
    weightwatcher="mean_shift",
    needs="elements",
    reduce=max,
    read="above 1 the mean is an outlier of its own; no harm by itself",
    source="Benaych-Georges & Nadakuditi 2012, J. Multivariate Analysis 111",
)
def mean_shift(batch: Batch) -> torch.Tensor:
    """Mean of the entries over the size that makes an outlier by itself, |mean| (NM)^¼ / σ."""
    return batch.mean_shift


# Columns that only weightwatcher's preset has, or that it defines differently.


@metric(default=False, weightwatcher="num_evals", source=WW)
def num_evals(batch: Batch) -> torch.Tensor:
    """Number of eigenvalues, pooled over slices."""
    return torch.full_like(batch.floor, batch.eigenvalues.shape[1])


@metric(default=False, weightwatcher="lambda_max", unit="weight²", source=WW)
def lambda_max(batch: Batch) -> torch.Tensor:
    """Largest eigenvalue."""
    return batch.eigenvalues[:, -1]


@metric(default=False, weightwatcher="spectral_norm", unit="weight²", source=WW)
def spectral_norm(batch: Batch) -> torch.Tensor:
    """Largest eigenvalue (the squared 2-norm)."""
    return lambda_max(batch)


@metric(default=False, weightwatcher="norm", unit="weight²", source=WW)
def norm(batch: Batch) -> torch.Tensor:
    """Σ λ, the squared Frobenius norm."""
    return batch.eigenvalues.sum(1)


@metric(default=False, weightwatcher="xmax", unit="weight²", source=WW)
def xmax(batch: Batch) -> torch.Tensor:
    """Largest eigenvalue of the fitted tail."""
    return torch.where(batch.tail.status == Status.OK, lambda_max(batch), float("nan"))


@metric(default=False, weightwatcher="num_pl_spikes", source=WW)
def num_pl_spikes(batch: Batch) -> torch.Tensor:
    """#{λ ≥ xmin} over the whole spectrum, ties with xmin included."""
    count = (batch.eigenvalues >= batch.tail.xmin[:, None]).sum(1).double()
    return torch.where(batch.tail.status == Status.OK, count, float("nan"))


@metric(default=False, weightwatcher="sv_max", unit="weight", source=WW)
def sv_max(batch: Batch) -> torch.Tensor:
    """Largest singular value."""
    return lambda_max(batch).sqrt()


@metric(default=False, weightwatcher="sv_min", unit="weight", source=WW)
def sv_min(batch: Batch) -> torch.Tensor:
    """Largest over the slices of each slice's smallest singular value (weightwatcher's definition)."""
    return batch.slice_eigenvalues[:, :, 0].amax(1).sqrt()


@metric(default=False, weightwatcher="rank_loss", source=WW)
def rank_loss(batch: Batch) -> torch.Tensor:
    """Σ over slices of #{s ≤ s_max · N · 2⁻⁵²}."""
    singular = batch.slice_eigenvalues.sqrt()
    return (singular <= _rank_tolerance(batch) * singular[:, :, -1:]).sum((1, 2)).double()


@metric(default=False, weightwatcher="weak_rank_loss", source=WW)
def weak_rank_loss(batch: Batch) -> torch.Tensor:
    """#{λ < 1e-6}, absolute."""
    return (batch.eigenvalues < 1e-6).sum(1).double()


@metric(default=False, weightwatcher="matrix_rank", source=WW)
def matrix_rank(batch: Batch) -> torch.Tensor:
    """#{√λ > max √λ · N · 2⁻⁵²} over the pooled spectrum."""
    singular = batch.eigenvalues.sqrt()
    return (singular > _rank_tolerance(batch) * singular[:, -1:]).sum(1).double()


def _rank_tolerance(batch: Batch) -> float:
    return float(batch.long_side * torch.finfo(torch.float64).eps)


@metric(default=False, weightwatcher="entropy", source=WW)
def matrix_entropy(batch: Batch) -> torch.Tensor:
    """−Σ p ln p / ln(matrix_rank + e) with p = λ/Σλ + e, e = 1e-10."""
    p = batch.eigenvalues / norm(batch)[:, None] + 1e-10
    return -(p * p.log()).sum(1) / (matrix_rank(batch) + 1e-10).log()


def _fitted(fits: Sequence[weightwatcher.DensityFit | None], field: str) -> list[float]:
    return [float("nan") if fit is None else float(getattr(fit, field)) for fit in fits]


def _enter_density_fits() -> None:
    """Weightwatcher's six Marchenko–Pastur columns, of the spectrum and (`rand_…`) of the shuffled one."""
    columns = {
        "sigma_mp": ("sigma", "Fitted standard deviation of the rescaled entries."),
        "num_spikes": ("num_spikes", "Eigenvalues above the fitted bulk edge plus slack."),
        "mp_softrank": ("mp_softrank", "Fitted bulk edge over λmax."),
        "bulk_min": ("bulk_min", "Lower edge of the fitted bulk."),
        "bulk_max": ("bulk_max", "Upper edge of the fitted bulk."),
        "W_scale": ("w_scale", "Factor that makes the mean eigenvalue 1."),
    }
    for column, (field, definition) in columns.items():

        def of_spectrum(batch: Batch, field: str = field) -> torch.Tensor:
            return batch.per_row(_fitted(batch.density_fits, field))

        def of_shuffled(batch: Batch, field: str = field) -> torch.Tensor:
            return batch.per_row(_fitted(batch.randomized_fits, field))

        of_spectrum.__doc__ = definition
        of_shuffled.__doc__ = f"Of the shuffled spectrum: {definition}"
        metric(default=False, weightwatcher=column, source=WW)(of_spectrum)
        metric(default=False, weightwatcher=f"rand_{column}", source=WW, needs="randomized", standard=False)(
            of_shuffled
        )


_enter_density_fits()


@metric(default=False, weightwatcher="num_traps", source=WW, needs="randomized", standard=False, reduce=sum)
def rand_num_traps(batch: Batch) -> torch.Tensor:
    """Weightwatcher's trap count: shuffled eigenvalues above the fitted edge, over all replicas together."""
    return batch.per_row(_fitted(batch.randomized_fits, "num_spikes"))


def _per_draw(batch: Batch, value: Callable[[np.ndarray, weightwatcher.Randomized], float]) -> torch.Tensor:
    rows = batch.eigenvalues.cpu().numpy()
    return batch.per_row(
        [float("nan") if d is None else value(r, d) for r, d in zip(rows, batch.randomized, strict=True)]
    )


@metric(default=False, weightwatcher="max_rand_eval", unit="weight²", source=WW, needs="randomized", standard=False)
def max_rand_eval(batch: Batch) -> torch.Tensor:
    """Largest eigenvalue of the shuffled matrix over the replicas."""
    return _per_draw(batch, lambda row, draw: float(draw.pooled[-1]))


@metric(default=False, weightwatcher="rand_distance", source=WW, needs="randomized", standard=False)
def rand_distance(batch: Batch) -> torch.Tensor:
    """Jensen–Shannon distance of the sorted eigenvalues to the shuffled ones, taken as probabilities."""
    return _per_draw(batch, lambda row, draw: weightwatcher.spectral_distance(row, draw.single))


@metric(default=False, weightwatcher="ww_softrank", source=WW, needs="randomized", standard=False)
def ww_softrank(batch: Batch) -> torch.Tensor:
    """Largest shuffled eigenvalue over λmax."""
    return _per_draw(batch, lambda row, draw: float(draw.single[-1] / row[-1]))


@metric(default=False, weightwatcher="ww_maxdist", unit="weight²", source=WW, needs="randomized", standard=False)
def ww_maxdist(batch: Batch) -> torch.Tensor:
    """λmax less the largest shuffled eigenvalue."""
    return _per_draw(batch, lambda row, draw: float(row[-1] - draw.single[-1]))
