"""The power-law tail is that of a slow loop over every candidate, of weightwatcher, and of planted power laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_matrices import pareto

from ww_monitor.spectra.powerlaw import fit_tail
from ww_monitor.spectra.status import Status


def slow_candidates(values, floor, allow_short):
    """Every candidate as (start, alpha, D), point by point from the formulas of the specification, §3.1 and §3.2.

    Unlike there a tail of equal values is no candidate (its alpha is infinite), nor is a short sample by default.
    """
    x = [v for v in values if v > floor]
    n = len(x)
    small = n < 20
    shortest = 2
    if small:
        shortest = n if allow_short and n < 8 else 8
    found = []
    for i in range(n - 1):
        m = n - i
        total = sum(math.log(x[j]) - math.log(x[i]) for j in range(i, n))
        if m < shortest or total <= 1e-12:
            continue
        alpha = 1 + (m - 1 if small else m) / total
        distance = max(abs(1 - (x[j] / x[i]) ** (1 - alpha) - (j - i) / m) for j in range(i, n))
        found.append((i, alpha, distance))
    return x, found


def assert_equals_the_loop(values, floor, allow_short):
    fit = fit_tail(torch.tensor([values], dtype=torch.float64), floor=floor, allow_short=allow_short)
    x, found = slow_candidates(values, floor, allow_short)
    assert fit.num_fitted.item() == len(x)
    if not found:
        enough = len(x) >= (2 if allow_short else 8)
        assert fit.status.item() == (Status.DEGENERATE if enough else Status.FEW_EIGENVALUES)
        assert fit.alpha.isnan().item()
        assert fit.xmin.isnan().item()
        assert fit.ks.isnan().item()
        assert fit.sigma.isnan().item()
        assert fit.n_tail.item() == 0
        return
    smallest = min(distance for _, _, distance in found)
    first = next(start for start, _, distance in found if distance <= smallest + 1e-12)
    start = len(x) - int(fit.n_tail)
    chosen = next(candidate for candidate in found if candidate[0] == start)
    tied = sum(distance <= smallest + 1e-12 for _, _, distance in found) > 1
    assert start == first or (tied and chosen[2] <= smallest + 1e-12)
    assert fit.status.item() == Status.OK
    assert fit.xmin.item() == x[start]
    assert fit.alpha.item() == pytest.approx(chosen[1], rel=1e-12)
    assert fit.ks.item() == pytest.approx(smallest, abs=1e-12)
    assert fit.sigma.item() == pytest.approx((chosen[1] - 1) / math.sqrt(len(x) - start), rel=1e-12)


@st.composite
def spectra(draw):
    """2 to 60 eigenvalues with ties (few distinct values) or a heavy tail, and a floor that may cut some off."""
    size = draw(st.integers(2, 60))
    numbers = st.integers(1, draw(st.sampled_from([2, 10, 400])))
    power = draw(st.sampled_from([0.5, 1.0, 3.0]))
    values = sorted((k / 7) ** power for k in draw(st.lists(numbers, min_size=size, max_size=size)))
    floor = draw(st.sampled_from([0.0, values[0], values[size // 3], values[-1]]))
    return values, floor


@settings(deadline=None, max_examples=400)
@given(case=spectra(), allow_short=st.booleans())
def test_equals_the_loop_over_every_candidate(case, allow_short):
    assert_equals_the_loop(*case, allow_short)


def wishart(rows, columns, *, seed=0):
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.svdvals(noise).square().flip(0)[None]


LARGE = {
    "power law": pareto(2.5, 700),
    "random bulk": wishart(900, 600),
    "square": wishart(400, 400),
    "bulk and tail": torch.cat([wishart(500, 300), 2500 * pareto(2.0, 60)], 1),
    "ties": pareto(3.0, 500).mul(8).round(),
}


@pytest.mark.parametrize("values", LARGE.values(), ids=LARGE)
def test_equals_the_loop_where_most_candidates_are_only_bounded(values):
    assert_equals_the_loop(values[0].tolist(), 0.0, allow_short=False)


def test_equals_weightwatcher_itself(run_weightwatcher):
    source = """
def answer(weightwatcher, spectra):
    from weightwatcher.WW_powerlaw import pl_fit
    fits = [pl_fit(data=values) for values in spectra]
    return [[float(fit.alpha), float(fit.xmin), float(fit.D), float(fit.sigma)] for fit in fits]
