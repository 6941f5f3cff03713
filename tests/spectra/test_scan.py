"""Branch and bound on the host, everything at once on a device: the same candidate, whatever the chunk size."""

import pytest
import torch

from ww_monitor.spectra import scan


@pytest.fixture(autouse=True, params=["search", "at once"])
def way(request, monkeypatch):
    """Both ways of the host, at every size."""
    monkeypatch.setattr(scan, "_ALL_AT_ONCE", 0 if request.param == "search" else 10**6)


def slow_distances(log_x, exponent):
    """D_i = max_{j ≥ i} |m_j/m_i − exp(−a_i (ln λ_j − ln λ_i))|, one candidate at a time."""
    n = len(log_x)
    size = torch.arange(n, 0, -1, dtype=torch.float64)
    return torch.stack(
        [(size[i:] / size[i] - torch.exp(-exponent[i] * (log_x[i:] - log_x[i]))).abs().max() for i in range(n)]
    )


def draw(batch, n, *, seed, distinct=None):
    """Sorted ln λ, an exponent for each candidate, and candidates that leave some out."""
    generator = torch.Generator().manual_seed(seed)
    log_x = torch.randn(batch, n, generator=generator, dtype=torch.float64).mul(2)
    if distinct:
        log_x = log_x.mul(distinct).round().div(distinct)
    log_x = log_x.sort(1).values
    size = torch.arange(n, 0, -1, dtype=torch.float64)
    total = log_x.flip(1).cumsum(1).flip(1) - size * log_x
    candidate = (total > 1e-12) & (torch.rand(batch, n, generator=generator) < 0.9)
    return log_x, torch.where(candidate, size / total, 0.0), candidate


SIZES = [(1, 1), (3, 2), (4, 63), (3, 64), (2, 65), (2, 129), (2, 1000), (1, 2000)]
"""The last ones are more than is held at a time: candidates by eigenvalues in two or four parts, by anchors in more."""


@pytest.mark.parametrize("distinct", [None, 3])
@pytest.mark.parametrize(("batch", "n"), SIZES)
def test_both_ways_find_the_first_smallest_distance(batch, n, distinct):
    log_x, exponent, candidate = draw(batch, n, seed=n, distinct=distinct)
    index, smallest = scan.best_candidates(log_x, exponent, candidate)
    at_once = scan.ks_distances(log_x, exponent)
    for b in range(batch):
        distances = slow_distances(log_x[b], exponent[b])
        torch.testing.assert_close(at_once[b], distances, rtol=0, atol=1e-14)
        if candidate[b].any():
            distances[~candidate[b]] = float("inf")
            assert candidate[b, index[b]]
            assert smallest[b].item() == pytest.approx(distances.min().item(), abs=1e-14)
            assert index[b] == (distances <= distances.min() + 1e-14).nonzero()[0, 0]
        else:
            assert index[b] == 0
            assert smallest[b] == float("inf")


@pytest.mark.parametrize("anchors", [1, 2, 7, 1000])
def test_number_of_anchors_does_not_matter(monkeypatch, anchors):
    log_x, exponent, candidate = draw(3, 300, seed=2)
    index, smallest = scan.best_candidates(log_x, exponent, candidate)
    monkeypatch.setattr(scan, "_ANCHORS", anchors)
    again, distance = scan.best_candidates(log_x, exponent, candidate)
    assert torch.equal(index, again)
    assert torch.equal(smallest, distance)


@pytest.mark.parametrize("steeper", [1.0, 30.0, 1e4])
def test_a_bound_never_exceeds_the_distance(steeper):
    log_x, exponent, candidate = draw(1, 400, seed=3)
    exponent = steeper * exponent
    index = candidate[0].nonzero().flatten()
    size = torch.arange(400, 0, -1, dtype=torch.float64)
    bound = scan._bounds(log_x[0].numpy(), exponent[0].numpy(), size.numpy(), index.numpy())
    distances = slow_distances(log_x[0], exponent[0])[index]
    assert (torch.from_numpy(bound) <= distances).all()
    if steeper == 1:
        assert (torch.from_numpy(bound) > 0.5 * distances).double().mean() > 0.5


def test_the_first_of_equal_distances_wins_though_a_later_one_is_evaluated_before(monkeypatch):
    """D₀ = D₄ = ½ exactly; the anchors 0, 4 and 7 bound D₄ by ¼ only, so that it comes first."""
    monkeypatch.setattr(scan, "_ANCHORS", 2)
    log_x = torch.tensor([[0.0, 0, 0, 0, 1, 1, 2, 2]], dtype=torch.float64)
    candidate = torch.tensor([[True, False, False, False, True, False, False, False]])
    index, smallest = scan.best_candidates(log_x, torch.full_like(log_x, 1e4), candidate)
    assert (index.item(), smallest.item()) == (0, 0.5)
