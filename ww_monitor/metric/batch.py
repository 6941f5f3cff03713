"""What the functions of the table work on: spectra of matrices of one shape, each derived quantity made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ww_monitor.matrix import Matrix
from ww_monitor.record import computed_once
from ww_monitor.settings import AnalysisOptions
from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.alternatives import Comparison, TruncatedFit, compare, fit_truncated, goodness_of_fit
from ww_monitor.spectra.erg import CorrelationSpace, correlation_space
from ww_monitor.spectra.estimators import FingerFit, SoftAlpha, fit_hill, fit_without_fingers, soft_alpha
from ww_monitor.spectra.marchenko_pastur import Bulk, bulk
from ww_monitor.spectra.null import NullBand, null_band
from ww_monitor.spectra.powerlaw import TailFit, fit_tail
from ww_monitor.spectra.status import Status
from ww_monitor.spectra.subspaces import numerical_floor

NAN = float("nan")

LEAST_BULK_SIDE = 5
"""Shortest side for which the law of λmax is tested: Johnstone 2001 finds it good from about 5 on. The 16 × 1 slices of
a first convolution on grey images have no bulk."""

LOST_SHARE = 0.05
"""Modes that a matrix may lack, beside one, before it counts as rank deficient. Our choice: a constraint takes one (the
rows of a head that was zero at first sum to zero), copies of rows and products of narrow matrices take many."""

Values = torch.Tensor | list[Any]
"""What is known of B matrices, by row: a tensor `[B, …]`, or a list with `None` where nothing is known."""


@dataclass
class Batch:
    """What was solved and measured of B matrices with as many slices and one short side, on the device of the spectra.

    Attributes:
        slice_eigenvalues: `[B, R, M]` float64, ascending in the last dimension, in the scale of the layer.
        status: `[B]` `Status` of the eigensolve.
        long_side: `[B]` float64, N of a slice.
        eps: `[B]` float64, rounding unit of the storage precision.
        matrices: Their names and shapes, without weights.
        solved_on: Where each was solved; see `ww_monitor.record.Layer`.
        measured: What the registry of measurements has read from the weights, by name.
        definitions: Which definitions to follow.
    """

    slice_eigenvalues: torch.Tensor
    status: torch.Tensor
    long_side: torch.Tensor
    eps: torch.Tensor
    matrices: Sequence[Matrix] = ()
    solved_on: Sequence[str] = ()
    measured: Mapping[str, Values] = field(default_factory=dict)
    definitions: AnalysisOptions = field(default_factory=AnalysisOptions)

    def __len__(self) -> int:
        """The number of rows, B."""
        return len(self.slice_eigenvalues)

    def column(self, name: str) -> torch.Tensor:
        """`[B, …]` what was measured under this name; NaN for a row without a spectrum, `[B]` NaN where nothing was."""
        found = self.measured.get(name)
        if found is None:
            return torch.full_like(self.long_side, NAN)
        assert isinstance(found, torch.Tensor), f"measurement {name!r}: expected a tensor, got a list"
        values = found.to(self.long_side.device)
        known = (self.status == Status.OK).view(-1, *[1] * (values.ndim - 1))
        return torch.where(known, values if values.is_floating_point() else values.double(), NAN)

    def entries(self, name: str) -> list[Any]:
        """What was measured under this name, one object a row, `None` where there is none."""
        return list(self.measured.get(name, [None] * len(self)))

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        """Batches of one number of slices, short side and device, measured alike, as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.slice_eigenvalues for part in parts]),
            torch.cat([part.status for part in parts]),
            torch.cat([part.long_side for part in parts]),
            torch.cat([part.eps for part in parts]),
            [matrix for part in parts for matrix in part.matrices],
            [where for part in parts for where in part.solved_on],
            {name: _together([part.measured[name] for part in parts]) for name in parts[0].measured},
            parts[0].definitions,
        )

    def row(self, b: int) -> Batch:
        """Row b alone."""
        part = slice(b, b + 1)
        return Batch(
            self.slice_eigenvalues[part],
            self.status[part],
            self.long_side[part],
            self.eps[part],
            self.matrices[part],
            self.solved_on[part],
            {name: values[part] for name, values in self.measured.items()},
            self.definitions,
        )

    @property
    def slices(self) -> int:
        """R, slices of a layer."""
        return self.slice_eigenvalues.shape[1]

    @property
    def short_side(self) -> int:
        """M of a slice."""
        return self.slice_eigenvalues.shape[2]

    @computed_once
    def eigenvalues(self) -> torch.Tensor:
        """`[B, R·M]` pooled over the slices, ascending."""
        return self.slice_eigenvalues.flatten(1).sort(1).values

    @computed_once
    def fitted_eigenvalues(self) -> torch.Tensor:
        """`[B, n]` what the tail is fitted to: of the matrices, or of their windows; ties where `flat`."""
        values = self.column("window_eigenvalues") if "window_eigenvalues" in self.measured else self.eigenvalues
        # equal values are what a fit calls degenerate; nearly equal ones would get an alpha of their rounding
        return values if self.follows_weightwatcher else torch.where(self.flat[:, None], values[:, -1:], values)

    @property
    def thin(self) -> bool:
        """Whether each of several slices has four eigenvalues at most: their pool lists norms, it is no spectrum."""
        return self.slices > 1 and self.short_side < LEAST_BULK_SIDE

    @computed_once
    def deficient(self) -> torch.Tensor:
        """`[B]` whether rows are copies or combinations of others, or half of the modes are numerically zero.

        The first is asked to float32's rounding (four of it, for sums), whatever the storage precision: narrower types
        round the small modes of a healthy square matrix away. Rows and columns of zeros count in the second only.
        """
        live = torch.full_like(self.long_side, float(self.short_side))
        if "live_sides" in self.measured:
            live = live.minimum(self.column("live_sides")[:, 1].nan_to_num(nan=float(self.short_side)))
        full = live * self.slices
        exact = self._floor(self.eps.clamp(max=torch.finfo(torch.float32).eps) * 4)
        lost = full - (self.eigenvalues > exact[:, None]).sum(1)
        return (self.rank <= self.eigenvalues.shape[1] / 2) | (lost > (LOST_SHARE * full).clamp(min=1.0))

    @computed_once
    def flat(self) -> torch.Tensor:
        """`[B]` whether all eigenvalues are equal to within 64 storage roundings, so that a fit would fit rounding."""
        n = self.eigenvalues.shape[1]
        known = self.eigenvalues > self.rounding_floor[:, None]
        smallest = torch.where(known, self.eigenvalues, float("inf")).amin(1)
        closeness = (64 * self.eps).clamp(max=0.5)  # of float8 64 roundings would be several times the values
        # a projection has equal eigenvalues too, but what it lacks says more: `deficient`
        return (self.eigenvalues[:, -1] / smallest - 1 < closeness) & (self.rank > n / 2)

    @property
    def follows_weightwatcher(self) -> bool:
        """Whether the preset is that tool's."""
        return self.definitions.preset == "weightwatcher"

    @computed_once
    def floor(self) -> torch.Tensor:
        """`[B]` eigenvalues at or below it take no part in the fit: numerically zero, or weightwatcher's 1e-5."""
        if self.follows_weightwatcher:
            return torch.full_like(self.eigenvalues[:, 0], weightwatcher.EIGENVALUE_FLOOR)
        return self.rounding_floor

    @computed_once
    def rounding_floor(self) -> torch.Tensor:
        """`[B]` eigenvalues at or below it are numerically zero."""
        return self._floor(self.eps)

    def _floor(self, eps: torch.Tensor) -> torch.Tensor:
        n, m = self.long_side, self.short_side
        mean_square = self.eigenvalues.sum(1) / (self.slices * n * m)
        return numerical_floor(self.eigenvalues[:, -1], mean_square, n, m, eps=eps)

    @computed_once
    def rank(self) -> torch.Tensor:
        """`[B]` eigenvalues that are numerically not zero, int64."""
        return (self.eigenvalues > self.rounding_floor[:, None]).sum(1)

    @computed_once
    def power_law(self) -> TailFit:
        """The power-law fit, also where a truncated law is asked for: it chooses the xmin."""
        if self.definitions.fit == "hill":
            return fit_hill(self.fitted_eigenvalues, k=self.definitions.fit_k, floor=self.floor)
        if self.fingers is not None:
            return self.fingers.tail
        return fit_tail(self.fitted_eigenvalues, floor=self.floor, allow_short=self.follows_weightwatcher)

    @computed_once
    def tail(self) -> TailFit:
        """The fit that was asked for."""
        if self.definitions.fit != "truncated":
            return self.power_law
        alpha = self.per_row([fit.alpha if fit else NAN for fit in self.truncated])
        ks = self.per_row([fit.ks if fit else NAN for fit in self.truncated])
        # (alpha − 1)/√n is the error of a power law alone
        return replace(self.power_law, alpha=alpha, ks=ks, sigma=torch.full_like(alpha, NAN))

    @computed_once
    def fingers(self) -> FingerFit | None:
        """The fit without the largest eigenvalues, if it is asked for."""
        if self.definitions.fix_fingers is None:
            return None
        return fit_without_fingers(self.fitted_eigenvalues, floor=self.floor, weightwatcher=self.follows_weightwatcher)

    @computed_once
    def soft(self) -> SoftAlpha:
        """The exponent averaged over candidate xmin."""
        return soft_alpha(self.fitted_eigenvalues, floor=self.floor)

    @computed_once
    def truncated(self) -> list[TruncatedFit | None]:
        """A truncated power law from the power law's xmin on, by row."""
        return [fit_truncated(tail, alpha=alpha) if len(tail) > 2 else None for tail, alpha in self._tails]

    @computed_once
    def comparisons(self) -> list[dict[str, Comparison] | None]:
        """Likelihood ratios of the power law against other laws, by row."""
        return [compare(tail, alpha=alpha) if len(tail) > 2 else None for tail, alpha in self._tails]

    @computed_once
    def goodness(self) -> torch.Tensor:
        """`[B]` p-value of the bootstrap test of the power law."""
        values = []
        for b, (tail, _) in enumerate(self._tails):
            row = self.fitted_eigenvalues[b]
            known = row[row > self.floor[b]].cpu()
            values.append(
                goodness_of_fit(known, self.power_law.take([b]), seed=self.definitions.seed) if len(tail) > 2 else NAN
            )
        return self.per_row(values)

    @property
    def _tails(self) -> list[tuple[np.ndarray, float]]:
        """The eigenvalues from xmin on and alpha, by row; empty where there is no fit."""
        fit, rows = self.power_law, self.fitted_eigenvalues.cpu().numpy()
        found = zip(rows, fit.n_tail.tolist(), fit.alpha.tolist(), fit.status.tolist(), strict=True)
        return [(row[len(row) - int(n) :] if status == Status.OK else row[:0], a) for row, n, a, status in found]

    @computed_once
    def bulk(self) -> Bulk:
        """The random bulk, from the closed form.

        Not known where the matrix is `deficient`, nor for slices narrower than `LEAST_BULK_SIDE`.
        """
        known = (~self.deficient & (self.short_side >= LEAST_BULK_SIDE))[:, None]
        sides = torch.stack([self.long_side, torch.full_like(self.long_side, self.short_side)], 1)
        if "live_sides" in self.measured:
            live = self.column("live_sides")
            sides = torch.where(torch.isnan(live), sides, live)
        return bulk(
            torch.where(known, self.eigenvalues, NAN),
            long_side=sides[:, 0],
            short_side=sides[:, 1],
            slices=self.slices,
            significance=self.definitions.significance,
        )

    @computed_once
    def null(self) -> list[NullBand]:
        """What a random matrix of each row's shape shows."""
        seed = self.definitions.seed
        return [null_band(int(n), self.short_side, self.slices, seed=seed) for n in self.long_side.tolist()]

    @computed_once
    def space(self) -> CorrelationSpace:
        """The effective correlation space."""
        return correlation_space(self.eigenvalues)

    @computed_once
    def density_fits(self) -> list[weightwatcher.DensityFit | None]:
        """The Marchenko–Pastur fits of the eigenvalues, as weightwatcher makes them."""
        return self._density_fits(list(self.eigenvalues.cpu().numpy()))

    @computed_once
    def randomized_fits(self) -> list[weightwatcher.DensityFit | None]:
        """The Marchenko–Pastur fits of the pooled shuffled eigenvalues."""
        return self._density_fits([draw and draw.pooled for draw in self.entries("randomized")])

    def _density_fits(self, rows: Sequence[np.ndarray | None]) -> list[weightwatcher.DensityFit | None]:
        sides = self.long_side.tolist()
        return [
            None if row is None else weightwatcher.fit_density(row, long_side=int(n), short_side=self.short_side)
            for row, n in zip(rows, sides, strict=True)
        ]

    def per_row(self, values: Sequence[float]) -> torch.Tensor:
        """`[B]` from one number a row."""
        return torch.tensor(values, dtype=torch.float64, device=self.eigenvalues.device)


def _together(values: Sequence[Values]) -> Values:
    tensors = [one for one in values if isinstance(one, torch.Tensor)]
    return torch.cat(tensors) if len(tensors) == len(values) else [one for part in values for one in part]
