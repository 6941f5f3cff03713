"""The Tracy–Widom law is the published one, random matrices have no spikes, and planted spikes are counted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_matrices import SHAPES, normal, outlier, wishart_eigenvalues, with_spikes
from scipy.integrate import solve_ivp
from scipy.special import airy
from scipy.stats import kstest

from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.marchenko_pastur import (
    SIGNIFICANCE,
    bulk,
    johnstone,
    per_matrix,
    tracy_widom_quantile,
    tracy_widom_sf,
    tracy_widom_sf_exact,
)

PUBLISHED = {0.90: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.995: 2.4224, 0.999: 3.2724}
"""Quantiles of TW₁: Bejan 2005, "Largest eigenvalues and sample covariance matrices", table 1 (0.995 and 0.999 are
given there to about 2e-4)."""


@pytest.mark.parametrize(("probability", "quantile"), PUBLISHED.items())
def test_quantiles_are_the_published_ones(probability, quantile):
    assert tracy_widom_quantile(1 - probability) == pytest.approx(quantile, abs=5e-4 if probability > 0.99 else 6e-5)


def test_moments_are_the_published_ones():
    """Mean, variance, skewness and excess kurtosis of TW₁ (Bornemann 2010, table 10)."""
    s = np.linspace(-8, 60, 200_001)
    density = -np.gradient(tracy_widom_sf(torch.from_numpy(s)).numpy(), s)
    mean = np.trapezoid(s * density, s)
    central = [np.trapezoid((s - mean) ** k * density, s) for k in range(5)]
    assert mean == pytest.approx(-1.2065335745, abs=1e-4)
    assert central[2] == pytest.approx(1.6077810345, abs=1e-3)
    assert central[3] / central[2] ** 1.5 == pytest.approx(0.2934645240, abs=1e-3)
    assert central[4] / central[2] ** 2 - 3 == pytest.approx(0.1652429384, abs=1e-2)


def test_determinant_converges_in_the_number_of_nodes():
    """32 nodes give what 64 and 96 do to 1e-12, relative to a tail of 1e-137 too; 12 do not."""
    s = np.linspace(-8, 60, 80)
    fine = tracy_widom_sf_exact(s, nodes=96)
    assert np.abs(tracy_widom_sf_exact(s, nodes=32) / fine - 1).max() < 1e-12
    assert np.abs(tracy_widom_sf_exact(s, nodes=64) / fine - 1).max() < 1e-12
    assert np.abs(tracy_widom_sf_exact(s, nodes=12) / fine - 1).max() > 1e-8


def test_determinant_equals_the_painleve_transcendent():
    """F₁(s) = exp(−½ ∫_s^∞ q + (x − s) q² dx), q″ = sq + 2q³, q ~ Ai (Tracy & Widom 1996), integrated numerically."""

    def derivative(s, y):
        q, slope, _, single_integral, _ = y
        return [slope, s * q + 2 * q**3, -single_integral, -(q**2), -q]

    start, stop = 8.0, -4.0
    ai, ai_slope = airy(start)[:2]
    x = np.linspace(start, 20, 4001)
    tail = airy(x)[0]
    first = [np.trapezoid((x - start) * tail**2, x), np.trapezoid(tail**2, x), np.trapezoid(tail, x)]
    points = np.linspace(4, stop, 33)
    solved = solve_ivp(
        derivative, (start, stop), [ai, ai_slope, *first], t_eval=points, method="DOP853", rtol=1e-12, atol=1e-15
    )
    by_painleve = -np.expm1(-0.5 * (solved.y[4] + solved.y[2]))
    np.testing.assert_allclose(tracy_widom_sf_exact(points), by_painleve, rtol=1e-5)


def test_table_is_within_1e_6_of_the_determinant():
    s = np.random.default_rng(0).uniform([-8, 8], [8, 60], [200, 2]).flatten()
    exact = tracy_widom_sf_exact(s, nodes=32)
    np.testing.assert_allclose(tracy_widom_sf(torch.from_numpy(s)).numpy(), exact, rtol=1e-6)


def test_survival_falls_from_one_to_zero_and_keeps_nan():
    s = torch.tensor([-1e9, -9.0, -8.0, 0.0, 60.0, 61.0, 1e9, math.inf, math.nan], dtype=torch.float64)
    p = tracy_widom_sf(s)
    torch.testing.assert_close(p[:3], torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    assert (p[:8].diff() <= 0).all()
    assert 0 < p[7] < 1e-136
    assert p[8].isnan()


@given(st.floats(1e-130, 0.999))
def test_quantile_inverts_the_survival(p):
    assert tracy_widom_sf(torch.tensor(tracy_widom_quantile(p))).item() == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-137, -1.0, 2.0])
def test_a_probability_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match="p must be between 1e-136 and 1; got"):
        tracy_widom_quantile(p)


def test_levels_of_several_tests_combine():
    assert 1 - (1 - per_matrix(0.01, 9)) ** 9 == pytest.approx(0.01)
    assert per_matrix(0.01, 1) == pytest.approx(0.01)


def gaussian_eigenvalues(long_side, short_side, *, draws):
    """Of the matrices themselves where that is cheap, else from the bidiagonal model, which has the same law."""
    if long_side * short_side > 40_000:
        return wishart_eigenvalues(long_side, short_side, draws=draws, seed=long_side + short_side)
    matrices = normal(draws, long_side, short_side, seed=long_side + short_side, dtype=torch.float32)
    return eigenvalues(matrices).values


def test_bidiagonal_model_has_the_law_of_gaussian_matrices():
    direct = eigenvalues(normal(2000, 30, 20, seed=0)).values
    modelled = wishart_eigenvalues(30, 20, draws=2000, seed=0)
    for index in (0, 10, 19):
        assert kstest(direct[:, index].numpy(), modelled[:, index].numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("long_side", "short_side"), SHAPES)
def test_at_most_one_random_matrix_in_a_hundred_has_a_spike(long_side, short_side):
    fit = bulk(gaussian_eigenvalues(long_side, short_side, draws=200), long_side=long_side, short_side=short_side)
    assert (fit.num_spikes > 0).sum() <= 2
    assert ((fit.p_value < SIGNIFICANCE) == (fit.num_spikes > 0)).all()
    torch.testing.assert_close(fit.variance.mean().item(), 1.0, rtol=5e-3, atol=0)


def test_the_level_is_what_was_asked_for():
    """Of 4,000 random matrices a share of about 5 % has a spike at the level 5 %, and of 1 % at 1 %."""
    spectra = wishart_eigenvalues(200, 100, draws=4000, seed=1)
    for level in (0.05, 0.01):
        fit = bulk(spectra, long_side=200, short_side=100, significance=level)
        assert 0.6 * level < (fit.num_spikes > 0).double().mean() < 1.4 * level


def test_p_values_of_random_matrices_are_about_uniform():
    p_value = bulk(wishart_eigenvalues(200, 100, draws=2000, seed=2), long_side=200, short_side=100).p_value
    assert kstest(p_value.numpy(), "uniform").statistic < 0.05


@pytest.mark.parametrize(("slices", "long_side", "short_side"), [(9, 64, 32), (9, 128, 64), (4, 64, 32), (25, 24, 12)])
def test_pooled_slices_share_the_level(slices, long_side, short_side):
    """Two hundred random kernels have a spike in at most 1 %, and the variance of the entries."""
    spectra = eigenvalues(normal(200 * slices, long_side, short_side, seed=slices)).values
    pooled = spectra.view(200, -1).sort(1).values
    fit = bulk(pooled, long_side=long_side, short_side=short_side, slices=slices)
    assert (fit.num_spikes > 0).sum() <= 2
    torch.testing.assert_close(fit.variance.mean().item(), 1.0, rtol=5e-3, atol=0)


def test_a_spike_in_one_of_nine_slices_is_counted():
    kernel = normal(9, 64, 32, seed=3)
    kernel[4] = with_spikes(64, 32, [2.5 * (64 * 32) ** 0.25], seed=4)
    pooled = eigenvalues(kernel).values.flatten().sort().values[None]
    assert bulk(pooled, long_side=64, short_side=32, slices=9).num_spikes.tolist() == [1]


@pytest.mark.parametrize(("long_side", "short_side"), SHAPES[:7])
@pytest.mark.parametrize("count", [1, 3])
def test_planted_spikes_above_the_threshold_are_counted(long_side, short_side, count):
    """Each lies where Benaych-Georges & Nadakuditi put it, and none of those at 0.7 of the threshold is seen."""
    threshold = (long_side * short_side) ** 0.25
    strengths = [threshold * (2 + 0.5 * k) for k in range(count)]
    for seed in range(5):
        matrix = with_spikes(long_side, short_side, strengths, seed=100 * seed)
        spectrum = eigenvalues(matrix[None]).values
        fit = bulk(spectrum, long_side=long_side, short_side=short_side)
        assert fit.num_spikes.tolist() == [count]
        assert fit.p_value.item() < SIGNIFICANCE
        places = torch.tensor([outlier(theta, long_side, short_side) for theta in strengths], dtype=torch.float64)
        torch.testing.assert_close(spectrum[0, -count:], places, rtol=0.25, atol=0)
        weak = with_spikes(long_side, short_side, [0.7 * threshold] * count, seed=100 * seed)
        assert bulk(eigenvalues(weak[None]).values, long_side=long_side, short_side=short_side).num_spikes.item() == 0


@pytest.mark.parametrize(("long_side", "short_side"), [(200, 200), (400, 200), (1000, 200)])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_many_spikes_neither_hide_one_another_nor_inflate_the_variance(long_side, short_side, share):
    count = int(share * short_side)
    strengths = (long_side * short_side) ** 0.25 * np.geomspace(3.0, 30.0, count)
    matrix = with_spikes(long_side, short_side, strengths, seed=7)
    fit = bulk(eigenvalues(matrix[None]).values, long_side=long_side, short_side=short_side)
    assert fit.num_spikes.item() == pytest.approx(count, abs=1)
    assert fit.variance.item() == pytest.approx(1.0, rel=0.05)


def slow_bulk(spectrum, long_side, short_side, slices):
    """The largest k ≤ n/2 whose k-th eigenvalue exceeds the threshold of the matrix without the k − 1 larger."""
    values, count = sorted(spectrum.tolist()), 0
    quantile = tracy_widom_quantile(1 - (1 - SIGNIFICANCE) ** (1 / slices))

    def variance_and_threshold(k):
        n, m = long_side - k / slices, short_side - k / slices
        variance = sum(values[: len(values) - k]) / (slices * n * m)
        root_n, root_m = math.sqrt(n - 1), math.sqrt(m)
        scale = (root_n + root_m) * (1 / root_n + 1 / root_m) ** (1 / 3)
        return variance, variance * ((root_n + root_m) ** 2 + quantile * scale)

    for k in range(len(values) // 2 + 1):
        if values[len(values) - 1 - k] > variance_and_threshold(k)[1]:
            count = min(k + 1, len(values) // 2)
    return (count, *variance_and_threshold(count))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    slices=st.integers(1, 4),
    short_side=st.integers(6, 20),
    extra=st.integers(0, 30),
    spikes=st.integers(0, 8),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
)
def test_equals_the_slow_twin_at_every_scale(seed, slices, short_side, extra, spikes, scale):
    long_side = short_side + extra
    spectrum = eigenvalues(normal(slices, long_side, short_side, seed=seed)).values.flatten().sort().values
    spectrum[len(spectrum) - spikes :] *= 20
    fit = bulk(spectrum[None] * scale, long_side=long_side, short_side=short_side, slices=slices)
    count, variance, threshold = slow_bulk(spectrum, long_side, short_side, slices)
    assert fit.num_spikes.item() == count
    assert fit.variance.item() == pytest.approx(variance * scale, rel=1e-12)
    assert fit.threshold.item() == pytest.approx(threshold * scale, rel=1e-9)
    assert fit.edge_min.item() == pytest.approx(fit.variance.item() * (long_side**0.5 - short_side**0.5) ** 2)
    assert fit.edge_max.item() == pytest.approx(fit.variance.item() * (long_side**0.5 + short_side**0.5) ** 2)
    n, m = (torch.tensor(side - count / slices, dtype=torch.float64) for side in (long_side, short_side))
    centre, width = johnstone(n, m)
    p = tracy_widom_sf((spectrum[-1] / variance - centre) / width).item()
    assert fit.p_value.item() == pytest.approx(1 - (1 - p) ** slices, rel=1e-6, abs=1e-15)


def test_rows_without_a_spectrum_have_no_bulk():
    rows = torch.stack([torch.full((20,), math.nan), torch.zeros(20), torch.ones(20)]).double()
    fit = bulk(rows, long_side=30, short_side=20)
    assert fit.num_spikes.tolist() == [0, 0, 0]
    assert fit.p_value.isnan().tolist() == [True, True, False]
    assert fit.variance.isnan().tolist() == [True, False, False]
