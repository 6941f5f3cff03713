"""The metrics of the default preset; those that weightwatcher defines alike are entered under its name too."""

from __future__ import annotations

import math

import torch

from ww_monitor.metric.batch import NAN, Batch
from ww_monitor.metric.table import metric
from ww_monitor.spectra.estimators import fit_hill
from ww_monitor.spectra.status import Status

CSN = "Clauset, Shalizi & Newman 2009, SIAM Review 51"
HTSR = "Martin & Mahoney 2021, JMLR 22 (165)"
PREDICTING = "Martin, Peng & Mahoney 2021, Nature Communications 12, 4122"
SETOL = "Martin & Hinrichs 2025, arXiv 2507.17912"
MP = "Marchenko & Pastur 1967, Math. USSR Sbornik 1"
FLOOR = "floor relative to λmax and the storage precision; see metric.batch"


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
    return torch.where(batch.tail.status == Status.OK, batch.tail.n_tail, NAN)


@metric(
    weightwatcher="alpha_weighted",
    source=PREDICTING,
    read="smaller mean over layers: better test accuracy within a family",
)
def alpha_hat(batch: Batch) -> torch.Tensor:
    """Alpha weighted by scale, alpha · log10 λmax."""
    return batch.tail.alpha * batch.eigenvalues[:, -1].log10()


@metric(weightwatcher="log_alpha_norm", source=PREDICTING, read="as alpha_hat, smoother")
def log_alpha_norm(batch: Batch) -> torch.Tensor:
    """log10 of the Schatten norm Σ λ^alpha."""
    powers = batch.tail.alpha[:, None] * batch.eigenvalues.log()
    return torch.logsumexp(powers, 1) / math.log(10)  # λ^alpha itself overflows where alpha is large


@metric(weightwatcher="log_norm", unit="log10 weight²", source=PREDICTING, read="the scale of the layer")
def log_norm(batch: Batch) -> torch.Tensor:
    """log10 of the squared Frobenius norm, Σ λ."""
    return batch.eigenvalues.sum(1).log10()


@metric(
    weightwatcher="log_spectral_norm", unit="log10 weight²", source=PREDICTING, read="the scale of the largest mode"
)
def log_spectral_norm(batch: Batch) -> torch.Tensor:
    """log10 of the largest eigenvalue (squared spectral norm)."""
    return batch.eigenvalues[:, -1].log10()


@metric(
    weightwatcher="stable_rank",
    source="Rudelson & Vershynin 2007, J. ACM 54 (21)",
    read="small: few modes carry the layer",
)
def stable_rank(batch: Batch) -> torch.Tensor:
    """Σ λ / λmax."""
    return batch.eigenvalues.sum(1) / batch.eigenvalues[:, -1]


@metric(source=HTSR, read="1: flat spectrum; falls as correlations form")
def entropy(batch: Batch) -> torch.Tensor:
    """−Σ p ln p / ln rank with p = λ/Σλ and rank = #{λ > floor}."""
    p = batch.eigenvalues / batch.eigenvalues.sum(1, keepdim=True)
    flatness = -torch.special.xlogy(p, p).sum(1) / batch.rank.double().log()
    return torch.where(batch.rank > 1, flatness, NAN)  # ln 1 = 0: of one mode nothing is flat


@metric(
    source="Johnstone 2001, Annals of Statistics 29; Kritchman & Nadler 2009, IEEE TSP 57",
    read="0: cannot be told from random",
)
def num_spikes(batch: Batch) -> torch.Tensor:
    """Eigenvalues above the Tracy–Widom quantile of the random bulk."""
    return torch.where(torch.isfinite(batch.bulk.variance), batch.bulk.num_spikes.double(), NAN)


@metric(source="Johnstone 2001, Annals of Statistics 29", read="small: the largest mode is learnt, not noise")
def spike_p_value(batch: Batch) -> torch.Tensor:
    """Probability that the random bulk alone has an eigenvalue as large as λmax."""
    return batch.bulk.p_value


@metric(source=HTSR, read="1: random; falls as spikes rise above the bulk")
def mp_softrank(batch: Batch) -> torch.Tensor:
    """Upper Marchenko–Pastur edge of the bulk over λmax."""
    return batch.bulk.edge_max / batch.eigenvalues[:, -1]


@metric(
    weightwatcher="trap_headroom",
    needs="elements",
    reduce=max,
    read="above 1 a trap is expected; 0.8 is near",
    source="Baik, Ben Arous & Péché 2005, Annals of Probability 33; Prakash & Martin 2026, arXiv 2605.12394",
)
def trap_headroom(batch: Batch) -> torch.Tensor:
    """Largest de-meaned entry over the size that makes an outlier by itself, max|w − mean| / (σ (NM)^¼)."""
    return batch.column("trap_headroom")


