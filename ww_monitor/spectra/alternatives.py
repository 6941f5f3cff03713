"""Other laws for the tail of a spectrum, and how the power law compares with them.

Every function works on one tail: the eigenvalues from xmin on, ascending, on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import erfc, log_ndtr
from scipy.stats import chi2

from ww_monitor.spectra.powerlaw import TailFit, fit_tail

BOOTSTRAP_REPLICAS = 200
"""Synthetic spectra of a goodness-of-fit test: its p-value is good to ½/√replicas = 0.035 (Clauset et al., §4.1)."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(120)  # from 50 on ln Z is the same to 3e-12, for alpha up to 100


@dataclass(frozen=True)
class TruncatedFit:
    """Power law with exponential cut-off, p(λ) ∝ λ^-alpha exp(−Lambda λ) for λ ≥ xmin; alpha ≥ 1, `rate` = Lambda ≥ 0.

    `ks` is the Kolmogorov–Smirnov distance to the tail, `log_likelihood` `[n]` the log density of each point.
    """

    alpha: float
    rate: float
    ks: float
    log_likelihood: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Normalised log-likelihood ratio (positive favours the power law), and the probability of one as large in size.

    That if both laws are equally good: only below 0.1 or so has the sign of the ratio a meaning.
    """

    ratio: float
    p_value: float


def fit_truncated(tail: np.ndarray, *, alpha: float) -> TruncatedFit:
    """Maximise −alpha Σ ln λ − Lambda Σ λ − n ln Z over alpha ≥ 1, Lambda ≥ 0; Z = ∫_xmin^∞ t^-alpha e^(−Lambda t) dt.

    The likelihood is concave and has one maximum; Z and its derivatives come from Gauss–Legendre quadrature in ln t.
    Source: Clauset, Shalizi & Newman 2009, table 2.1.

    Args:
        tail: `[n]` eigenvalues from xmin on, ascending.
        alpha: Exponent of the power-law fit, where the search starts.
    """
    u = tail / tail[0]
    mean_log, mean = float(np.log(u).mean()), float(u.mean())

    def negative(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_z, expected_log, expected = _cutoff_moments(parameters[0], parameters[1])
        value = parameters[0] * mean_log + parameters[1] * mean + log_z
        return value, np.array([mean_log - expected_log, mean - expected])

    start = np.array([max(1.0 + 1e-6, min(alpha, 30.0)), 0.1 / mean])
    best = minimize(negative, start, jac=True, method="L-BFGS-B", bounds=[(1.0, 100.0), (0.0, None)])
    exponent, rate = best.x.tolist()
    if rate == 0.0 and exponent <= 1.0:  # the integral has no end there, and this law no density
        exponent = 1.0 + 1e-9
    log_z = _cutoff_moments(exponent, rate)[0]
    log_likelihood = -exponent * np.log(u) - rate * u - log_z - math.log(tail[0])
    survival = np.array([math.exp(_log_survival(exponent, rate, point) - log_z) for point in u])
    empirical = np.arange(len(u), 0, -1) / len(u)
    return TruncatedFit(exponent, rate / float(tail[0]), float(np.abs(survival - empirical).max()), log_likelihood)


def _cutoff_moments(alpha: float, rate: float) -> tuple[float, float, float]:
    """Return ln ∫_1^∞ t^-alpha e^(−rate t) dt, E ln t and E t."""
    s, weight, integrand, peak = _integrand(alpha, rate, 1.0)
    density = weight * integrand
    total = density.sum()
    return peak + math.log(total), float(density @ s / total), float(density @ np.exp(s) / total)


def _log_survival(alpha: float, rate: float, point: float) -> float:
    """Return ln ∫_point^∞ t^-alpha e^(−rate t) dt."""
    _, weight, integrand, peak = _integrand(alpha, rate, point)
    return peak + math.log(float(weight @ integrand))


def _integrand(alpha: float, rate: float, point: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Nodes s = ln t from ln `point` to where it has fallen by e^-60, their weights, it over its peak, ln of that."""
    by_power = 60.0 / max(alpha - 1, 1e-9)
    by_cutoff = math.log1p(60.0 / (rate * point)) if rate > 0 else math.inf
    length = min(by_power, by_cutoff, 600.0)  # e^710 is not finite
    s = math.log(point) + length * (_NODES + 1) / 2
    exponent = (1 - alpha) * s - rate * np.exp(s)
    peak = float(exponent.max())
    return s, length * _WEIGHTS / 2, np.exp(exponent - peak), peak


