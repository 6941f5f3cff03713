"""Hill, fingers and the averaged exponent."""

from __future__ import annotations

import math

import pytest
import torch
from random_matrices import pareto

from ww_monitor.spectra.estimators import fit_hill, fit_without_fingers, soft_alpha
from ww_monitor.spectra.powerlaw import fit_tail
from ww_monitor.spectra.status import Status


def slow_hill(row: list[float], k: int) -> float:
    tail = sorted(row)[-k:]
    return 1 + k / sum(math.log(x / tail[0]) for x in tail)


@pytest.mark.parametrize(("n", "k", "expected_k"), [(100, None, 50), (101, None, 51), (100, 10, 10), (100, 500, 100)])
def test_hill_is_the_textbook_sum_over_the_k_largest(n, k, expected_k):
    x = pareto(2.5, n)
    fit = fit_hill(x, k=k)
    assert fit.alpha.item() == pytest.approx(slow_hill(x[0].tolist(), expected_k), rel=1e-12)
    assert fit.n_tail.item() == expected_k
    assert fit.sigma.item() == pytest.approx((fit.alpha.item() - 1) / expected_k**0.5)


def test_hill_recovers_a_planted_exponent_and_its_error_bar_is_right():
    fit = fit_hill(pareto(3.0, 2000, draws=200), k=1000)
    z = (fit.alpha - 3.0) / fit.sigma
    assert abs(z.mean().item()) < 0.3
    assert 0.8 < z.std().item() < 1.2


def test_hill_on_zeros_or_ties_has_a_status_and_no_number():
    x = torch.stack([torch.zeros(20), torch.ones(20)]).double()
    fit = fit_hill(x)
    assert fit.status.tolist() == [Status.FEW_EIGENVALUES, Status.DEGENERATE]
    assert fit.alpha.isnan().all()


@pytest.mark.parametrize("n", [12, 14, 20, 60, 400])
def test_fingers_never_make_a_fit_fail_that_works_without(n):
    """weightwatcher's search runs off the end of short spectra."""
    x = pareto(3.0, n, draws=20, seed=n)
    plain, clipped = fit_tail(x), fit_without_fingers(x)
    assert torch.equal(plain.status, clipped.tail.status)
    assert not clipped.tail.alpha.isnan().any()
    assert torch.equal(clipped.raw_alpha, plain.alpha)


def test_fingers_are_left_out_only_where_alpha_falls_by_more_than_one_and_the_smallest_number_is_taken():
    x = torch.cat([pareto(3.0, 200, seed=s) for s in range(40)])
    x = torch.where(torch.arange(200) >= 190, x[:, 190:191] * torch.linspace(1, 1.01, 200, dtype=torch.float64), x)
    x = x.sort(1).values
    fit = fit_without_fingers(x)
    for row, removed, alpha, raw in zip(x, fit.num_fingers, fit.tail.alpha, fit.raw_alpha, strict=True):
        drops = [r for r in range(1, 11) if fit_tail(row[None, :-r]).alpha.item() + 1 < raw.item()]
        assert removed.item() == (drops[0] if drops else 0)
        cut = row[: len(row) - int(removed)]
        assert alpha.item() == fit_tail(cut[None]).alpha.item()
    assert (fit.num_fingers > 0).any(), "the case shows fingers"


def test_one_finger_can_be_removed_where_weightwatcher_starts_at_two():
    x = torch.cat([pareto(3.0, 60, seed=s) for s in range(200)])
    ours, theirs = fit_without_fingers(x), fit_without_fingers(x, weightwatcher=True)
    assert (ours.num_fingers == 1).any()
    removed_there = torch.where(theirs.num_fingers > 0, theirs.num_fingers + 1, theirs.num_fingers)
    assert not (removed_there == 1).any()


def test_the_averaged_exponent_moves_less_than_the_usual_one_under_small_noise():
    """xmin jumps between near-equal minima; the average over candidates does not."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(20, 200, 100, generator=generator, dtype=torch.float64)
    noise = 1e-2 * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    before, after = (torch.linalg.svdvals(m).square().flip(1) for m in (w, w + noise))
    jump = (fit_tail(after).alpha - fit_tail(before).alpha).abs()
    soft = (soft_alpha(after).alpha - soft_alpha(before).alpha).abs()
    assert jump.max().item() > 0.5, "the case has jumps"
    assert soft.max().item() < 0.25 * jump.max().item()


def test_the_averaged_exponent_agrees_with_the_usual_one_on_a_clean_power_law_and_its_spread_is_small():
    x = pareto(2.5, 2000, draws=20, seed=5)
    soft, usual = soft_alpha(x), fit_tail(x)
    assert ((soft.alpha - usual.alpha).abs() < 3 * usual.sigma + soft.spread).all()
    assert (soft.spread < 0.3).all()


def test_the_averaged_exponent_does_not_depend_on_scale_and_is_unknown_without_candidates():
    x = pareto(2.5, 300)
    assert soft_alpha(1e-9 * x).alpha.item() == pytest.approx(soft_alpha(x).alpha.item(), rel=1e-9)
    assert soft_alpha(torch.ones(1, 30, dtype=torch.float64)).alpha.isnan().all()
