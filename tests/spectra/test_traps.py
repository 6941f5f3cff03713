"""Large entries are traps and are found at their address; a shifted mean, noise and heavy tails are not."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from random_matrices import SHAPES, normal, outlier, wishart_eigenvalues

import ww_monitor
from benchmarks import early_stop
from benchmarks.early_stop import Tally
from ww_monitor.errors import InvalidArgument
from ww_monitor.spectra import shuffle, traps
from ww_monitor.spectra.eigenvalues import Eigenvalues
from ww_monitor.spectra.elements import Elements, elements, large_entries
from ww_monitor.spectra.marchenko_pastur import SIGNIFICANCE, johnstone, tracy_widom_quantile, tracy_widom_sf
from ww_monitor.spectra.shuffle import permutation
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE, shuffled


def slow_elements(matrix):
    """Mean, bulk standard deviation, headroom and mean shift of one matrix that is not constant, entry by entry."""
    entries = [float(w) for w in matrix.double().flatten()]
    reach = len(entries) ** 0.25
    kept = entries
    while True:
        mean = math.fsum(kept) / len(kept)
        std = math.sqrt(math.fsum((w - mean) ** 2 for w in kept) / len(kept))
        inside = [w for w in entries if abs(w - mean) <= std * reach]
        rounding = 1e-9 * std * reach + 1e-11 * abs(mean)  # decides at the limit, where b of {a, a, b} always is
        assume(not std or all(abs(abs(w - mean) - std * reach) > rounding for w in entries))
        if len(inside) in (0, len(kept)):  # none: their spread underflows
            break
        kept = inside
    if std <= 1e-12 * abs(mean):  # but for rounding, nothing but one value is left: there is no bulk to compare with
        return mean, math.nan, math.nan, math.nan
    return mean, std, max(abs(w - mean) for w in entries) / (std * reach), abs(mean) * reach / std


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    large=st.lists(st.floats(-100, 100), max_size=4),
    shift=st.sampled_from([0.0, 0.3, -5.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@example(seed=0, rows=2, columns=2, large=[0.0, 0.0, 3e-238], shift=0.0, dtype=torch.float64)  # its spread underflows
def test_elements_equal_the_slow_twin(seed, rows, columns, large, shift, dtype):
    matrix = normal(rows, columns, seed=seed)
    matrix.view(-1)[: len(large)] = torch.tensor(large, dtype=torch.float64)[: rows * columns]
    matrix = (matrix + shift).to(dtype)
    stats = elements(torch.stack([normal(rows, columns, seed=1).to(dtype), matrix]))
    assume(matrix.unique().numel() > 1)
    mean, std, headroom, mean_shift = slow_elements(matrix)
    assert stats.mean[1].item() == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert stats.std[1].item() == pytest.approx(std, rel=1e-6, nan_ok=True)
    assert stats.headroom[1].item() == pytest.approx(headroom, rel=1e-6, nan_ok=True)
    assert stats.mean_shift[1].item() == pytest.approx(mean_shift, rel=1e-6, abs=1e-9, nan_ok=True)


def test_one_huge_entry_neither_shifts_the_mean_nor_hides_another():
    w = normal(100, 50, seed=0)
    w[3, 7] = 2_000.0
    assert elements(w[None]).mean_shift.item() < 0.5
    w[3, 7], w[20, 30] = 1e5, 15.0
    found = large_entries(w[None], elements(w[None]))
    assert found.index.tolist() == [[0, 3, 7], [0, 20, 30]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_trimmed_is_trimmed_from_mean_and_deviation(dtype):
    """A matrix of several chunks, with huge entries in the first, at a border and in the last."""
    w = normal(500, 300, seed=0).to(dtype) + 3
    huge = torch.tensor([0, (1 << 16) - 1, 1 << 16, 149_999])
    w.view(-1)[huge] = 1e9
    rest = torch.ones(w.numel(), dtype=torch.bool).index_fill_(0, huge, False)
    kept = w.double().view(-1)[rest]
    stats = elements(w[None])
    assert stats.mean.item() == pytest.approx(kept.mean().item(), rel=1e-12)
    assert stats.std.item() == pytest.approx(kept.std(correction=0).item(), rel=1e-12)
    found = large_entries(w[None], stats)
    assert sorted((300 * found.index[:, 1] + found.index[:, 2]).tolist()) == huge.tolist()


def test_weights_that_want_a_gradient_are_read_without_one():
    w = normal(60, 50, seed=0)
    w[3, 7] = 30.0
    stats = elements(w.clone().requires_grad_()[None])
    assert not stats.std.requires_grad
    assert stats.headroom.item() == elements(w[None]).headroom.item() > 1
    assert not large_entries(w.clone().requires_grad_()[None], stats).headroom.requires_grad


@pytest.mark.parametrize("spread", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("mean", [1.0, -0.3, 3e4])
def test_a_spread_that_drowns_in_the_mean_is_found_entry_by_entry(mean, spread):
    """Σ w²/n less the square of the mean has none of its digits there, and may be below zero."""
    w = mean * (1 + spread * normal(40, 30, seed=0))
    stats = elements(w[None])
    assert stats.std.item() == pytest.approx((w - mean).std(correction=0).item(), rel=1e-6)
    largest = (w - w.mean()).abs().amax().item()
    assert stats.headroom.item() == pytest.approx(largest / (stats.std.item() * 1200**0.25), rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -3e4, 1e-30])
def test_a_constant_matrix_has_neither_headroom_nor_mean_shift(constant):
    stats = elements(torch.full((1, 30, 20), constant))
    assert stats.headroom.isnan().all()
    assert stats.mean_shift.isnan().all()
    assert len(large_entries(torch.full((1, 30, 20), constant), stats).value) == 0


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), first=st.floats(0, 200), second=st.floats(0, 200))
def test_headroom_grows_with_the_largest_entry(seed, first, second):
    matrix = normal(1, 25, 16, seed=seed)
    largest = (matrix - matrix.mean()).abs().amax().item()
    smaller, larger = (matrix.clone() for _ in range(2))
    smaller[0, 3, 4], larger[0, 3, 4] = (largest + 0.2 + extra for extra in sorted((first, second)))
    assert elements(smaller).headroom.item() <= elements(larger).headroom.item() * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-8, -2.0, 1e6]),
    shift=st.floats(-10, 10),
    large=st.floats(0, 40),
)
def test_scale_shift_permutation_and_transpose_leave_the_headroom(seed, scale, shift, large):
    matrix = normal(1, 25, 16, seed=seed)
    matrix[0, 3, 4] += large
    expected = elements(matrix)
    mixed = matrix.flatten()[permutation(400, seed=seed, replica=0)].view(1, 25, 16)
    for same in (scale * matrix, matrix.mT, mixed):
        found = elements(same)
        torch.testing.assert_close(found.headroom, expected.headroom, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.mean_shift, expected.mean_shift, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(elements(matrix + shift).headroom, expected.headroom, rtol=1e-9, atol=0)


def analyzed(matrix):
    """The one layer of a model with this weight, and the rules of its findings."""
    holder = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    holder.weight = torch.nn.Parameter(matrix.float())
    snapshot = ww_monitor.analyze(torch.nn.ModuleDict({"fc": holder}))
    return snapshot["fc"], [finding.rule for finding in snapshot.findings]


def sees(theta, rows, columns):
    """Whether λ(θ) of Benaych-Georges & Nadakuditi exceeds the Tracy–Widom threshold."""
    long_side, short_side = torch.tensor(float(max(rows, columns))), torch.tensor(float(min(rows, columns)))
    centre, scale = johnstone(long_side, short_side)
    return outlier(theta, rows, columns) > centre.item() + tracy_widom_quantile(SIGNIFICANCE) * scale.item()


PLANTED = [(64, 64), (200, 100), (100, 200), (256, 32), (400, 300)]


@pytest.mark.parametrize(("rows", "columns"), PLANTED)
@pytest.mark.parametrize("strength", [1.2, 1.6, 2.5])
def test_planted_entries_are_found_at_their_address(rows, columns, strength):
    """Entries at 1.2 times the threshold raise the headroom above 1; at 1.6 times they make an outlier each shuffle."""
    reach = (rows * columns) ** 0.25
    places = {(3, 7): strength * reach, (rows - 1, columns - 2): -1.05 * strength * reach}
    matrix = normal(rows, columns, seed=rows + columns)
    for at, value in places.items():
        matrix[at] = value
    layer, findings = analyzed(matrix)
    assert layer.value("trap_headroom") > 1
    assert [(entry.row, entry.column) for entry in layer.trap_entries] == [(rows - 1, columns - 2), (3, 7)]
    for entry in layer.trap_entries:
        assert entry.slice == 0
        assert entry.value == pytest.approx(places[entry.row, entry.column])
        assert entry.headroom == pytest.approx(abs(entry.value) / reach, rel=0.03)
    if sees(strength * reach, rows, columns):
        assert layer.value("num_traps") == pytest.approx(2, abs=0.4)
        assert layer.value("trap_severity") > 1
        assert layer.value("trap_p_value") < SIGNIFICANCE
        assert "trap" in findings
    assert sees(1.6 * reach, rows, columns)
    assert "mean_shift" not in findings


def test_large_entries_are_limited_and_addressed_by_slice():
    kernel = normal(9, 32, 24, seed=0)
    for k in range(12):
        kernel[k % 9, k, 2 * k] = 20.0 * 1.2**k
    stats = elements(kernel)
    found = large_entries(kernel, stats, limit=5)
    assert found.index.tolist() == [[k % 9, k, 2 * k] for k in (11, 10, 9, 8, 7)]
    assert found.value.tolist() == pytest.approx([20.0 * 1.2**k for k in (11, 10, 9, 8, 7)])
    assert (found.headroom.diff() < 0).all()
    assert len(large_entries(kernel, stats, limit=100).value) == 12


@pytest.mark.parametrize(("rows", "columns"), PLANTED)
def test_a_shifted_mean_is_no_trap(rows, columns):
    """Gaussian entries with a mean of 0.2 σ (weightwatcher counts a trap) have a mean shift above 1 and no trap."""
    layer, findings = analyzed(normal(rows, columns, seed=rows) + 0.2)
    assert layer.value("mean_shift") > 1
    assert layer.value("mean_shift") == pytest.approx(0.2 * (rows * columns) ** 0.25, rel=0.15)
    assert layer.value("num_traps") == 0
    assert findings == ["mean_shift"]
    matrices = normal(20, rows, columns, seed=rows) + 0.2
    assert (shuffled(matrices, elements(matrices), seed=0, replicas=1).num_traps > 0).sum() <= 1


@pytest.mark.parametrize(("rows", "columns"), SHAPES[:5])
def test_at_most_one_shuffle_of_a_random_matrix_in_a_hundred_has_a_trap(rows, columns):
    """Also without the rule that skips matrices far from a trap."""
    matrices = normal(200, rows, columns, seed=rows * columns, dtype=torch.float32)
    result = shuffled(matrices, elements(matrices), seed=1, replicas=1)
    assert (result.num_traps > 0).sum() <= 2
    assert ((result.p_value < SIGNIFICANCE) == (result.num_traps > 0)).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES[5:])
def test_nor_of_a_large_one(monkeypatch, rows, columns):
    """The spectra of the shuffles are drawn from the bidiagonal model, exact in law and cheap."""
    draws = iter(wishart_eigenvalues(rows, columns, draws=200, seed=rows + columns))

    def modelled(matrices):
        spectrum = next(draws)[None]
        total = matrices.double().square().sum((1, 2))
        return Eigenvalues(spectrum * (total / spectrum.sum(1))[:, None], total, torch.zeros(1, dtype=torch.int64))

    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", math.inf)
    monkeypatch.setattr(traps, "eigenvalues", modelled)
    monkeypatch.setattr(shuffle, "permutation", lambda size, **_: torch.arange(size))
    matrix = normal(1, rows, columns, seed=rows, dtype=torch.float32)
    result = shuffled(matrix, elements(matrix), seed=0, replicas=200, stop_early=False)
    assert (result.num_traps > 0).sum() <= 2
    assert result.severity.mean().item() == pytest.approx(1, abs=0.05)


DISTRIBUTIONS = {
    "Gaussian": (lambda rng, size: rng.standard_normal(size), 0.005),
    "uniform": (lambda rng, size: rng.uniform(-1, 1, size), 0.005),
    "log-normal ½": (lambda rng, size: rng.choice([-1.0, 1.0], size) * rng.lognormal(0, 0.5, size), 0.005),
    "log-normal 1": (lambda rng, size: rng.choice([-1.0, 1.0], size) * rng.lognormal(0, 1.0, size), 0.05),
    "Laplace": (lambda rng, size: rng.laplace(size=size), 0.015),
    **{f"t{k}": (lambda rng, size, k=k: rng.standard_t(k, size), 0.05 if k < 6 else 0.015) for k in range(3, 9)},
}
"""Elements, and the largest share of shuffles with an outlier: three times what 6,000 shuffles showed, or more."""


@pytest.mark.parametrize(("draw", "most"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_matrices_far_from_a_trap_may_be_skipped(draw, most):
    """Below HEADROOM_TO_SHUFFLE few shuffles have an outlier, and no more than one matrix in 100 would be a finding."""
    shuffles = with_outlier = matrices = would_be_found = 0
    for rows, columns in [(64, 64), (128, 64), (200, 60), (256, 32), (90, 90)]:
        drawn = torch.from_numpy(draw(np.random.default_rng(rows * columns), (100, rows, columns)))
        stats = elements(drawn)
        far = torch.nonzero(stats.headroom < HEADROOM_TO_SHUFFLE).flatten()[:40]
        if len(far) == 0:
            continue
        kept = Elements(*(value[far] for value in vars(stats).values()))
        counts = shuffled(drawn[far], kept, seed=0, replicas=3, stop_early=False).num_traps
        shuffles, with_outlier = shuffles + counts.numel(), with_outlier + int((counts > 0).sum())
        matrices, would_be_found = matrices + len(far), would_be_found + int((counts.double().mean(1) >= 0.5).sum())
    assert with_outlier <= max(2, most * shuffles)
    assert would_be_found <= max(1, 0.01 * matrices)
    if most < 0.05:
        assert matrices >= 150


def slow_shuffled(matrix, stats, seed, replica):
    """One replica of one matrix: permute, de-mean, decompose, count."""
    rows, columns = matrix.shape
    order = permutation(rows * columns, seed=seed, replica=replica)
    mixed = (matrix.flatten()[order].view(rows, columns) - stats.mean.item()).numpy()
    spectrum = np.linalg.svd(mixed, compute_uv=False) ** 2 / stats.std.item() ** 2
    n, m = max(rows, columns), min(rows, columns)
    centre = (math.sqrt(n - 1) + math.sqrt(m)) ** 2
    scale = (math.sqrt(n - 1) + math.sqrt(m)) * (1 / math.sqrt(n - 1) + 1 / math.sqrt(m)) ** (1 / 3)
    count = int((spectrum > centre + tracy_widom_quantile(0.05) * scale).sum())
    p_value = tracy_widom_sf(torch.tensor((spectrum[0] - centre) / scale, dtype=torch.float64)).item()
    return count, spectrum[0] / (math.sqrt(n) + math.sqrt(m)) ** 2, p_value


@pytest.mark.parametrize(("rows", "columns"), [(40, 30), (30, 40)])
def test_shuffled_equals_the_slow_twin(rows, columns):
    matrices = normal(3, rows, columns, seed=5) + 0.3
    matrices[1, 2, 3] = 15.0
    stats = elements(matrices)
    result = shuffled(matrices, stats, seed=9, replicas=2, significance=0.05, stop_early=False)
    for b in range(3):
        alone = Elements(*(value[b : b + 1] for value in vars(stats).values()))
        for replica in range(2):
            count, severity, p_value = slow_shuffled(matrices[b], alone, 9, replica)
            assert result.num_traps[b, replica].item() == count
            assert result.severity[b, replica].item() == pytest.approx(severity, rel=1e-10)
            assert result.p_value[b, replica].item() == pytest.approx(p_value, rel=1e-4)


def test_the_same_seed_gives_the_same_result_and_touches_no_global_stream():
    matrices = normal(2, 40, 30, seed=5)
    stats = elements(matrices)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (shuffled(matrices, stats, seed=seed, stop_early=False).severity for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, traps.REPLICAS)
    assert len(set(first[0].tolist())) == traps.REPLICAS


def drawn(result):
    """How many replicas each matrix has got."""
    known = result.severity.isfinite()
    assert torch.equal(known, result.num_traps.isfinite())
    assert torch.equal(known, result.p_value.isfinite())
    return known.sum(1).tolist()


@pytest.mark.parametrize("side", [60, 300])
def test_a_shuffle_that_is_clear_needs_no_other_and_leaves_the_others_theirs(monkeypatch, side):
    """Each replica is what it is without the stop; those of one matrix depend on no other."""
    reach, all_three = side**0.5, [traps.REPLICAS] * 4
    matrices = torch.stack([planted(normal(side, side, seed=3), [h * reach]) for h in (0.85, 1.3, 1.35, 3.0)])
    stats = elements(matrices)
    complete = shuffled(matrices, stats, seed=1, stop_early=False)
    assert drawn(complete) == all_three
    stopped = shuffled(list(matrices), stats, seed=1)
    assert drawn(stopped)[0] == drawn(stopped)[3] == 1
    assert max(drawn(stopped)[1:3]) >= 2
    known = stopped.severity.isfinite()
    assert torch.equal(stopped.severity[known], complete.severity[known])
    for b, one in enumerate(matrices):
        alone = shuffled(one[None], Elements(*(value[b : b + 1] for value in vars(stats).values())), seed=1)
        assert torch.equal(alone.severity[0, : drawn(alone)[0]], stopped.severity[b, known[b]])
    monkeypatch.setattr(traps, "CLEARLY_BELOW", math.inf)
    monkeypatch.setattr(traps, "CLEARLY_ABOVE", math.inf)
    agreeing = shuffled(matrices, stats, seed=1)
    assert drawn(agreeing)[0] == drawn(agreeing)[3] == 2, "two of three that agree are a verdict"


def test_the_numbers_of_a_matrix_are_those_of_the_replicas_that_were_drawn():
    nan = math.nan
    counts = torch.tensor([[1.0, nan, nan], [0.0, 1.0, 2.0], [3.0, 0.0, nan]], dtype=torch.float64)
    result = traps.Shuffled(counts, 1 + counts, counts / 10)
    assert result.mean_count.tolist() == [1.0, 1.0, 1.5]
    assert result.mean_severity.tolist() == [2.0, 2.0, 2.5]
    assert result.median_p_value.tolist() == [0.1, 0.1, 0.0]


HARD = ["Student t, 4 d.o.f.", "Gaussian with 1.3", "Gaussian with 1.4", "Gaussian with 1.2 and 1.2"]


def test_the_early_stop_seldom_changes_a_verdict_and_its_margins_are_why(monkeypatch):
    """Half of the matrices are of laws that put λmax right at the threshold; a smaller `benchmarks/early_stop.py`."""

    monkeypatch.setattr(early_stop, "MANY", 9)

    def verdicts():
        laws = [*HARD, "Gaussian with 0.85", "Gaussian with 2.2", "Student t, 3 d.o.f.", "Student t, 6 d.o.f."]
        return sum((early_stop.tally(early_stop.LAWS[law], matrices=80, shapes=[(64, 64)]) for law in laws), Tally())

    found = verdicts()
    assert found.clear >= 0.4 * found.shuffled
    assert 0.2 * found.clear <= found.traps <= 0.8 * found.clear
    assert max(found.unlike_three, found.unlike_many) <= 0.01 * found.clear
    monkeypatch.setattr(traps, "CLEARLY_BELOW", 0.0)
    monkeypatch.setattr(traps, "CLEARLY_ABOVE", 0.0)
    broken = verdicts()
    assert min(broken.unlike_three, broken.unlike_many) > 0.02 * broken.clear


CASES = {
    "Gaussian": ((300, 300), lambda w, _: w),
    "one below": ((300, 300), lambda w, reach: planted(w, [0.9 * reach])),
    "one": ((300, 300), lambda w, reach: planted(w, [1.3 * reach])),
    "five alike": ((600, 260), lambda w, reach: planted(w, [1.6 * reach] * 5)),
    "three, wide": ((260, 600), lambda w, reach: planted(w, [3 * reach, -4 * reach, 100 * reach])),
    "shifted": ((300, 300), lambda w, reach: planted(w, [2 * reach]) + 3.0),
    "nearly constant": ((300, 300), lambda w, _: 1e4 + w),
    "small": ((40, 30), lambda w, reach: planted(w, [2 * reach])),
    "tiny elements": ((300, 300), lambda w, reach: planted(w, [2 * reach]) * 1e-25),
    **{f"t{k}": ((400, 300), lambda w, _, k=k: student(w.shape, k)) for k in (2, 3, 4, 5)},
}


def planted(matrix, values):
    """The matrix with these values at places of their own."""
    matrix = matrix.clone()
    for k, value in enumerate(values):
        matrix[..., 7 * k + 3, 5 * k + 2] = value
    return matrix


def student(shape, degrees):
    return torch.from_numpy(np.random.default_rng(degrees).standard_t(degrees, tuple(shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "change"), CASES.values(), ids=CASES)
def test_the_short_way_equals_the_full_spectrum(monkeypatch, shape, change, dtype):
    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", 256)
    matrices = change(normal(2, *shape, seed=3), (shape[0] * shape[1]) ** 0.25).expand(2, *shape).to(dtype)
    stats = elements(matrices)
    kept = matrices.clone()
    result = shuffled(matrices, stats, seed=4, replicas=2, stop_early=False)
    assert torch.equal(matrices, kept)
    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", math.inf)
    expected = shuffled(matrices, stats, seed=4, replicas=2, stop_early=False)
    assert torch.equal(result.num_traps, expected.num_traps)
    torch.testing.assert_close(result.severity, expected.severity, rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(result.p_value, expected.p_value, rtol=1e-6, atol=1e-140, equal_nan=True)


def test_planted_entries_take_no_full_spectrum(monkeypatch):
    """Also those of a mean that is subtracted, of wide matrices and of equal entries."""
    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", 256)
    monkeypatch.setattr(traps, "eigenvalues", None)
    monkeypatch.setattr(traps, "eigenvalues_of_gram", None)
    for name in ("Gaussian", "one below", "five alike", "three, wide", "shifted"):
        shape, change = CASES[name]
        matrices = change(normal(1, *shape, seed=3), (shape[0] * shape[1]) ** 0.25)
        assert shuffled(matrices, elements(matrices), seed=4, replicas=2, stop_early=False).severity.isfinite().all()


def test_threads_share_permutations_and_get_what_one_thread_gets(monkeypatch):
    monkeypatch.setattr(shuffle, "_CACHE", shuffle._Cache())
    batches = [planted(normal(1, 300, 260, seed=seed), [60.0]) for seed in range(4)] * 2

    def severity(matrices):
        return shuffled(matrices, elements(matrices), seed=4, stop_early=False).severity

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(severity, batches))
    assert all(map(torch.equal, together, map(severity, batches)))
    assert shuffle._CACHE.nbytes == traps.REPLICAS * 4 * 300 * 260


def test_kept_permutations_stay_within_their_memory(monkeypatch):
    monkeypatch.setattr(shuffle, "_CACHE", shuffle._Cache())
    shuffle.keep_permutations(4_000)
    first = permutation(300, seed=0, replica=0)
    for replica in range(1, 10):
        permutation(300, seed=0, replica=replica)
        assert permutation(300, seed=0, replica=0) is first, "the one used last is kept"
        assert shuffle._CACHE.nbytes <= 4_000
    large = permutation(2_000, seed=0, replica=0)
    assert permutation(2_000, seed=0, replica=0) is not large
    assert permutation(300, seed=0, replica=0) is first
    shuffle.keep_permutations(0)
    assert shuffle._CACHE.nbytes == 0
    assert torch.equal(permutation(300, seed=0, replica=0), first)
    with pytest.raises(InvalidArgument, match="nbytes must be an integer >= 0; got -1"):
        shuffle.keep_permutations(-1)


def test_a_permutation_is_what_torch_draws_and_costs_four_bytes_an_element():
    expected = torch.randperm(1_000, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2))
    assert permutation(1_000, seed=3, replica=2).tolist() == expected.tolist()
    assert permutation(1_000, seed=3, replica=2).dtype == torch.int32


def test_a_permutation_depends_on_seed_and_replica_only():
    assert torch.equal(permutation(50, seed=3, replica=1), permutation(50, seed=3, replica=1))
    drawn = {tuple(permutation(50, seed=s, replica=r).tolist()) for s in range(4) for r in range(4)}
    assert len(drawn) == 16
    assert all(sorted(order) == list(range(50)) for order in drawn)
