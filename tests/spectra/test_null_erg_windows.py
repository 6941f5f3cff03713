"""The null band, the effective correlation space, and windows of one aspect ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.erg import correlation_space
from ww_monitor.spectra.null import null_band, wishart_eigenvalues
from ww_monitor.spectra.powerlaw import fit_tail
from ww_monitor.spectra.windows import windows


def gaussian(draws: int, n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(draws, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (80, 20), (200, 7), (5, 1)])
def test_bidiagonal_draws_have_the_law_of_gaussian_matrices(n, m):
    """First two moments of the largest eigenvalue and of the sum, against full matrices."""
    generator = np.random.default_rng(0)
    fast = np.array([wishart_eigenvalues(n, m, generator) for _ in range(1500)])
    slow = eigenvalues(gaussian(1500, n, m)).values.numpy()
    for statistic in (lambda x: x[:, -1], lambda x: x.sum(1), lambda x: x[:, 0]):
        a, b = statistic(fast), statistic(slow)
        assert a.mean() == pytest.approx(b.mean(), abs=5 * b.std() / math.sqrt(1500))
        assert a.std() == pytest.approx(b.std(), rel=0.12)


def test_nine_of_ten_random_layers_lie_in_their_band():
    band = null_band(120, 60, draws=200)
    fit = fit_tail(eigenvalues(gaussian(300, 120, 60, seed=1)).values)
    inside = (fit.alpha >= band.alpha[0]) & (fit.alpha <= band.alpha[2])
    assert 0.84 <= inside.double().mean().item() <= 0.96
    assert band.alpha[0] < band.alpha[1] < band.alpha[2]


def test_a_layer_with_learnt_modes_is_outside_the_band():
    low_rank = gaussian(1, 120, 60) + 4 * gaussian(1, 120, 3, seed=2) @ gaussian(1, 3, 60, seed=3)
    spectrum = eigenvalues(low_rank).values
    assert spectrum[0, -1] > null_band(120, 60).lambda_max[2]
    assert fit_tail(spectrum).alpha.item() < null_band(120, 60).alpha[0]


def test_a_band_is_computed_once_a_shape_and_is_the_same_for_the_same_seed():
    assert null_band(50, 40) is null_band(50, 40)
    first = null_band(50, 40)
    null_band.cache_clear()
    assert null_band(50, 40) == first
    assert null_band(50, 40, seed=1) != first


def slow_space(values: list[float]) -> int:
    """weightwatcher's product, in exact logarithms, with its conventions."""
    x = sorted(v * len(values) / sum(values) for v in values)
    if len(x) < 2 or not x[0] < x[-1]:
        return 0
    for index in range(len(x) - 1, 0, -1):
        if math.fsum(math.log(v) for v in x[index:]) < 0:
            return len(x) - index
    return len(x)


@pytest.mark.parametrize("seed", range(20))
def test_the_correlation_space_is_the_product_that_falls_below_one(seed):
    values = np.sort(np.exp(np.random.default_rng(seed).normal(0, 1 + seed / 10, 5 + 3 * seed)))
    space = correlation_space(torch.from_numpy(values)[None])
    assert space.size.item() == slow_space(values.tolist())
    whole = space.size.item() == len(values)  # then the tool, and we, name the second smallest as the boundary
    assert space.boundary.item() == values[1 if whole else -int(space.size.item())]
    assert space.rescaled_boundary.item() == pytest.approx(space.boundary.item() * len(values) / values.sum())


def test_large_spectra_do_not_overflow():
    """The tool's plain product gives 4,731 here; the exact figure is in its published reference values."""
    values = np.sort(np.exp(2.0 * np.random.RandomState(0).standard_normal(15_000)))
    assert correlation_space(torch.from_numpy(values)[None]).size.item() == 5_759


def test_the_size_of_the_space_does_not_depend_on_scale_and_is_unknown_without_a_spectrum():
    x = gaussian(3, 1, 50)[:, 0].square().sort(1).values
    assert torch.equal(correlation_space(x).size, correlation_space(1e-12 * x).size)
    assert correlation_space(torch.full((1, 5), float("nan")).double()).size.isnan().all()
    assert correlation_space(torch.zeros(1, 5).double()).size.isnan().all()


@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "shape"),
    [(100, 30, 1.0, (4, 30, 30)), (30, 100, 1.0, (4, 30, 30)), (100, 30, 2.0, (2, 60, 30)), (40, 30, 2.0, (2, 40, 20)),
     (64, 64, 1.0, (1, 64, 64)), (65, 64, 1.0, (2, 64, 64)), (9, 3, 4.0, (2, 9, 2))],
)  # fmt: skip
def test_windows_have_the_asked_shape_and_leave_no_entry_out(rows, columns, ratio, shape):
    w = torch.arange(rows * columns, dtype=torch.float64).view(1, rows, columns)
    cut = windows(w, ratio)
    assert tuple(cut.shape) == shape
    assert set(cut.flatten().tolist()) == set(w.flatten().tolist())


def test_windows_make_alpha_comparable_between_shapes():
    """The same kind of matrix, square and four times as tall: closer by windows than as a whole."""

    def alpha(n: int, seed: int, ratio: float | None) -> float:
        w = gaussian(1, n, 100, seed)
        cut = w if ratio is None else windows(w, ratio)
        spectrum = eigenvalues(cut).values.flatten().sort().values[None]
        return math.log(spectrum[0, -1] / spectrum[0].median())

    spread = {}
    for ratio in (None, 1.0):
        square, tall = (np.mean([alpha(n, seed, ratio) for seed in range(5)]) for n in (100, 400))
        spread[ratio] = abs(square - tall)
    assert spread[1.0] < 0.1 * spread[None]
