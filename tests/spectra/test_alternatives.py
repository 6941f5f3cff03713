"""Truncated power laws, likelihood ratios and the bootstrap test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from ww_monitor.spectra.alternatives import compare, fit_truncated, goodness_of_fit
from ww_monitor.spectra.powerlaw import fit_tail


def draw(law: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if law == "power law":
        return np.sort((1 - rng.random(n)) ** (-1 / 1.5))
    if law == "exponential":
        return np.sort(1 + rng.exponential(0.5, n))
    if law == "lognormal":
        x = np.exp(rng.normal(0.3, 0.8, 20 * n))
        return np.sort(x[x > 1][:n])
    points: list[float] = []  # "truncated": rejection from a power law of exponent 1.8
    while len(points) < n:
        y = (1 - rng.random()) ** (-1 / 0.8)
        if rng.random() < np.exp(-0.1 * (y - 1)):
            points.append(y)
    return np.sort(points)


def hill(x: np.ndarray) -> float:
    return float(1 + len(x) / np.log(x / x[0]).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_truncated_law_is_the_maximum_of_its_likelihood(seed):
    """A slow search with an adaptive integral finds the same point."""
    x = draw("truncated", 300, seed)
    fit = fit_truncated(x, alpha=hill(x))

    def negative(p):
        if p[0] < 1 or p[1] < 0:
            return 1e9
        z = integrate.quad(lambda t: t ** -p[0] * np.exp(-p[1] * t), x[0], np.inf, limit=200)[0]
        return p[0] * np.log(x).sum() + p[1] * x.sum() + len(x) * np.log(z)

    slow = optimize.minimize(
        negative, [fit.alpha * 1.05, fit.rate * 0.9], method="Nelder-Mead", options={"xatol": 1e-6}
    )
    assert fit.alpha == pytest.approx(slow.x[0], abs=2e-3)
    assert fit.rate == pytest.approx(slow.x[1], rel=2e-2)
    assert -fit.log_likelihood.sum() == pytest.approx(slow.fun, abs=1e-3)


def test_a_planted_truncated_law_is_recovered():
    fits = [fit_truncated(x, alpha=hill(x)) for x in (draw("truncated", 2000, seed) for seed in range(5))]
    assert np.mean([fit.alpha for fit in fits]) == pytest.approx(1.8, abs=0.05)
    assert np.mean([fit.rate for fit in fits]) == pytest.approx(0.1, abs=0.02)
    assert max(fit.ks for fit in fits) < 0.04


def test_a_pure_power_law_needs_no_cut_off_and_rescaling_only_rescales_the_rate():
    x = draw("power law", 2000, 0)
    fit, scaled = fit_truncated(x, alpha=hill(x)), fit_truncated(100 * x, alpha=hill(x))
    assert fit.rate < 0.01
    assert fit.alpha == pytest.approx(hill(x), abs=0.1)
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-6)
    assert 100 * scaled.rate == pytest.approx(fit.rate, rel=1e-6)


@pytest.mark.parametrize("law", ["exponential", "lognormal", "truncated"])
def test_the_law_that_made_the_tail_beats_the_power_law(law):
    x = draw(law, 800, 1)
    found = compare(x, alpha=hill(x))[law]
    assert found.ratio < -2
    assert found.p_value < 0.05


def test_a_power_law_beats_the_exponential_and_is_not_rejected_by_the_others():
    x = draw("power law", 800, 1)
    found = compare(x, alpha=hill(x))
    assert found["exponential"].ratio > 3
    assert found["lognormal"].p_value > 0.1
    assert found["truncated"].p_value > 0.1


def test_the_exponential_ratio_is_vuongs_formula():
    """Twin with scipy's densities."""
    x = draw("lognormal", 200, 2)
    x = x / x[0]
    alpha = hill(x)
    difference = stats.pareto(alpha - 1).logpdf(x) - stats.expon(loc=1, scale=x.mean() - 1).logpdf(x)
    ratio = difference.sum() / (difference.std() * np.sqrt(len(x)))
    assert compare(x, alpha=alpha)["exponential"].ratio == pytest.approx(ratio, rel=1e-9)
    assert compare(x, alpha=alpha)["exponential"].p_value == pytest.approx(2 * stats.norm.sf(abs(ratio)), rel=1e-9)


def test_the_nested_p_value_of_the_truncated_law_is_uniform_enough_under_the_power_law():
    """Wilks: about 5 % below 0.05 on the boundary's half (Lambda ≥ 0), so 2.5 %."""
    values = [compare(x, alpha=hill(x))["truncated"].p_value for x in (draw("power law", 300, s) for s in range(100))]
    assert np.mean(np.array(values) < 0.05) < 0.08


def test_the_bootstrap_accepts_power_laws_and_rejects_the_rest():
    accepted = [p_value(draw("power law", 200, seed)) for seed in range(10)]
    assert np.mean(np.array(accepted) > 0.1) >= 0.8
    rejected = [p_value(draw("lognormal", 2000, seed)) for seed in range(5)]
    assert np.median(rejected) < 0.1


def p_value(x: np.ndarray) -> float:
    eigenvalues = torch.from_numpy(np.ascontiguousarray(x))
    return goodness_of_fit(eigenvalues, fit_tail(eigenvalues[None]), seed=0, replicas=60)


def test_the_bootstrap_has_its_own_generator():
    x = draw("power law", 100, 0)
    state = torch.get_rng_state()
    assert p_value(x) == p_value(x)
    assert torch.equal(torch.get_rng_state(), state)