"""
    spectra = [*LARGE.values(), pareto(2.0, 20), pareto(2.0, 19), wishart(60, 12), wishart(1000, 8), pareto(4.0, 57)]
    answers = run_weightwatcher(source, [values[0].tolist() for values in spectra])
    for values, (alpha, xmin, distance, sigma) in zip(spectra, answers, strict=True):
        fit = fit_tail(values)
        assert fit.alpha.item() == pytest.approx(alpha, rel=1e-11)
        assert fit.xmin.item() == pytest.approx(xmin, rel=1e-14)
        assert fit.ks.item() == pytest.approx(distance, rel=1e-11)
        assert fit.sigma.item() == pytest.approx(sigma, rel=1e-11)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("size", [200, 1000, 5000])
def test_recovers_a_planted_exponent_within_three_sigma_in_95_of_100_draws(alpha, size):
    fit = fit_tail(pareto(alpha, size, draws=100, seed=int(1000 * alpha) + size))
    deviation = (fit.alpha - alpha) / fit.sigma
    assert (deviation.abs() <= 3).sum() >= 95
    assert deviation.mean().abs() < 0.5
    assert 0.7 < deviation.std() < 1.5


def assert_same_fit(first, second, *, scale=1.0):
    torch.testing.assert_close(first.alpha, second.alpha, rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(first.ks, second.ks, rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(first.xmin, second.xmin * scale, rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(first.n_tail, second.n_tail)
    assert torch.equal(first.status, second.status)


@pytest.mark.parametrize("exponent", [-30, -9, 0.7, 12, 60])
def test_scale_leaves_alpha_and_multiplies_xmin(exponent):
    values = torch.cat([pareto(2.5, 300, draws=3), wishart(400, 300)])
    scale = 10.0**exponent
    assert_same_fit(fit_tail(values * scale, floor=2.0 * scale), fit_tail(values, floor=2.0), scale=scale)


def test_rows_of_a_batch_are_independent():
    """Each row of a batch, also beside NaN, zeros and rows with other floors, is bit-identical to its own fit."""
    rows = torch.cat([pareto(2.0, 90, draws=2), wishart(200, 90), torch.zeros(1, 90), wishart(90, 90, seed=3)])
    rows[1] = float("nan")
    rows[2, :75] = 0.0
    floors = torch.tensor([1.5, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    together = fit_tail(rows, floor=floors)
    for b in range(len(rows)):
        alone = fit_tail(rows[b : b + 1], floor=floors[b])
        for field, value in vars(together).items():
            assert torch.equal(value[b : b + 1].nan_to_num(-1), getattr(alone, field).nan_to_num(-1)), field
    assert together.status.tolist() == [Status.OK, Status.FEW_EIGENVALUES, Status.OK, Status.FEW_EIGENVALUES, Status.OK]


STATUSES = {
    "NaN": ([math.nan] * 30, Status.FEW_EIGENVALUES, Status.FEW_EIGENVALUES),
    "zero": ([0.0] * 30, Status.FEW_EIGENVALUES, Status.FEW_EIGENVALUES),
    "one": ([1.0], Status.FEW_EIGENVALUES, Status.FEW_EIGENVALUES),
    "one above the floor": ([0.0] * 30 + [1.0], Status.FEW_EIGENVALUES, Status.FEW_EIGENVALUES),
    "two": ([1.0, 2.0], Status.FEW_EIGENVALUES, Status.OK),
    "seven": ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], Status.FEW_EIGENVALUES, Status.OK),
    "seven above the floor": ([0.0] * 20 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], Status.FEW_EIGENVALUES, Status.OK),
    "eight": ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], Status.OK, Status.OK),
    "two equal": ([3.0] * 2, Status.FEW_EIGENVALUES, Status.DEGENERATE),
    "eight equal": ([3.0] * 8, Status.DEGENERATE, Status.DEGENERATE),
    "thirty equal": ([3.0] * 30, Status.DEGENERATE, Status.DEGENERATE),
}


@pytest.mark.parametrize(("values", "by_default", "with_short"), STATUSES.values(), ids=STATUSES)
def test_status_says_why_there_is_no_tail(values, by_default, with_short):
    row = torch.tensor([values], dtype=torch.float64)
    for allow_short, expected in ((False, by_default), (True, with_short)):
        fit = fit_tail(row, allow_short=allow_short)
        assert fit.status.tolist() == [expected]
        assert fit.alpha.isfinite().item() == (expected == Status.OK)


@pytest.mark.parametrize("scale", [1e-60, 1e-7, 3.0, 7e59])
def test_equal_eigenvalues_are_degenerate_at_every_scale(scale):
    """A sum of logarithms of that size rounds to more than nothing, so it is taken relative to the largest."""
    row = torch.full((1, 3000), scale, dtype=torch.float64)
    assert fit_tail(row).status.tolist() == [Status.DEGENERATE]