@metric(
    needs="shuffled",
    reduce=sum,
    read="0 is healthy; 1 or more that persist: the layer is memorising",
    source="Prakash & Martin 2025, arXiv 2506.04434; counted here per shuffle of the de-meaned matrix",
)
def num_traps(batch: Batch) -> torch.Tensor:
    """Outliers of the shuffled de-meaned matrix, mean over replicas: correlation traps."""
    return batch.column("num_traps")


@metric(
    needs="shuffled",
    reduce=max,
    read="1 = at the edge; grows with the largest entry",
    source="Prakash & Martin 2026, arXiv 2605.12394",
)
def trap_severity(batch: Batch) -> torch.Tensor:
    """λmax of the shuffled de-meaned matrix over its Marchenko–Pastur edge."""
    return batch.column("trap_severity")


@metric(
    needs="shuffled",
    reduce=min,
    read="small: the trap is no accident of the shuffle",
    source="Johnstone 2001, Annals of Statistics 29",
)
def trap_p_value(batch: Batch) -> torch.Tensor:
    """Probability that a random matrix has an eigenvalue as large as the shuffled one's, median over replicas."""
    return batch.column("trap_p_value")


@metric(
    weightwatcher="mean_shift",
    needs="elements",
    reduce=max,
    read="above 1 the mean is an outlier of its own; no harm by itself",
    source="Benaych-Georges & Nadakuditi 2012, J. Multivariate Analysis 111",
)
def mean_shift(batch: Batch) -> torch.Tensor:
    """Mean of the entries over the size that makes an outlier by itself, |mean| (NM)^¼ / σ."""
    return batch.column("mean_shift")


@metric(source=SETOL, read="number of modes whose joint volume is conserved")
def erg_num(batch: Batch) -> torch.Tensor:
    """Size of the effective correlation space: the largest eigenvalues whose rescaled product stays at 1."""
    return batch.space.size


@metric(unit="weight²", source=SETOL, read="compare with xmin, on the same scale")
def erg_lambda(batch: Batch) -> torch.Tensor:
    """Smallest eigenvalue of the effective correlation space."""
    return batch.space.boundary


@metric(source=SETOL, read="0: tail and correlation space coincide, the ideal; below 0 the tail is the larger")
def erg_gap(batch: Batch) -> torch.Tensor:
    """Size of the effective correlation space less the size of the power-law tail."""
    return torch.where(batch.tail.status == Status.OK, batch.space.size - batch.tail.n_tail, NAN)


@metric(
    unit="weight", source="Kritchman & Nadler 2009, IEEE TSP 57; see spectra.marchenko_pastur", read="the noise level"
)
def bulk_std(batch: Batch) -> torch.Tensor:
    """Standard deviation of the entries of the random bulk."""
    return batch.bulk.variance.sqrt()


@metric(unit="weight²", source=MP, read="eigenvalues below are unusually small")
def bulk_min(batch: Batch) -> torch.Tensor:
    """Lower edge of the random bulk, σ²(√N − √M)²."""
    return batch.bulk.edge_min


@metric(unit="weight²", source=MP, read="eigenvalues above are candidates for spikes")
def bulk_max(batch: Batch) -> torch.Tensor:
    """Upper edge of the random bulk, σ²(√N + √M)²."""
    return batch.bulk.edge_max


@metric(source=FLOOR, read="full rank is slices · M")
def matrix_rank(batch: Batch) -> torch.Tensor:
    """Number of eigenvalues that are numerically not zero."""
    return torch.where(torch.isfinite(batch.eigenvalues[:, -1]), batch.rank.double(), NAN)


@metric(source=FLOOR, read="above 0: the layer has lost modes")
def rank_loss(batch: Batch) -> torch.Tensor:
    """Number of eigenvalues that are numerically zero."""
    return batch.eigenvalues.shape[1] - matrix_rank(batch)


@metric(
    standard=False,
    source="Hill 1975, Annals of Statistics 3; PL_Alpha_Hill of arXiv 2312.00359",
    read="as alpha, from the same share of every spectrum: for comparing layers",
    weightwatcher="alpha_hill",
)
def alpha_hill(batch: Batch) -> torch.Tensor:
    """Exponent of the larger half of the eigenvalues, 1 + k/Σ ln(λ/xmin) with the median as xmin."""
    return fit_hill(batch.fitted_eigenvalues, floor=batch.rounding_floor).alpha


