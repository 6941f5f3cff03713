"""The metrics that only weightwatcher's preset has, or that it defines in its own way, under its names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ww_monitor.metric.batch import Batch
from ww_monitor.metric.default import alpha_hat  # noqa: F401 - the shared columns come first
from ww_monitor.metric.table import metric
from ww_monitor.spectra import weightwatcher
from ww_monitor.spectra.status import Status
from ww_monitor.spectra.vectors import VECTOR_METRICS

WW = "weightwatcher 0.7.7"


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
    return _where_known(batch, (singular <= _rank_tolerance(batch)[:, None, None] * singular[:, :, -1:]).sum((1, 2)))


@metric(default=False, weightwatcher="weak_rank_loss", source=WW)
def weak_rank_loss(batch: Batch) -> torch.Tensor:
    """#{λ < 1e-6}, absolute."""
    return _where_known(batch, (batch.eigenvalues < 1e-6).sum(1))


@metric(default=False, weightwatcher="matrix_rank", source=WW)
def matrix_rank(batch: Batch) -> torch.Tensor:
    """#{√λ > max √λ · N · 2⁻⁵²} over the pooled spectrum."""
    singular = batch.eigenvalues.sqrt()
    return _where_known(batch, (singular > _rank_tolerance(batch)[:, None] * singular[:, -1:]).sum(1))


def _where_known(batch: Batch, count: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(batch.eigenvalues[:, -1]), count.double(), float("nan"))


def _rank_tolerance(batch: Batch) -> torch.Tensor:
    return batch.long_side * torch.finfo(torch.float64).eps  # the tool's, which rounds weights to float32 before


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

        def of_spectrum(batch: Batch, field: str = field) -> torch.Tensor:  # a default is bound now, not at the call
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
        [float("nan") if d is None else value(r, d) for r, d in zip(rows, batch.entries("randomized"), strict=True)]
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


@metric(default=False, weightwatcher="detX_num", source=WW)
def detx_num(batch: Batch) -> torch.Tensor:
    """Largest eigenvalues, rescaled to mean 1, until their product falls below 1."""
    return batch.space.size


@metric(default=False, weightwatcher="num_ERG_spikes", source=WW)
def num_erg_spikes(batch: Batch) -> torch.Tensor:
    """The same as detX_num."""
    return batch.space.size


@metric(default=False, weightwatcher="detX_val", unit="weight²", source=WW)
def detx_val(batch: Batch) -> torch.Tensor:
    """Smallest of those eigenvalues (the tool's names for this and the next are exchanged)."""
    return batch.space.boundary


@metric(default=False, weightwatcher="detX_val_unrescaled", source=WW)
def detx_val_unrescaled(batch: Batch) -> torch.Tensor:
    """Smallest of those eigenvalues, rescaled to mean 1."""
    return batch.space.rescaled_boundary


@metric(default=False, weightwatcher="ERG_gap", source=WW)
def erg_gap(batch: Batch) -> torch.Tensor:
    """detX_num less num_pl_spikes."""
    return batch.space.size - num_pl_spikes(batch)


@metric(default=False, weightwatcher="Lambda", unit="1/weight²", source=WW, option="truncated", standard=False)
def truncation_rate(batch: Batch) -> torch.Tensor:
    """Lambda of the truncated power law."""
    return batch.per_row([float("nan") if fit is None else fit.rate for fit in batch.truncated])


def _enter_vector_metrics() -> None:
    """Mean and variance of each metric of the singular vectors, below xmin (bulk) and from xmin on (tail)."""
    for index, kind in enumerate(VECTOR_METRICS):
        for part in ("bulk", "tail"):
            for name, moment in (("mean", np.mean), ("var", np.var)):

                def over_part(
                    batch: Batch,
                    index: int = index,
                    part: str = part,
                    moment: Callable[[np.ndarray], np.floating] = moment,
                ) -> torch.Tensor:
                    return _vector_moment(batch, index, part, moment)

                over_part.__doc__ = f"{name} of {kind} over the singular vectors of the {part}."
                column = f"{part}_{name}_{kind}"
                metric(default=False, weightwatcher=column, source=WW, needs="vectors", standard=False)(over_part)


def _vector_moment(batch: Batch, index: int, part: str, moment: Callable[[np.ndarray], np.floating]) -> torch.Tensor:
    values = []
    rows = zip(batch.slice_eigenvalues.cpu().numpy(), batch.tail.xmin.tolist(), batch.entries("vectors"), strict=True)
    for eigenvalues, xmin, vectors in rows:
        inside = eigenvalues >= xmin if part == "tail" else eigenvalues < xmin
        values.append(float(moment(vectors[index][inside])) if vectors is not None and inside.any() else float("nan"))
    return batch.per_row(values)


_enter_vector_metrics()
