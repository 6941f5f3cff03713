"""What the functions of the table work on: spectra of matrices of one shape, each derived quantity made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.alternatives import Comparison, TruncatedFit, compare, fit_truncated, goodness_of_fit
from ww_monitor.spectra.erg import CorrelationSpace, correlation_space
from ww_monitor.spectra.estimators import FingerFit, SoftAlpha, fit_hill, fit_without_fingers, soft_alpha
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE, Bulk, bulk
from ww_monitor.spectra.null import NullBand, null_band
from ww_monitor.spectra.powerlaw import SMALL_SAMPLE, TailFit, fit_tail
from ww_monitor.spectra.status import Status
from ww_monitor.spectra.subspaces import numerical_floor

FITS = ("csn", "hill", "truncated")
FIX_FINGERS = (None, "clip_xmax")

POOR_FIT = 1.25
"""ks · √n_tail above which a tail is no power law: the 1 % point of the Kolmogorov–Smirnov test with an estimated
exponential scale (Lilliefors 1969, JASA 64), since ln λ of a power-law tail is exponential. The choice of xmin makes
it lenient."""


LEAST_BULK_SIDE = 5
"""Shortest side for which the law of λmax is tested: Johnstone 2001 finds it good from about 5 on. The 16 × 1 slices of
a first convolution on grey images have no bulk."""


@dataclass(frozen=True)
class Definitions:
    """Which definitions a batch follows; the fields mean what they do in `ww_monitor.analyze`."""

    preset: str = "default"
    fit: str = "csn"
    fit_k: int | None = None
    fix_fingers: str | None = None
    significance: float = SIGNIFICANCE
    seed: int = 0


@dataclass
class Batch:
    """What was measured of B matrices of one shape.

    Attributes:
        slice_eigenvalues: `[B, R, M]` float64, ascending in the last dimension, in the scale of the layer.
        status: `[B]` `Status` of the eigensolve.
        long_side: N of a slice.
        dtype: Storage precision of the weights.
        definitions: Whose definitions to use.
        live_sides: `[B, 2]` long and short side of a slice, rows and columns of zeros not counted; mean over slices.
        window_eigenvalues: `[B, n']` ascending, of windows of one aspect ratio; `None` fits the whole matrices.
        trap_headroom, mean_shift, num_traps, trap_severity, trap_p_value: `[B]`, NaN where not measured.
        randomized: weightwatcher's shuffled spectra by row, under that preset.
        vectors: `[3, R, M]` metrics of the singular vectors by row, where they are asked for.
        fitted: The power-law fits, where a device has made them already.
    """

    slice_eigenvalues: torch.Tensor
    status: torch.Tensor
    long_side: int
    dtype: torch.dtype
    trap_headroom: torch.Tensor
    mean_shift: torch.Tensor
    num_traps: torch.Tensor
    trap_severity: torch.Tensor
    trap_p_value: torch.Tensor
    definitions: Definitions = field(default_factory=Definitions)
    live_sides: torch.Tensor | None = None
    window_eigenvalues: torch.Tensor | None = None
    randomized: Sequence[weightwatcher.Randomized | None] = ()
    vectors: Sequence[np.ndarray | None] = ()
    fitted: TailFit | None = None

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
    def fitted_eigenvalues(self) -> torch.Tensor:
        """`[B, n]` what the tail is fitted to: of the matrices, or of their windows; ties where `flat`."""
        values = self.eigenvalues if self.window_eigenvalues is None else self.window_eigenvalues
        return values if self.follows_weightwatcher else torch.where(self.flat[:, None], values[:, -1:], values)

    @cached_property
    def flat(self) -> torch.Tensor:
        """`[B]` whether all eigenvalues are equal to within 64 storage roundings, so that a fit would fit rounding."""
        n = self.eigenvalues.shape[1]
        known = self.eigenvalues > self.rounding_floor[:, None]
        smallest = torch.where(known, self.eigenvalues, float("inf")).amin(1)
        closeness = min(0.5, 64 * torch.finfo(self.dtype).eps)
        return (self.eigenvalues[:, -1] / smallest - 1 < closeness) & (self.rank > n / 2)

    @property
    def follows_weightwatcher(self) -> bool:
        """Whether the preset is that tool's."""
        return self.definitions.preset == "weightwatcher"

    @cached_property
    def floor(self) -> torch.Tensor:
        """`[B]` eigenvalues at or below it take no part in the fit: numerically zero, or weightwatcher's 1e-5."""
        if self.follows_weightwatcher:
            return torch.full_like(self.eigenvalues[:, 0], weightwatcher.EIGENVALUE_FLOOR)
        return self.rounding_floor

    @cached_property
    def rounding_floor(self) -> torch.Tensor:
        """`[B]` eigenvalues at or below it are numerically zero."""
        n, m = self.long_side, self.short_side
        mean_square = self.eigenvalues.sum(1) / (self.slices * n * m)
        return numerical_floor(self.eigenvalues[:, -1], mean_square, n, m, dtype=self.dtype)

    @cached_property
    def rank(self) -> torch.Tensor:
        """`[B]` eigenvalues that are numerically not zero, int64."""
        return (self.eigenvalues > self.rounding_floor[:, None]).sum(1)

    @cached_property
    def power_law(self) -> TailFit:
        """The power-law fit, also where a truncated law is asked for: it chooses the xmin."""
        if self.fitted is not None:
            return self.fitted
        if self.definitions.fit == "hill":
            return fit_hill(self.fitted_eigenvalues, k=self.definitions.fit_k, floor=self.floor)
        if self.fingers is not None:
            return self.fingers.tail
        return fit_tail(self.fitted_eigenvalues, floor=self.floor, allow_short=self.follows_weightwatcher)

    @cached_property
    def tail(self) -> TailFit:
        """The fit that was asked for."""
        if self.definitions.fit != "truncated":
            return self.power_law
        alpha = self.per_row([fit.alpha if fit else float("nan") for fit in self.truncated])
        ks = self.per_row([fit.ks if fit else float("nan") for fit in self.truncated])
        return replace(self.power_law, alpha=alpha, ks=ks, sigma=torch.full_like(alpha, float("nan")))

    @cached_property
    def fingers(self) -> FingerFit | None:
        """The fit without the largest eigenvalues, if it is asked for."""
        if self.definitions.fix_fingers is None:
            return None
        return fit_without_fingers(self.fitted_eigenvalues, floor=self.floor, weightwatcher=self.follows_weightwatcher)

    @cached_property
    def soft(self) -> SoftAlpha:
        """The exponent averaged over candidate xmin."""
        return soft_alpha(self.fitted_eigenvalues, floor=self.floor)

    @cached_property
    def truncated(self) -> list[TruncatedFit | None]:
        """A truncated power law from the power law's xmin on, by row."""
        return [fit_truncated(tail, alpha=alpha) if len(tail) > 2 else None for tail, alpha in self._tails]

    @cached_property
    def comparisons(self) -> list[dict[str, Comparison] | None]:
        """Likelihood ratios of the power law against other laws, by row."""
        return [compare(tail, alpha=alpha) if len(tail) > 2 else None for tail, alpha in self._tails]

    @cached_property
    def goodness(self) -> torch.Tensor:
        """`[B]` p-value of the bootstrap test of the power law."""
        values = []
        for b, (tail, _) in enumerate(self._tails):
            row = self.fitted_eigenvalues[b]
            known = row[row > self.floor[b]].cpu()
            values.append(
                goodness_of_fit(known, self.power_law.row(b), seed=self.definitions.seed)
                if len(tail) > 2
                else float("nan")
            )
        return self.per_row(values)

    @property
    def _tails(self) -> list[tuple[np.ndarray, float]]:
        """The eigenvalues from xmin on and alpha, by row; empty where there is no fit."""
        fit, rows = self.power_law, self.fitted_eigenvalues.cpu().numpy()
        found = zip(rows, fit.n_tail.tolist(), fit.alpha.tolist(), fit.status.tolist(), strict=True)
        return [(row[len(row) - int(n) :] if status == Status.OK else row[:0], a) for row, n, a, status in found]

    @cached_property
    def bulk(self) -> Bulk:
        """The random bulk, from the closed form.

        Not known where half of the eigenvalues are only rounding, nor for slices narrower than `LEAST_BULK_SIDE`.
        """
        known = ((self.rank >= self.eigenvalues.shape[1] / 2) & (self.short_side >= LEAST_BULK_SIDE))[:, None]
        sides = torch.tensor([[self.long_side, self.short_side]], dtype=torch.float64)
        if self.live_sides is not None:
            sides = torch.where(torch.isnan(self.live_sides), sides, self.live_sides)
        return bulk(
            torch.where(known, self.eigenvalues, float("nan")),
            long_side=sides[:, 0],
            short_side=sides[:, 1],
            slices=self.slices,
            significance=self.definitions.significance,
        )

    @cached_property
    def null(self) -> NullBand:
        """What a random matrix of this shape shows; one for the whole batch."""
        return null_band(self.long_side, self.short_side, self.slices, seed=self.definitions.seed)

    @cached_property
    def space(self) -> CorrelationSpace:
        """The effective correlation space."""
        return correlation_space(self.eigenvalues)

    @cached_property
    def density_fits(self) -> list[weightwatcher.DensityFit | None]:
        """The Marchenko–Pastur fits of the eigenvalues, as weightwatcher makes them."""
        return [self._density_fit(row) for row in self.eigenvalues.cpu().numpy()]

    @cached_property
    def randomized_fits(self) -> list[weightwatcher.DensityFit | None]:
        """The same of the pooled shuffled eigenvalues."""
        return [self._density_fit(draw.pooled) if draw else None for draw in self.randomized]

    def _density_fit(self, row: np.ndarray) -> weightwatcher.DensityFit | None:
        return weightwatcher.fit_density(row, long_side=self.long_side, short_side=self.short_side)

    def per_row(self, values: Sequence[float]) -> torch.Tensor:
        """`[B]` from one number a row."""
        return torch.tensor(values, dtype=torch.float64, device=self.eigenvalues.device)


