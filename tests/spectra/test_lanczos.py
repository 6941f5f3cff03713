"""What lies above a threshold is counted as the full spectrum counts it, or not at all."""

import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_matrices import normal, with_spikes

from ww_monitor.spectra import lanczos
from ww_monitor.spectra.elements import Elements
from ww_monitor.spectra.lanczos import BLOCKS
from ww_monitor.spectra.shuffle import Shuffled, gram_of_shuffled


@dataclass(frozen=True)
class Outliers:
    """What lies above the threshold in one matrix."""

    count: int
    largest: float


def outliers(matrix, *, mean, std, threshold, seed):
    """Those of (W − mean)/std, or None where they are not known."""
    stats = Elements(*(torch.tensor([value], dtype=torch.float64) for value in (mean, std, 1.0, 0.0)))
    as_it_is = torch.arange(matrix.numel(), dtype=torch.int32)
    gram = gram_of_shuffled([matrix], stats, as_it_is)
    found = lanczos.outliers(gram, threshold=threshold, seed=seed)
    return Outliers(int(found.count[0]), float(found.largest[0])) if found.known[0] else None


def slow_outliers(matrix, *, mean=0.0, std=1.0, threshold):
    """All singular values, one by one."""
    spectrum = np.linalg.svd((matrix.double().numpy() - mean) / std, compute_uv=False) ** 2
    return Outliers(count=sum(float(value) > threshold for value in spectrum), largest=float(spectrum[0]))


def assert_equal(found, expected):
    assert found.count == expected.count
    assert found.largest == pytest.approx(expected.largest, rel=1e-9)


def edge(rows, columns):
    return (rows**0.5 + columns**0.5) ** 2


@pytest.mark.parametrize("shape", [(256, 256), (900, 256), (256, 900), (768, 700)])
@pytest.mark.parametrize(
    "strengths", [[], [40.0], [45.0, 45.0, 45.0], [1e3, 60.0, 1e2, 1e5], [60.0 + 3 * k for k in range(8)]], ids=len
)
def test_outliers_of_spiked_noise_are_counted(shape, strengths):
    matrix = with_spikes(*shape, strengths, seed=1)
    threshold = 1.05 * edge(*shape)
    expected = slow_outliers(matrix, threshold=threshold)
    assert_equal(outliers(matrix, mean=0.0, std=1.0, threshold=threshold, seed=2), expected)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_repeated_eigenvalues_are_counted_as_often_as_they_occur(copies):
    """One Krylov space holds a single copy of each."""
    values = torch.cat([torch.full((copies,), 30.0), torch.linspace(1, 20, 400 - copies)]).double()
    rotation = torch.linalg.qr(normal(400, 400, seed=0)).Q
    found = outliers(rotation * values @ rotation.T, mean=0.0, std=1.0, threshold=600.0, seed=0)
    assert_equal(found, Outliers(count=copies, largest=900.0))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(64, 200),
    columns=st.integers(64, 200),
    places=st.lists(st.floats(0, 60), max_size=6),
    degrees=st.sampled_from([2.5, 4.0, 100.0]),
    mean=st.sampled_from([0.0, 0.1, -30.0]),
    std=st.sampled_from([1.0, 1e-6, 1e12]),
    level=st.floats(0.9, 1.5),
)
def test_an_answer_is_that_of_the_full_spectrum(seed, rows, columns, places, degrees, mean, std, level):
    entries = np.random.default_rng(seed).standard_t(degrees, (rows, columns))
    entries.flat[: len(places)] = places
    matrix = torch.from_numpy(entries * std + mean * std)
    arguments = {"mean": mean * std, "std": std, "threshold": level * edge(rows, columns)}
    found = outliers(matrix, seed=seed, **arguments)
    if found is not None:
        assert_equal(found, slow_outliers(matrix, **arguments))


@pytest.mark.parametrize("side", [1 - 1e-6, 1 + 1e-6])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_eigenvalue_close_to_the_threshold_is_put_on_its_side(side, rank):
    matrix = with_spikes(300, 256, [80.0, 70.0, 60.0], seed=1)
    eigenvalue = float(torch.linalg.svdvals(matrix)[rank] ** 2)
    found = outliers(matrix, mean=0.0, std=1.0, threshold=eigenvalue * side, seed=0)
    assert found is None or found.count == rank + (side < 1)
    if side < 1:
        assert found is not None


@pytest.mark.parametrize("distance", [0.0, 1e-12, -1e-12])
def test_an_eigenvalue_at_the_threshold_is_not_decided(distance):
    matrix = with_spikes(300, 256, [80.0, 60.0], seed=1)
    eigenvalue = float(torch.linalg.svdvals(matrix)[1] ** 2)
    assert outliers(matrix, mean=0.0, std=1.0, threshold=eigenvalue * (1 + distance), seed=0) is None


