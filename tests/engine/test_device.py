"""The path of a device that solves its own matrices, on a stand-in: one decision, loop or batch, few reads."""

import gc
import math
import sys
import threading
import weakref
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.matrices import matrix, normal
from tests.registries import before_measurement, before_metric
from tests.stand_in import use_stand_in
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.errors import LayerError
from ww_monitor.matrix import Matrix
from ww_monitor.spectra import shuffle
from ww_monitor.spectra.device import Accelerator


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


def comparable(layer):
    numbers = {name: value for name, value in layer.metrics.items() if not math.isnan(value)}
    numbers.update({f"entry {k}": entry.headroom for k, entry in enumerate(layer.trap_entries)})
    places = [(entry.slice, entry.row, entry.column, entry.value) for entry in layer.trap_entries]
    return (layer.name, layer.status, layer.verdict, layer.phase, places), numbers


def assert_same(found, expected, tolerance, *, smallest=1e-12):
    for one, other in zip(found.layers, expected.layers, strict=True):
        (words, numbers), (expected_words, expected_numbers) = comparable(one), comparable(other)
        assert words == expected_words
        assert numbers == pytest.approx(expected_numbers, rel=tolerance, abs=smallest)


def on_host():
    return analyze_matrices(some_matrices(), Options())


def test_a_devices_path_gives_the_hosts_snapshot(monkeypatch):
    expected = on_host()
    use_stand_in(monkeypatch)
    found = analyze_matrices(some_matrices(), Options())
    assert_same(found, expected, 1e-9)
    assert {layer.solved_on for layer in found.layers} == {"cpu"}


@pytest.mark.parametrize(
    "options",
    [
        Options(fit="hill"),
        Options(fit="truncated"),
        Options(fix_fingers="clip_xmax"),
        Options(aspect_ratio=1.0),
        Options(preset="weightwatcher"),
        Options(metrics="all"),
    ],
    ids=str,
)
def test_so_it_does_with_every_option(monkeypatch, options):
    """Likelihood ratios to fewer digits: the search for the other law ends where it does."""
    items = [item for item in some_matrices() if item.name not in ("nan", "zero")]
    expected = analyze_matrices(items, options)
    use_stand_in(monkeypatch)
    tolerance, smallest = (1e-7, 1e-8) if options.metrics == "all" else (1e-9, 1e-12)
    assert_same(analyze_matrices(items, options), expected, tolerance, smallest=smallest)


def many(count, rows, side):
    return [matrix(f"{rows}x{side} {k}", normal(rows, side, seed=k)) for k in range(count)]


def test_short_sides_up_to_128_are_one_batch_and_above_a_batch_from_eight_on(monkeypatch):
    """Whatever torch would do with a stack: below eight large matrices the single solver is asked for each."""
    asked = use_stand_in(monkeypatch)
    items = [*many(2, 140, 128), *many(1, 128, 150), *many(7, 160, 130), *many(8, 150, 129), *many(1, 64, 40)]
    analyze_matrices(items, Options(metrics=["alpha"]))
    assert asked.batches == [(129, 8), (128, 3)]
    assert asked.singles == [130] * 7 + [40]


def test_all_slices_of_a_side_count_together(monkeypatch):
    asked = use_stand_in(monkeypatch)
    kernel = matrix("kernel", normal(9, 140, 132), kind="conv")
    analyze_matrices([kernel, *many(3, 132, 200)], Options(metrics=["alpha"]))
    assert (asked.batches, asked.singles) == ([(132, 12)], [])


@pytest.mark.parametrize(
    ("torch_version", "nvmath"), [("2.11.0+cu130", False), ("2.11.0", True), ("2.13.0+cpu", False)]
)
def test_before_2_12_a_batch_needs_nvidias_bindings(monkeypatch, torch_version, nvmath):
    monkeypatch.setattr(torch, "__version__", torch_version)
    bindings = ModuleType("nvmath")
    bindings.__spec__ = ModuleSpec("nvmath", None)
    monkeypatch.setitem(sys.modules, "nvmath", bindings if nvmath else None)
    device = Accelerator(torch.device("cpu"))
    batches = nvmath or torch_version.startswith("2.13")
    assert [device.batches(768, count) for count in (1, 7, 8, 48)] == [False, False, batches, batches]
    assert [device.batches(128, count) for count in (1, 2)] == [False, True]