def compare(tail: np.ndarray, *, alpha: float) -> dict[str, Comparison]:
    """Likelihood ratios of the power law against an exponential, a log-normal and a truncated power law.

    Vuong's test for the first two; the truncated law contains the power law, so that its p-value is that of Wilks'
    χ² with one degree of freedom. Source: Vuong 1989 (Econometrica 57); Clauset, Shalizi & Newman 2009, §5 and
    appendix C.

    Args:
        tail: `[n]` eigenvalues from xmin on, ascending; n ≥ 3 and not all equal.
        alpha: Exponent of its power-law fit.
    """
    u = tail / tail[0]
    power_law = math.log(alpha - 1) - alpha * np.log(u)
    cutoff = fit_truncated(u, alpha=alpha).log_likelihood
    nested = float((power_law - cutoff).sum())
    rate = 1 / (u.mean() - 1)
    vuong = {"exponential": math.log(rate) - rate * (u - 1), "lognormal": _lognormal(u)}
    compared = {name: _vuong(power_law - other) for name, other in vuong.items()}
    # the law that contains the other fits no worse, but for where its search ends
    compared["truncated"] = Comparison(_vuong(power_law - cutoff).ratio, float(chi2.sf(max(0.0, -2 * nested), 1)))
    return compared


def _vuong(difference: np.ndarray) -> Comparison:
    spread = float(difference.std()) * math.sqrt(len(difference))
    ratio = float(difference.sum()) / spread if spread else 0.0
    return Comparison(ratio, float(erfc(abs(ratio) / math.sqrt(2))))


def _lognormal(u: np.ndarray) -> np.ndarray:
    """Log density of the log-normal truncated to u ≥ 1 with its parameters of maximum likelihood."""
    y = np.log(u)

    def log_density(parameters: np.ndarray) -> np.ndarray:
        mu, sigma = parameters[0], math.exp(parameters[1])
        log_tail = log_ndtr(mu / sigma)
        return np.asarray(-0.5 * ((y - mu) / sigma) ** 2 - parameters[1] - 0.5 * math.log(2 * math.pi) - log_tail - y)

    scale = max(float(y.std()), 1e-6)
    # there may be two maxima: for one of 300 tails the search from the first start alone ended in the lower
    starts = ([float(y.mean()), math.log(scale)], [-3 * scale, math.log(2 * scale)])
    bounds = [(-50 * scale, 50 * scale), (math.log(scale) - 5, math.log(scale) + 5)]

    def negative(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """−log likelihood and its slope in (µ, ln σ), without which the search stops at six digits."""
        mu, sigma = parameters[0], math.exp(parameters[1])
        z, t = (y - mu) / sigma, mu / sigma
        hazard = math.exp(-0.5 * t * t - 0.5 * math.log(2 * math.pi) - log_ndtr(t))
        slope = np.array([len(y) * hazard / sigma - z.sum() / sigma, len(y) * (1 - hazard * t) - (z * z).sum()])
        return -float(log_density(parameters).sum()), slope

    search = partial(minimize, negative, jac=True, method="L-BFGS-B", bounds=bounds)
    found = [search(np.array(start), options={"ftol": 1e-15, "gtol": 1e-10}) for start in starts]
    return log_density(min(found, key=lambda result: float(result.fun)).x)


def goodness_of_fit(eigenvalues: torch.Tensor, fit: TailFit, *, seed: int, replicas: int = BOOTSTRAP_REPLICAS) -> float:
    """P(D* ≥ D) over synthetic spectra drawn from the fit, each fitted anew: small means no power law.

    A synthetic spectrum draws each point from the power law with probability n_tail/n, else from the eigenvalues
    below xmin. Source: Clauset, Shalizi & Newman 2009, §4.1.

    Args:
        eigenvalues: `[n]` of one layer, those above its floor.
        fit: The fit of its tail, as one row.
        seed: Seed of a private generator.
        replicas: Number of synthetic spectra; all are fitted in one batch.
    """
    alpha, xmin, n_tail = float(fit.alpha[0]), float(fit.xmin[0]), int(fit.n_tail[0])
    n, generator = len(eigenvalues), torch.Generator().manual_seed(seed)
    uniform = torch.rand(replicas, n, generator=generator, dtype=torch.float64, device="cpu")
    body = eigenvalues[: n - n_tail]
    drawn = xmin * (1 - uniform) ** (-1 / (alpha - 1))  # 1 itself is never drawn
    if len(body):
        from_body = body[torch.randint(len(body), (replicas, n), generator=generator, dtype=torch.int64, device="cpu")]
        in_tail = torch.rand(replicas, n, generator=generator, dtype=torch.float32, device="cpu") < n_tail / n
        drawn = torch.where(in_tail, drawn, from_body)
    synthetic = fit_tail(drawn.sort(1).values)
    return float((synthetic.ks >= fit.ks[0]).double().mean())