@pytest.mark.parametrize(
    ("matrix", "mean", "std"),
    [
        (torch.zeros(100, 80), 0.0, 1.0),
        (torch.ones(100, 80), 0.0, 1.0),
        (torch.ones(100, 80), 1.0, 1.0),
        (torch.eye(100), 0.0, 1.0),
        (normal(100, 80, seed=0), 0.0, 0.0),
        (normal(100, 80, seed=0), 0.0, float("nan")),
        (normal(100, 80, seed=0), 0.0, 1e-310),
        (normal(100, 80, seed=0) * 1e30, 0.0, 1.0),
        (torch.full((100, 80), float("nan")), 0.0, 1.0),
        (normal(100, 80, seed=0).index_fill(0, torch.tensor([3]), float("inf")), 0.0, 1.0),
        (with_spikes(300, 256, [60.0 + k for k in range(BLOCKS[-1])], seed=0), 0.0, 1.0),
    ],
    ids=["zero", "rank 1", "constant", "identity", "std 0", "std NaN", "std tiny", "overflow", "NaN", "inf", "many"],
)
def test_what_is_not_known_is_left_to_the_full_spectrum(matrix, mean, std):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outliers(matrix, mean=mean, std=std, threshold=1.02 * edge(300, 256), seed=0) is None


def test_the_answer_depends_on_the_seed_in_rounding_only_and_touches_no_global_stream():
    matrix = with_spikes(300, 256, [60.0, 70.0], seed=1)
    torch_before, numpy_before, python_before = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
    )
    answers = [outliers(matrix, mean=0.0, std=1.0, threshold=1200.0, seed=seed) for seed in (*range(5), 0)]
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert random.getstate() == python_before
    assert answers[0] == answers[-1]
    for answer in answers:
        assert_equal(answer, answers[0])


def test_the_largest_eigenvalue_of_noise_is_found_whatever_the_start():
    """At the edge the two largest may be so close that the second is found first."""
    threshold, answered = 1.1 * edge(300, 200), 0
    for seed in range(150):
        matrix = normal(300, 200, seed=seed)
        found = outliers(matrix, mean=0.0, std=1.0, threshold=threshold, seed=seed)
        answered += found is not None
        assert_equal(found or slow_outliers(matrix, threshold=threshold), slow_outliers(matrix, threshold=threshold))
    assert answered >= 135


def in_float32(matrix, *, threshold, product=None):
    """As the host does it: directions from a float32 Gram matrix, their values from float64 products."""
    gram = matrix.mT @ matrix
    found = lanczos.outliers(
        gram.float()[None], threshold=threshold, seed=0, exact=product or (lambda vectors: vectors @ gram)
    )
    return Outliers(int(found.count[0]), float(found.largest[0])) if found.known[0] else None


@pytest.mark.parametrize("strengths", [[], [40.0], [45.0, 45.0, 45.0], [300.0, 60.0], [60.0 + 3 * k for k in range(8)]])
@pytest.mark.parametrize("distance", [1e-3, 0.05])
def test_directions_of_float32_give_the_counts_and_digits_of_float64(strengths, distance):
    """Also where the next eigenvalue is so near to the threshold that only a Cholesky factor tells."""
    matrix = with_spikes(900, 400, strengths, seed=1)
    below = float(torch.linalg.svdvals(matrix)[len(strengths)] ** 2)
    threshold = below * (1 + distance)
    assert_equal(in_float32(matrix, threshold=threshold), slow_outliers(matrix, threshold=threshold))


def test_float32_that_differs_from_float64_is_not_believed():
    matrix = with_spikes(900, 400, [60.0], seed=1)
    gram = matrix.mT @ matrix
    assert in_float32(matrix, threshold=1.1 * edge(900, 400)) is not None
    off = gram * (1 + 3e-5)
    assert in_float32(matrix, threshold=1.1 * edge(900, 400), product=lambda vectors: vectors @ off) is None


def test_an_eigenvalue_that_the_iteration_has_not_seen_denies_the_factor():
    gram = torch.diag(torch.tensor([9.0, 5.0, 1.0, 0.5], dtype=torch.float64))
    first = torch.eye(4, dtype=torch.float64)[:1]
    assert lanczos._none_beside(gram, first, np.array([9.0]), 5.1)
    assert not lanczos._none_beside(gram, first, np.array([9.0]), 4.9)


@pytest.mark.parametrize("mean", [0.0, 0.05, -0.3])
@pytest.mark.parametrize("shape", [(150, 40), (40, 150)])
def test_the_host_s_products_of_shuffled_entries_are_those_without_their_mean(mean, shape):
    """Whatever is left of the mean, a slower way would make good unseen; a small one is taken off the products."""
    weights = (normal(*shape, seed=0) + mean).float()
    stats = Elements(*(torch.tensor([value], dtype=torch.float64) for value in (mean, 0.9, 0.1, 0.1)))
    order = torch.randperm(weights.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows, (exact,) = Shuffled(weights, stats, order), gram_of_shuffled([weights], stats, order)
    vectors = normal(3, min(shape), seed=1)
    assert torch.allclose(rows.image(vectors), vectors @ exact, rtol=1e-12, atol=1e-12 * float(exact.norm()))
    assert float((rows.gram().double() - exact).norm() / exact.norm()) < 1e-6