def test_chunks_are_of_one_size_and_the_last_is_filled_up(monkeypatch):
    """Twenty-eight matrices where memory allows twelve are three of ten, so that the solver keeps its size."""
    one = 6 * 8 * 130 * 130
    asked = use_stand_in(monkeypatch, free=int(2 * 12.5 * one))
    items = many(28, 140, 130)
    found = analyze_matrices(items, Options(metrics=["alpha"], keep_eigenvalues=True))
    assert asked.batches == [(130, 10)] * 3
    for layer, item in zip(found.layers, items, strict=True):
        expected = torch.linalg.svdvals(item.load().double()).square().flip(1)[0]
        torch.testing.assert_close(
            torch.tensor(layer.eigenvalues, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    ("side", "count", "fitting", "expected"),
    [
        (768, 48, 100.0, 48),
        (768, 48, 47.0, 24),
        (768, 100, 48.0, 34),
        (4096, 5, 1.3, 1),
        (64, 200_000, 1e9, 50_000),
        (16384, 20, 100.0, 7),
        (700, 10, 0.1, 1),
    ],
)
def test_a_chunk_keeps_within_memory_and_what_the_solver_takes(side, count, fitting, expected):
    size = Accelerator(torch.device("cpu")).chunk(side, count, fitting)
    assert size == expected
    assert size * side * side < 2**31
    assert size <= 65535


def test_the_memory_that_is_free_is_what_torch_has_not_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert Accelerator(torch.device("cuda")).free_memory() == 140


@pytest.mark.parametrize(
    ("capability", "hip", "architecture", "refusal"),
    [
        ((9, 0), None, "", ""),
        ((8, 0), None, "", ""),
        ((8, 9), None, "", "no full-rate float64"),
        ((12, 0), None, "", "no full-rate float64"),
        ((9, 4), "6.2", "gfx942:sramecc+", ""),
        ((11, 0), "6.2", "gfx1100", "no full-rate float64"),
    ],
)
def test_a_device_solves_if_its_float64_has_full_rate(monkeypatch, capability, hip, architecture, refusal):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert Accelerator(torch.device("cuda")).refusal() == refusal


def test_a_device_without_full_rate_float64_leaves_all_to_the_host_which_says_so(monkeypatch):
    expected = on_host()
    asked = use_stand_in(monkeypatch, refusal="no full-rate float64")
    found = analyze_matrices(some_matrices(), Options())
    assert_same(found, expected, 1e-12)
    assert {layer.solved_on for layer in found.layers} == {"cpu, not cpu: no full-rate float64"}
    assert (asked.singles, asked.batches) == ([], [])
    assert found["tall"].status == "ok"


def test_it_is_decided_once_for_all_matrices_of_a_device(monkeypatch):
    """A single one would be left to the host; together they are not, and the first does not decide for the others."""
    for count, where in ((1, "cpu, not cpu: few and small"), (40, "cpu")):
        with monkeypatch.context() as patch:
            use_stand_in(patch, latency=0.005)
            found = analyze_matrices(many(count, 300, 100), Options(metrics=["alpha"]))
        assert {layer.solved_on for layer in found.layers} == {where}


def test_one_tail_a_short_side_and_two_reads_a_look(monkeypatch):
    """The moments of all matrices, then the numbers of all rows of a short side."""
    asked = use_stand_in(monkeypatch)
    tails = []
    before_metric(monkeypatch, "alpha", lambda batch: tails.append((batch.tail, tuple(batch.eigenvalues.shape))))
    before_metric(monkeypatch, "ks", lambda batch: tails.append((batch.tail, tuple(batch.eigenvalues.shape))))
    analyze_matrices([*many(5, 64, 40), *many(4, 90, 40), *many(3, 40, 70), *many(2, 40, 30)], Options())
    assert sorted(shape for _, shape in tails) == [(2, 30), (2, 30), (12, 40), (12, 40)]
    assert len({id(tail) for tail, _ in tails}) == 2
    assert len(asked.reads) == 3


@pytest.mark.parametrize(("refusal", "elsewhere"), [("", False), ("no full-rate float64", True)])
def test_what_a_device_has_solved_never_enters_the_pool_and_what_it_leaves_to_the_host_does(
    monkeypatch, allow_threads, refusal, elsewhere
):
    measuring = set()
    before_measurement(monkeypatch, "elements", lambda loaded: measuring.add(threading.current_thread()))
    use_stand_in(monkeypatch, refusal=refusal)
    allow_threads(2)
    analyze_matrices(some_matrices(), Options())
    assert measuring
    assert (threading.current_thread() not in measuring) == elsewhere


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("cusolver error")], ids=str)
def test_a_device_that_fails_leaves_it_to_the_host_and_says_so(monkeypatch, error):
    expected = on_host()

    def fails(gram):
        raise error

    use_stand_in(monkeypatch, solve=fails)
    found = analyze_matrices(some_matrices(), Options())
    assert_same(found, expected, 1e-9)
    assert {layer.solved_on for layer in found.layers} == {f"cpu, not cpu: {type(error).__name__}"}


