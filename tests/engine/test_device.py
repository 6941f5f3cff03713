"""The path of a GPU, here on CPU tensors: one batch a short side, one wait, the same numbers, failures retried."""

import math

import pytest
import torch

from ww_monitor.engine import Options, analyze_matrices, measure, run
from ww_monitor.matrices import Matrix
from ww_monitor.spectra import eigenvalues as eigenvalues_module


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(name, weights, *, kind="dense"):
    stack = weights if weights.ndim == 3 else weights[None]
    return Matrix(name, kind, tuple(stack.shape), lambda: stack)


def some_matrices():
    trap = normal(64, 40, seed=5)
    trap[3, 4] = 30.0
    dead = normal(40, 64, seed=6)
    dead[:, 7] = 0.0
    return [
        matrix("tall", normal(90, 40)),
        matrix("square", normal(40, 40, seed=1)),
        matrix("wide", normal(40, 90, seed=2)),
        matrix("same", normal(90, 40, seed=3)),
        matrix("kernel", normal(9, 32, 16, seed=4), kind="conv"),
        matrix("trap", trap),
        matrix("dead", dead),
        matrix("half", normal(64, 40, seed=7, dtype=torch.bfloat16)),
        matrix("nan", torch.full((90, 40), math.nan)),
        matrix("zero", torch.zeros(90, 40)),
    ]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Every tensor takes a GPU's path; says which solves were batched, and how often the host waited."""
    seen = {"batches": [], "waits": 0}
    solve, fetch = measure.solve_batched, measure.fetch

    def counted(stacks):
        seen["batches"].append((min(stacks[0].shape[1:]), len(stacks)))
        return solve(stacks)

    def waited(spectra):
        seen["waits"] += bool(spectra)
        return fetch(spectra)

    monkeypatch.setattr(measure, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(measure, "solve_batched", counted)
    monkeypatch.setattr(measure, "fetch", waited)
    monkeypatch.setattr(run, "_quicker_on_host", lambda matrices, stack: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 35))
    return seen


def comparable(layer):
    numbers = {name: value for name, value in layer.metrics.items() if not math.isnan(value)}
    return (layer.name, layer.status, layer.verdict, layer.phase, layer.trap_entries), numbers


def assert_same(found, expected, tolerance):
    for one, other in zip(found.layers, expected.layers, strict=True):
        (words, numbers), (expected_words, expected_numbers) = comparable(one), comparable(other)
        assert words == expected_words
        assert numbers == pytest.approx(expected_numbers, rel=tolerance, abs=1e-12)


def test_a_gpus_path_gives_the_hosts_snapshot(as_if_on_a_gpu, monkeypatch):
    on_device = analyze_matrices(some_matrices(), Options())
    monkeypatch.setattr(measure, "on_gpu", lambda tensor: False)
    assert_same(on_device, analyze_matrices(some_matrices(), Options()), 1e-9)


def test_one_batch_a_short_side_and_one_wait(as_if_on_a_gpu):
    analyze_matrices(some_matrices(), Options())
    assert as_if_on_a_gpu == {"batches": [(40, 9), (16, 1)], "waits": 1}


def test_batches_keep_within_the_memory(as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 3 * (24 * 40 * 40 + 90 * 40 * 4), 1 << 35))
    analyze_matrices([matrix(str(k), normal(90, 40, seed=k)) for k in range(8)], Options())
    assert as_if_on_a_gpu == {"batches": [(40, 4), (40, 4)], "waits": 2}


def test_a_device_that_fails_leaves_it_to_the_host_and_says_so(as_if_on_a_gpu, monkeypatch):
    expected = analyze_matrices(some_matrices()[:3], Options())

    def fails(stacks):
        raise RuntimeError("cusolver error")

    monkeypatch.setattr(measure, "solve_batched", fails)
    snapshot = analyze_matrices(some_matrices()[:3], Options())
    assert [layer.status for layer in snapshot.layers] == ["ok, solved on the host after RuntimeError on cpu"] * 3
    assert [layer.value("alpha") for layer in snapshot.layers] == [
        pytest.approx(layer.value("alpha"), rel=1e-9) for layer in expected.layers
    ]


@pytest.mark.parametrize("options", [Options(fit="hill"), Options(fix_fingers="clip_xmax"), Options(aspect_ratio=1.0)])
def test_other_fits_are_left_to_the_host(as_if_on_a_gpu, monkeypatch, options):
    on_device = analyze_matrices(some_matrices(), options)
    monkeypatch.setattr(measure, "on_gpu", lambda tensor: False)
    assert_same(on_device, analyze_matrices(some_matrices(), options), 1e-9)


def test_few_small_matrices_are_left_to_the_host(as_if_on_a_gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure, "on_gpu", lambda tensor: True)
    one, many = [matrix("a", normal(64, 64))], [matrix("a", normal(900, 768))] * 40
    assert run._quicker_on_host(one, one[0].load())
    assert not run._quicker_on_host(many, many[0].load())
    monkeypatch.setattr(measure, "on_gpu", lambda tensor: False)
    assert not run._quicker_on_host(one, one[0].load())


@pytest.fixture
def tf32_given_back():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("capability", "tf32", "precision"),
    [((9, 0), False, torch.float64), ((8, 9), False, torch.float32), ((8, 9), True, torch.float64)],
)
def test_the_gram_matrix_is_float32_only_where_float64_is_slow_and_tf32_is_off(
    monkeypatch, capability, tf32, precision
):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    assert eigenvalues_module.gram_precision(torch.device("cuda")) == precision
    assert eigenvalues_module.gram_precision(torch.device("cpu")) == torch.float64


def test_an_autocast_region_around_the_analysis_changes_nothing(as_if_on_a_gpu):
    plain = analyze_matrices(some_matrices(), Options())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = analyze_matrices(some_matrices(), Options())
    assert [comparable(layer) for layer in inside.layers] == [comparable(layer) for layer in plain.layers]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_gpu_gives_the_hosts_snapshot(dtype):
    items = [*some_matrices(), matrix("large", normal(900, 768, seed=9))]
    moved = [Matrix(m.name, m.kind, m.shape, lambda m=m: m.load().to("cuda", dtype)) for m in items]
    on_host = [Matrix(m.name, m.kind, m.shape, lambda m=m: m.load().to(dtype)) for m in items]
    assert_same(analyze_matrices(moved, Options()), analyze_matrices(on_host, Options()), 1e-8)