def statuses(batch: Batch) -> list[str]:
    """`"ok"`, or why each row has no spectrum or no tail."""
    combined = torch.where(batch.status == Status.OK, batch.tail.status, batch.status)
    return [Status(status).label for status in combined.tolist()]


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
    tests = [
        ("degenerate", batch.flat),
        ("rank_deficient", batch.rank < n / 2),
        ("few_eigenvalues", (tail.num_fitted < SMALL_SAMPLE) | (tail.status == Status.FEW_EIGENVALUES)),
        ("degenerate", tail.status == Status.DEGENERATE),
        ("random_like", (batch.bulk.num_spikes == 0) & torch.isfinite(batch.bulk.variance)),
        ("poor_fit", tail.ks * tail.n_tail.sqrt() > POOR_FIT),
    ]
    rows = []
    for b, status in enumerate(batch.status.tolist()):
        known = [Status(status).label] if status != Status.OK else [name for name, hit in tests if bool(hit[b])]
        rows.append(known[0] if known else "ok")
    return rows


PHASES = (
    "rank-collapse", "random-like", "very heavy-tailed", "heavy-tailed", "bulk-decay", "bleeding-out", "bulk+spikes",
)  # fmt: skip

BLEEDING = 1.2
"""λmax over the bulk edge up to which spikes bleed out of the bulk rather than stand apart from it (our choice)."""