def test_a_measurement_that_fails_costs_its_layer_only(monkeypatch):
    def picky(loaded):
        if any(one.name == "square" for one in loaded.matrices):
            raise ArithmeticError("no")

    expected = on_host()
    use_stand_in(monkeypatch)
    before_measurement(monkeypatch, "elements", picky)
    found = analyze_matrices(some_matrices(), Options())
    assert found["square"].status == "error: ArithmeticError: no"
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.name == "square" or comparable(layer)[0] == comparable(other)[0]


def test_weights_that_nobody_else_holds_are_given_up_before_they_are_solved(monkeypatch):
    alive = weakref.WeakSet()

    def fresh(k):
        weights = normal(1, 1900, 140, seed=k)
        alive.add(weights.untyped_storage())
        return weights

    held = [fresh(k) for k in range(2)]
    assert len(alive) == 2
    del held
    counts = []

    def counting(gram):
        gc.collect()
        counts.append(len(alive))
        return torch.linalg.eigvalsh(gram)

    use_stand_in(monkeypatch, solve=counting)
    items = [Matrix(str(k), "dense", (1, 1900, 140), lambda k=k: fresh(k)) for k in range(8)]
    analyze_matrices(items, Options())
    assert counts == [0]


def test_an_autocast_region_around_the_analysis_changes_nothing(monkeypatch):
    use_stand_in(monkeypatch)
    plain = analyze_matrices(some_matrices(), Options())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = analyze_matrices(some_matrices(), Options())
    assert [comparable(layer) for layer in inside.layers] == [comparable(layer) for layer in plain.layers]


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stand_in", [False, True])
def test_the_default_device_and_dtype_change_nothing(monkeypatch, device, dtype, stand_in):
    items = some_matrices()
    loaded = [replace(item, load=partial(torch.Tensor.detach, item.load())) for item in items]
    if stand_in:
        use_stand_in(monkeypatch)
    options = Options(keep_eigenvalues=True)
    expected = analyze_matrices(loaded, options)
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        found = analyze_matrices(loaded, options)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert [comparable(layer) for layer in found.layers] == [comparable(layer) for layer in expected.layers]
    for layer, other in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(layer.eigenvalues, other.eigenvalues)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_gpu_gives_the_hosts_snapshot(dtype):
    items = [*some_matrices(), matrix("large", normal(900, 768, seed=9))]
    moved = [Matrix(m.name, m.kind, m.shape, lambda m=m: m.load().to("cuda", dtype)) for m in items]
    on_host = [Matrix(m.name, m.kind, m.shape, lambda m=m: m.load().to(dtype)) for m in items]
    assert_same(analyze_matrices(moved, Options()), analyze_matrices(on_host, Options()), 1e-8)


def trapped(name, rows, columns, *, seed, entries=2):
    weights = normal(rows, columns, seed=seed)
    for k in range(entries):
        weights[3 * k + 1, 2 * k + 5] = (30.0 + k) * (rows * columns / 2500) ** 0.25
    return matrix(name, weights)


