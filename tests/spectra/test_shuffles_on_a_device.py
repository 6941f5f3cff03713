"""What a device that shuffles itself is asked to do, shown on the host by a stand-in: tensors that say they are not."""

import numpy as np
import pytest
import torch
from random_matrices import normal

from tests.stand_in import use_stand_in
from ww_monitor.spectra import lanczos, shuffle, traps
from ww_monitor.spectra.elements import elements
from ww_monitor.spectra.lanczos import BLOCKS
from ww_monitor.spectra.traps import shuffled


@pytest.fixture(autouse=True)
def iterated(monkeypatch):
    """Lanczos' iteration also for sides that are quick to test."""
    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", 256)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(shuffle, "on_host", lambda tensor: False)


@pytest.fixture
def reads(monkeypatch):
    """Shapes of what the host has read."""
    shapes, original = [], lanczos.read
    monkeypatch.setattr(lanczos, "read", lambda tensor: shapes.append(tuple(tensor.shape)) or original(tensor))
    return shapes


@pytest.fixture
def solved(monkeypatch):
    """Shapes of the stacks of which the whole spectrum was asked."""
    shapes = []

    def recording(solve):
        return lambda stack, *arguments, **options: (
            shapes.append(tuple(stack.shape)) or solve(stack, *arguments, **options)
        )

    monkeypatch.setattr(traps, "eigenvalues", recording(traps.eigenvalues))
    monkeypatch.setattr(traps, "eigenvalues_of_gram", recording(traps.eigenvalues_of_gram))
    return shapes


def planted(rows, columns, strengths, *, seed=0):
    """Gaussian with these entries in units of σ(NM)^¼, each in a row and column of its own."""
    matrix = normal(rows, columns, seed=seed)
    for k, strength in enumerate(strengths):
        matrix[7 * k + 3, 5 * k + 2] = strength * (rows * columns) ** 0.25
    return matrix


MIXED = [[], [2.0], [1.5, 3.0], [1e3, 2.0, 4.0], [1.6] * 5, [2.0 + 0.2 * k for k in range(9)]]
"""Outliers: none, some, as many as the first block and more."""


@pytest.mark.parametrize(("rows", "columns"), [(300, 260), (260, 300), (280, 280)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_and_device_give_the_same_and_that_of_the_whole_spectrum(monkeypatch, rows, columns, dtype):
    matrices = [planted(rows, columns, strengths, seed=k).to(dtype) for k, strengths in enumerate(MIXED)]
    stats = elements(torch.stack(matrices))
    host = shuffled(matrices, stats, seed=1)
    monkeypatch.setattr(shuffle, "on_host", lambda tensor: False)
    device = shuffled(matrices, stats, seed=1)
    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", 1_000)
    whole = shuffled(matrices, stats, seed=1)
    for other in (host, whole):
        torch.testing.assert_close(device.num_traps, other.num_traps, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(device.severity, other.severity, rtol=1e-9, atol=0, equal_nan=True)
    assert device.mean_count.tolist() == [len(strengths) for strengths in MIXED]


def test_the_host_reads_a_few_times_however_many_matrices_and_steps_there_are(device, reads):
    found = []
    for count in (2, 12):
        matrices = [planted(300, 280, [], seed=k) for k in range(count)]
        reads.clear()
        shuffled(matrices, elements(torch.stack(matrices)), seed=0, replicas=1)
        steps = sum(shape[1] for shape in reads) // 2
        assert all(shape[0] == count for shape in reads)
        assert steps >= 20
        found.append(len(reads))
    assert max(found) <= 4


def test_what_is_not_settled_gets_its_spectrum_in_one_batch(monkeypatch, device, solved):
    many = [1.8 + 0.1 * k for k in range(BLOCKS[-1] + 2)]
    matrices = [planted(300, 280, strengths, seed=1) for strengths in ([2.0], many, [], many, many)]
    stats = elements(torch.stack(matrices))
    result = shuffled(matrices, stats, seed=0, replicas=1)
    assert solved == [(3, 280, 280)]
    monkeypatch.setattr(traps, "LEAST_LANCZOS_SIDE", 1_000)
    assert torch.equal(result.num_traps, shuffled(matrices, stats, seed=0, replicas=1).num_traps)
    assert result.num_traps[:, 0].tolist()[:3:2] == [1, 0]


def test_small_matrices_are_one_batch(device, solved):
    matrices = normal(7, 40, 30, seed=0)
    shuffled(matrices, elements(matrices), seed=0, replicas=1)
    assert solved == [(7, 40, 30)]


def test_gram_matrices_stay_within_the_memory_and_it_changes_nothing(monkeypatch, device):
    matrices = [planted(400, 260, strengths, seed=k).float() for k, strengths in enumerate(MIXED)]
    stats = elements(torch.stack(matrices))
    sizes, original = [], lanczos.outliers
    monkeypatch.setattr(
        lanczos, "outliers", lambda gram, **options: sizes.append(gram.nbytes) or original(gram, **options)
    )
    at_once = shuffled(matrices, stats, seed=0, replicas=1)
    assert sizes == [6 * 8 * 260**2]
    sizes.clear()
    in_parts = shuffled(matrices, stats, seed=0, replicas=1, memory=2 * 4 * 8 * 260**2)
    assert sizes == [2 * 8 * 260**2] * 3
    torch.testing.assert_close(in_parts.severity, at_once.severity, rtol=1e-9, atol=0)
    assert torch.equal(in_parts.num_traps, at_once.num_traps)


@pytest.mark.parametrize(("matrices_free", "at_once"), [(7, [3, 3]), (2.5, [1] * 6)])
def test_gram_matrices_stay_within_half_of_what_is_free(monkeypatch, matrices_free, at_once):
    """Not within a constant: a device that is nearly full shuffles fewer of them at a time."""
    matrices = [planted(400, 260, [2.0], seed=k).float() for k in range(6)]
    stats = elements(torch.stack(matrices))
    sizes, original = [], lanczos.outliers
    monkeypatch.setattr(
        lanczos, "outliers", lambda gram, **options: sizes.append(len(gram)) or original(gram, **options)
    )
    use_stand_in(monkeypatch, free=int(matrices_free * 4 * 8 * 260**2))
    result = shuffled(matrices, stats, seed=0, replicas=1)
    assert sizes == at_once
    assert result.num_traps[:, 0].tolist() == [1] * 6


@pytest.mark.parametrize("where", ["host", "device"])
def test_neither_defaults_nor_autocast_nor_layout_matter(monkeypatch, where):
    monkeypatch.setattr(shuffle, "on_host", lambda tensor: where == "host")
    matrices = [planted(290, 270, [2.0], seed=k) for k in range(3)]
    stats = elements(torch.stack(matrices))
    plain = shuffled(matrices, stats, seed=0, stop_early=False).severity
    scattered = [torch.stack([one, one], 2)[..., 1].requires_grad_() for one in matrices]
    assert torch.equal(shuffled(scattered, stats, seed=0, stop_early=False).severity, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shuffled(matrices, stats, seed=0, stop_early=False).severity, plain)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            assert torch.equal(shuffled(matrices, stats, seed=0, stop_early=False).severity, plain)
    finally:
        torch.set_default_dtype(dtype)


def test_a_device_draws_from_a_generator_of_its_own(monkeypatch, device):
    monkeypatch.setattr(shuffle, "permutation", None)
    matrices = [planted(300, 280, [2.0], seed=k) for k in range(2)]
    stats = elements(torch.stack(matrices))
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (shuffled(matrices, stats, seed=seed, replicas=1).severity for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