def phases(batch: Batch) -> list[str]:
    """Which of the phases of training each row is in, the first that applies; `""` where it cannot be told.

    - rank-collapse: verdict `rank_deficient`;
    - random-like: no spike above the random bulk;
    - very heavy-tailed, heavy-tailed, bulk-decay: a good fit with alpha < 2, < 4, ≤ 6;
    - bleeding-out, bulk+spikes: spikes within, or beyond, 1.2 times the bulk edge.

    Source: Martin & Mahoney 2021 (JMLR 22), who name the 5+1 phases and their exponents; as they and their tool say,
    alpha means nothing in the random-like phase and is unstable in the last two.
    """
    edge_ratio = (batch.eigenvalues[:, -1] / batch.bulk.edge_max).tolist()
    rows = []
    for verdict, alpha, ratio in zip(verdicts(batch), batch.tail.alpha.tolist(), edge_ratio, strict=True):
        if verdict in ("rank_deficient", "random_like"):
            rows.append({"rank_deficient": "rank-collapse", "random_like": "random-like"}[verdict])
        elif verdict == "ok" and alpha <= 6:
            rows.append("very heavy-tailed" if alpha < 2 else "heavy-tailed" if alpha < 4 else "bulk-decay")
        elif verdict in ("ok", "poor_fit"):
            rows.append("bleeding-out" if ratio < BLEEDING else "bulk+spikes")
        else:
            rows.append("")
    return rows