@pytest.mark.parametrize("side", [20, 130, 300])
@pytest.mark.parametrize("replicas", [1, 3])
def test_several_trapped_matrices_of_one_shape_stay_on_the_device_with_the_hosts_counts(monkeypatch, side, replicas):
    items = [trapped(f"{k}", 2 * side, side, seed=k, entries=1 + k % 3) for k in range(5)]
    options = Options(replicas=replicas, metrics=["num_traps", "trap_headroom"])
    expected = analyze_matrices(items, options)
    use_stand_in(monkeypatch)
    found = analyze_matrices(items, options)
    assert {layer.solved_on for layer in found.layers} == {"cpu"}
    counts = [layer.value("num_traps") for layer in found.layers]
    assert counts == [layer.value("num_traps") for layer in expected.layers] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("spare", "solved_on", "drawn_by_host"),
    [
        (40 * 80_000, "cpu", 0),
        (40 * 80_000 - 1, "cpu, permuted on cpu: no memory", 2),
        (6 * 8 * 100**2, "cpu, permuted on cpu: no memory", 2),
    ],
    ids=["enough", "not to draw", "not for a shuffled matrix"],
)
def test_a_permutation_that_does_not_fit_into_free_memory_is_the_hosts_and_the_row_says_so(
    monkeypatch, spare, solved_on, drawn_by_host
):
    """Drawing takes 40 bytes an entry on a device: 21 GB for a matrix of 128,000 × 4,096."""
    items = [trapped(f"{k}", 800, 100, seed=k, entries=1 + k) for k in range(3)]
    options = Options(replicas=2, metrics=["num_traps"])
    use_stand_in(monkeypatch, free=2 * spare)
    drawn, original = [], shuffle.permutation
    monkeypatch.setattr(shuffle, "permutation", lambda size, **which: drawn.append(size) or original(size, **which))
    found = analyze_matrices(items, options)
    assert [layer.value("num_traps") for layer in found.layers] == [1, 2, 3]
    assert {layer.solved_on for layer in found.layers} == {solved_on}
    assert len(drawn) <= drawn_by_host
    assert bool(drawn) == bool(drawn_by_host)


class CuSolverError(Exception):
    """As NVIDIA's bindings raise: no RuntimeError."""


@pytest.mark.parametrize("preset", ["default", "weightwatcher"])
@pytest.mark.parametrize("error", [CuSolverError("failed"), ImportError("no library"), ValueError("no")], ids=repr)
def test_whatever_a_device_throws_the_host_goes_on(monkeypatch, error, preset):
    def fails(gram):
        raise error

    items = many(20, 60, 30)
    expected = analyze_matrices(items, Options(preset=preset))
    use_stand_in(monkeypatch, solve=fails)
    found = analyze_matrices(items, Options(preset=preset))
    assert_same(found, expected, 1e-9)
    assert {layer.solved_on for layer in found.layers} == {f"cpu, not cpu: {type(error).__name__}"}


def test_a_layer_that_a_device_cannot_solve_has_no_numbers_and_strict_says_so(monkeypatch):
    items = [matrix("big", normal(64, 40, dtype=torch.float64) * 1e100), *many(1, 64, 40)]
    expected = analyze_matrices(items, Options())
    use_stand_in(monkeypatch)
    found = analyze_matrices(items, Options())
    assert_same(found, expected, 1e-9)
    assert found["big"].status == "solver_failed"
    assert all(math.isnan(value) for value in found["big"].metrics.values())
    with pytest.raises(LayerError, match="layer 'big': expected a spectrum"):
        analyze_matrices(items, Options(strict=True))


def test_without_memory_for_one_matrix_the_host_solves_and_says_so(monkeypatch):
    asked = use_stand_in(monkeypatch, free=0)
    found = analyze_matrices(many(3, 60, 30), Options())
    assert {layer.solved_on for layer in found.layers} == {"cpu, not cpu: no memory"}
    assert (asked.singles, asked.batches) == ([], [])


def test_single_solves_are_not_filled_up(monkeypatch):
    """A chunk is filled up with identities for the batched solver's sake only."""
    asked = use_stand_in(monkeypatch, free=int(2 * 2.5 * 6 * 8 * 200**2))
    analyze_matrices(many(3, 220, 200), Options(metrics=["alpha"]))
    assert asked.singles == [200] * 3


BAD = {
    "integers": torch.ones(1, 40, 30, dtype=torch.int8),
    "truths": torch.ones(1, 40, 30, dtype=torch.bool),
    "complex": torch.ones(1, 40, 30, dtype=torch.complex64),
    "sparse": torch.ones(1, 40, 30).to_sparse(),
    "without data": torch.ones(1, 40, 30, dtype=torch.float32, device="meta"),
    "empty": torch.ones(1, 0, 30),
}


@pytest.mark.parametrize("stand_in", [False, True])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_weights_that_are_none_cost_their_own_layer_only(monkeypatch, bad, stand_in):
    if stand_in:
        use_stand_in(monkeypatch)
    items = [Matrix("bad", "dense", tuple(bad.shape), lambda: bad), *many(3, 60, 30)]
    found = analyze_matrices(items, Options())
    (skipped,) = found.skipped
    assert skipped.reason.startswith("could not be read: ValueError: expected floating-point weights in memory")
    assert [(layer.status, layer.solved_on) for layer in found.layers] == [("ok", "cpu")] * 3