@metric(
    standard=False,
    source="idea: Resnick & Stărică 1997, Adv. Appl. Prob. 29",
    read="as alpha, without its jumps",
    weightwatcher="alpha_soft",
)
def alpha_soft(batch: Batch) -> torch.Tensor:
    """Alpha averaged over all candidate xmin, weighted by how well each fits."""
    return batch.soft.alpha


@metric(
    standard=False,
    source="idea: Resnick & Stărică 1997, Adv. Appl. Prob. 29",
    weightwatcher="alpha_spread",
    read="how far the candidates in question disagree",
)
def alpha_spread(batch: Batch) -> torch.Tensor:
    """Standard deviation of alpha over the candidate xmin, with the same weights."""
    return batch.soft.spread


@metric(standard=False, option="truncated", unit="1/weight²", source=CSN, read="0: a pure power law")
def truncation_rate(batch: Batch) -> torch.Tensor:
    """Lambda of the truncated power law λ^-alpha exp(−Lambda λ)."""
    return batch.per_row([NAN if fit is None else fit.rate for fit in batch.truncated])


@metric(
    standard=False,
    option="fingers",
    source="weightwatcher 0.7.7, corrected",
    read="eigenvalues far beyond a power law",
    weightwatcher="num_fingers",
)
def num_fingers(batch: Batch) -> torch.Tensor:
    """Largest eigenvalues left out of the fit; 0 unless `fix_fingers` asks for it."""
    return torch.zeros_like(batch.tail.alpha) if batch.fingers is None else batch.fingers.num_fingers


@metric(
    standard=False,
    option="fingers",
    source="weightwatcher 0.7.7",
    read="alpha with the fingers",
    weightwatcher="raw_alpha",
)
def raw_alpha(batch: Batch) -> torch.Tensor:
    """Alpha fitted to all eigenvalues."""
    return batch.tail.alpha if batch.fingers is None else batch.fingers.raw_alpha


@metric(standard=False, source=CSN + ", §4.1", read="below 0.1 the tail is no power law")
def fit_p_value(batch: Batch) -> torch.Tensor:
    """Probability that a power law fits its own random draws as badly: bootstrap over 200 synthetic spectra."""
    return batch.goodness


def _enter_comparisons() -> None:
    """Likelihood ratio and p-value against each other law."""
    for law in ("exponential", "lognormal", "truncated"):

        def ratio(batch: Batch, law: str = law) -> torch.Tensor:  # a default is bound now, the loop's name at the call
            return batch.per_row([NAN if row is None else row[law].ratio for row in batch.comparisons])

        def p_value(batch: Batch, law: str = law) -> torch.Tensor:
            return batch.per_row([NAN if row is None else row[law].p_value for row in batch.comparisons])

        name = {"truncated": "truncated power law"}.get(law, law)
        ratio.__name__, p_value.__name__ = f"versus_{law}", f"versus_{law}_p_value"
        ratio.__doc__ = f"Normalised log-likelihood ratio of the power law to the {name}."
        p_value.__doc__ = f"Probability of a ratio as large if the power law and the {name} are equally good."
        source = "Vuong 1989, Econometrica 57; " + CSN
        metric(standard=False, source=source, read="above 0 the power law is the better")(ratio)
        metric(standard=False, source=source, read="above 0.1 the ratio's sign means nothing")(p_value)


_enter_comparisons()


def _enter_null_band() -> None:
    """5, 50 and 95 % points of alpha and ks of a random matrix."""
    for quantity in ("alpha", "ks"):
        for index, (end, share) in enumerate((("low", "5"), ("median", "50"), ("high", "95"))):

            def point(batch: Batch, quantity: str = quantity, index: int = index) -> torch.Tensor:
                return batch.per_row([getattr(band, quantity)[index] for band in batch.null])

            point.__name__ = f"null_{quantity}_{end}"
            point.__doc__ = f"{share} % point of {quantity} over Gaussian matrices of the same shape."
            metric(
                standard=False,
                source="Dumitriu & Edelman 2002, J. Math. Phys. 43",
                read="a layer inside the band may be random",
            )(point)


_enter_null_band()


@metric(
    standard=False,
    unit="weight²",
    source="Dumitriu & Edelman 2002, J. Math. Phys. 43",
    read="λmax above it is not random",
)
def null_lambda_max_high(batch: Batch) -> torch.Tensor:
    """95 % point of λmax over Gaussian matrices of the same shape and the bulk's variance."""
    return batch.per_row([band.lambda_max[2] for band in batch.null]) * batch.bulk.variance
