"""Matrices → Snapshot: grouped, isolated, one in memory at a time, reduced over what is known."""

import gc
import math
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from tests.matrices import broken, matrix, normal
from tests.registries import before_measurement, before_metric
from ww_monitor.engine import Options, analyze_matrices, run
from ww_monitor.errors import LayerError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.metric import MEASUREMENTS, TABLE, measurement
from ww_monitor.metric.measurements import LEAST_TRAP_SIDE
from ww_monitor.metric.table import metric
from ww_monitor.spectra import host
from ww_monitor.spectra.elements import elements
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE, shuffled

NAN = float("nan")


def comparable(layer):
    return {name: None if math.isnan(value) else value for name, value in layer.metrics.items()}, layer.eigenvalues


KEEP = Options(keep_eigenvalues=True)


def test_layers_come_in_model_order_whatever_the_order_of_work():
    loaded = []

    def logged(name, weights):
        def load():
            loaded.append(name)
            return weights[None]

        return Matrix(name, "dense", (1, *weights.shape), load)

    items = [logged("small", normal(20, 10)), logged("large", normal(90, 80)), logged("same", normal(10, 20))]
    snapshot = analyze_matrices(items, Options(), step=7, epoch=2)
    assert [layer.name for layer in snapshot.layers] == ["small", "large", "same"]
    assert loaded == ["large", "small", "same"]
    assert (snapshot.step, snapshot.epoch, snapshot.preset) == (7, 2, "default")
    assert snapshot.seconds > 0


@pytest.fixture
def loads():
    """A maker of matrices that are loaded late, and for each load the number of others in memory."""
    alive, others = weakref.WeakSet(), []

    def lazily(name, shape=(40, 30)):
        def load():
            gc.collect()
            others.append(len(alive))
            weights = torch.eye(*shape, device="cpu")[None]
            alive.add(weights.untyped_storage())  # views of it may outlive the tensor
            return weights

        return Matrix(name, "dense", (1, *shape), load)

    return lazily, others


HALF, THIRD = (3_750, 40), (2_500, 40)
"""Of the elements up to which matrices of one shape are loaded together (`engine.run.TOGETHER`), a little more."""


def test_one_matrix_is_in_memory_at_a_time(loads, allow_threads):
    allow_threads(1)
    lazily, others = loads
    analyze_matrices([lazily(str(k), HALF) for k in range(3)], Options(metrics="all"))
    assert others == [0, 0, 0]


def test_small_matrices_are_in_memory_together_up_to_a_limit(loads, allow_threads):
    allow_threads(1)
    lazily, others = loads
    analyze_matrices([lazily(str(k), THIRD) for k in range(5)], Options(metrics=["alpha"]))
    assert others == [0, 1, 0, 1, 0]


@pytest.fixture
def two_slow_threads(allow_threads, monkeypatch):
    """Two workers that keep a matrix for longer than it takes to load one."""
    allow_threads(2)
    before_measurement(monkeypatch, "live_sides", lambda loaded: time.sleep(0.05))


def test_threads_hold_one_matrix_each_and_the_next(loads, two_slow_threads):
    lazily, others = loads
    analyze_matrices([lazily(str(k), HALF) for k in range(8)], Options(metrics=["alpha"]))
    assert 1 <= max(others) <= 2


def test_what_does_not_fit_beside_another_waits(loads, two_slow_threads, monkeypatch):
    lazily, others = loads
    monkeypatch.setattr(run, "HOST_MEMORY", 1)
    analyze_matrices([lazily(str(k), HALF) for k in range(8)], Options(metrics=["alpha"]))
    assert max(others) <= 1


def test_any_number_of_threads_gives_the_same_snapshot(allow_threads):
    items = [matrix(f"{k}", normal(60 + k, 40, seed=k)) for k in range(9)] + [broken("bad", OSError("gone"))]
    found = []
    for count in (1, 3):
        allow_threads(count)
        found.append(analyze_matrices(items, KEEP))
    alone, together = ([comparable(layer) for layer in snapshot.layers] for snapshot in found)
    assert together == alone
    assert [item.reason for item in found[1].skipped] == ["could not be read: OSError: gone"]


@pytest.mark.parametrize("budget", [1, 2])
def test_rows_of_one_short_side_are_made_once_and_are_those_made_alone(budget, monkeypatch, allow_threads):
    """Over all shapes and kinds that share it, on the calling thread."""
    made = []

    def note(batch):
        made.append((threading.current_thread().name, batch.short_side, len(batch)))

    before_metric(monkeypatch, "ks", note)
    allow_threads(budget)
    items = [matrix(str(k), normal(60 + 7 * (k % 3), 40, seed=k)) for k in range(9)]
    items += [matrix("wide", normal(40, 90, seed=10)), matrix("half", normal(50, 40, seed=11).half())]
    found = analyze_matrices([*items, matrix("other", normal(30, 20))], KEEP)
    here = threading.current_thread().name
    assert sorted(made) == [(here, 20, 1), (here, 40, 11)]
    assert [layer.name for layer in found.layers] == [*map(str, range(9)), "wide", "half", "other"]
    for item in items:
        assert comparable(found[item.name]) == comparable(analyze_matrices([item], KEEP)[item.name])


@pytest.mark.parametrize("bad", [{0}, {7}, {8}, {3, 9}, set(range(10))], ids=str)
@pytest.mark.parametrize("budget", [1, 2])
def test_the_rows_beside_layers_that_cannot_be_measured_are_made(bad, budget, monkeypatch, allow_threads):
    """Of chunks of four and of one."""

    def picky(loaded):
        if any(int(one.name) in bad for one in loaded.matrices):
            raise ArithmeticError("no")

    before_measurement(monkeypatch, "elements", picky)
    allow_threads(budget)
    found = analyze_matrices([matrix(str(k), normal(60 + max(k, 3), 40, seed=k)) for k in range(10)], KEEP)
    wrong = [int(layer.name) for layer in found.layers if layer.status == "error: ArithmeticError: no"]
    assert (len(found.layers), set(wrong)) == (10, bad)
    assert all(layer.status == "ok" for layer in found.layers if int(layer.name) not in bad)


def test_strict_raises_from_a_thread_too(allow_threads):
    allow_threads(2)
    items = [matrix(str(k), normal(60, 40, seed=k)) for k in range(4)] + [matrix("bad", torch.full((50, 30), NAN))]
    with pytest.raises(LayerError, match="layer 'bad': expected finite weights"):
        analyze_matrices(items, Options(strict=True))


def test_a_layer_has_the_same_numbers_alone_as_in_a_group():
    items = [matrix("tall", normal(40, 30)), matrix("wide", normal(30, 40, seed=1)), matrix("other", normal(50, 9))]
    items.append(matrix("half", normal(40, 30, seed=2).half()))
    together = analyze_matrices(items, KEEP)
    for item in items:
        alone = analyze_matrices([item], KEEP)
        assert comparable(together[item.name]) == comparable(alone[item.name])


def test_skipped_items_are_passed_on():
    snapshot = analyze_matrices([Skipped("bias", "other", (3, 4), "why"), matrix("fc", normal(20, 10))], Options())
    assert snapshot.skipped == (Skipped("bias", "other", (3, 4), "why"),)
    assert len(snapshot.layers) == 1


def test_nothing_to_analyse_is_an_empty_snapshot():
    snapshot = analyze_matrices([], Options())
    assert snapshot.layers == ()
    assert all(math.isnan(value) for value in snapshot.summary.values())


FAILURES = {
    "load raises": (broken("bad", OSError("shard is gone")), "could not be read: OSError: shard is gone"),
    "another shape": (
        matrix("bad", normal(41, 30), shape=(1, 40, 30)),
        r"could not be read: ValueError: expected weights of shape (1, 40, 30), got (1, 41, 30)",
    ),
    "out of memory": (broken("bad", MemoryError("no room")), "could not be read: MemoryError: no room"),
}


@pytest.mark.parametrize(("bad", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_layer_that_cannot_be_read_costs_itself_only_and_says_why(bad, reason):
    good = [matrix("a", normal(40, 30)), matrix("b", normal(30, 40, seed=1))]
    alone, beside = analyze_matrices(good, KEEP), analyze_matrices([good[0], bad, good[1]], KEEP)
    assert [layer.name for layer in beside.layers] == ["a", "b"]
    assert [(item.name, item.kind, item.shape, item.reason) for item in beside.skipped] == [
        ("bad", "dense", (1, 40, 30), reason)
    ]
    for name in ("a", "b"):
        assert comparable(beside[name]) == comparable(alone[name])
    assert beside.summary == pytest.approx(alone.summary, nan_ok=True)


@pytest.mark.parametrize(("step", "where"), [(None, "layer 'bad': shard"), (12, "layer 'bad' at step 12: shard")])
def test_strict_raises_with_layer_and_step(step, where):
    with pytest.raises(LayerError, match=where) as caught:
        analyze_matrices([broken("bad", OSError("shard is gone"))], Options(strict=True), step=step)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("strict", [False, True])
def test_large_finite_weights_are_not_called_not_finite(strict):
    """The squares of 1e160 are no float64; no solver gives such a spectrum."""
    item = matrix("fc", normal(20, 10).double() * 1e160)
    if strict:
        with pytest.raises(LayerError, match="layer 'fc': expected a spectrum with the moments of the weights"):
            analyze_matrices([item], Options(strict=True))
    else:
        assert analyze_matrices([item], Options())["fc"].status == "solver_failed"


def test_strict_names_a_solver_that_fails(monkeypatch):
    monkeypatch.setattr(host, "_lapack", lambda gram, library: np.ones(gram.shape[:2]))
    with pytest.raises(LayerError, match="layer 'fc': expected a spectrum with the moments of the weights, got solver"):
        analyze_matrices([matrix("fc", normal(20, 10))], Options(strict=True))
    layer = analyze_matrices([matrix("fc", normal(20, 10))], Options())["fc"]
    assert (layer.status, layer.verdict) == ("solver_failed", "solver_failed")


def test_a_metric_that_fails_on_one_row_costs_that_row_only(monkeypatch):
    def picky(batch):
        if (batch.eigenvalues[:, -1] > 1000).any():
            raise ArithmeticError("too large")

    before_metric(monkeypatch, "ks", picky)
    items = [matrix(name, scale * normal(40, 30)) for name, scale in (("a", 1), ("b", 10), ("c", 2))]
    snapshot = analyze_matrices(items, Options())
    assert [layer.status for layer in snapshot.layers] == ["ok", "error: ArithmeticError: too large", "ok"]


def test_a_metric_of_complex_numbers_costs_the_layers_and_needs_no_docstring(monkeypatch):
    def rotating(batch):
        return batch.floor + 1j

    monkeypatch.setitem(TABLE["default"], "rotating", None)
    metric(source="this test", standard=False)(rotating)
    layer = analyze_matrices([matrix("fc", normal(20, 10))], Options(metrics=["rotating"]))["fc"]
    assert TABLE["default"]["rotating"].definition == ""
    assert layer.status == "error: TypeError: metric 'rotating': expected real numbers, got torch.complex128"


def test_slices_are_solved_apart_pooled_and_halved_for_a_kernel():
    kernel = normal(9, 24, 16)
    expected = torch.linalg.svdvals(kernel.double()).square().flatten().sort().values
    for kind, factor in (("conv", 0.5), ("dense", 1.0)):
        layer = analyze_matrices([matrix("k", kernel, kind=kind)], KEEP)["k"]
        found = torch.tensor(layer.eigenvalues, dtype=torch.float64)
        torch.testing.assert_close(found, factor * expected, rtol=1e-10, atol=1e-12)


def test_kernels_and_dense_stacks_of_one_shape_are_not_mixed():
    kernel = normal(9, 24, 16)
    snapshot = analyze_matrices([matrix("dense", kernel), matrix("conv", kernel, kind="conv")], Options())
    difference = snapshot["dense"].value("log_norm") - snapshot["conv"].value("log_norm")
    assert difference == pytest.approx(math.log10(2))


def test_a_zero_slice_contributes_zeros_and_a_broken_one_breaks_the_layer():
    kernel = normal(4, 24, 16)
    kernel[2] = 0.0
    layer = analyze_matrices([matrix("k", kernel)], KEEP)["k"]
    assert layer.status == "ok"
    assert list(layer.eigenvalues[:16]) == [0.0] * 16
    assert layer.esd.num_zero == 16
    kernel[1, 0, 0] = math.nan
    assert analyze_matrices([matrix("k", kernel)], KEEP)["k"].status == "not_finite"
    assert analyze_matrices([matrix("k", torch.zeros(4, 24, 16))], KEEP)["k"].status == "zero"


def test_the_histogram_counts_every_eigenvalue_once():
    weights = normal(60, 50)
    weights[:, :7] = 0.0
    layer = analyze_matrices([matrix("fc", weights)], KEEP)["fc"]
    assert sum(layer.esd.counts) + layer.esd.num_zero == 50
    assert layer.esd.num_zero == 7
    logs = [math.log10(value) for value in layer.eigenvalues[7:]]
    assert layer.esd.low == pytest.approx(logs[0])
    assert layer.esd.high == pytest.approx(logs[-1])
    edges = layer.esd.edges
    for index in range(5, 60, 5):
        assert sum(layer.esd.counts[:index]) == pytest.approx(sum(log < edges[index] for log in logs), abs=1)


def test_the_histogram_of_equal_eigenvalues_has_a_width():
    histogram = analyze_matrices([matrix("eye", torch.eye(30))], Options())["eye"].esd
    assert histogram.high - histogram.low == pytest.approx(1)
    assert sum(histogram.counts) == 30


def test_eigenvalues_are_kept_only_if_asked_for():
    assert analyze_matrices([matrix("fc", normal(20, 10))], Options())["fc"].eigenvalues is None
    assert len(analyze_matrices([matrix("fc", normal(20, 10))], KEEP)["fc"].eigenvalues) == 10


def test_small_slices_have_no_trap_metrics():
    for side in (LEAST_TRAP_SIDE - 1, LEAST_TRAP_SIDE):
        layer = analyze_matrices([matrix("k", normal(9, 40, side))], Options())["k"]
        known = [not math.isnan(layer.value(name)) for name in ("trap_headroom", "mean_shift", "num_traps")]
        assert known == [side == LEAST_TRAP_SIDE] * 3


def test_only_near_slices_are_shuffled_and_the_entry_keeps_its_address():
    kernel = normal(9, 32, 24)
    kernel[6, 5, 4] = 15.0
    layer = analyze_matrices([matrix("k", kernel)], Options())["k"]
    assert layer.value("num_traps") == pytest.approx(1, abs=0.4)
    assert [(entry.slice, entry.row, entry.column) for entry in layer.trap_entries] == [(6, 5, 4)]
    assert layer.trap_entries[0].value == 15.0


def test_the_slices_of_a_kernel_share_the_level_of_the_layer():
    """Entries about as large as makes an outlier, so that the level decides over some."""
    kernel = normal(9, 32, 24)
    kernel[:, 5, 4] = torch.linspace(5.0, 7.0, 9)
    layer = analyze_matrices([matrix("k", kernel)], Options(significance=0.3))["k"]
    stats = elements(kernel)
    near = (stats.headroom >= HEADROOM_TO_SHUFFLE).nonzero().flatten()
    shared, whole = (
        shuffled(list(kernel[near]), stats.take(near), seed=0, significance=level).mean_count.sum().item()
        for level in (1 - 0.7 ** (1 / 9), 0.3)
    )
    assert layer.value("num_traps") == pytest.approx(shared)
    assert shared < whole


def test_measurements_that_no_metric_needs_are_not_made(monkeypatch):
    made = []
    for name in list(MEASUREMENTS):
        before_measurement(monkeypatch, name, lambda loaded, name=name: made.append(name))
    weights = normal(40, 30)
    weights[3, 4] = 50.0
    assert analyze_matrices([matrix("fc", weights)], Options(metrics=["alpha"], strict=True))["fc"].status == "ok"
    assert made == ["live_sides"]
    made.clear()
    layer = analyze_matrices([matrix("fc", weights)], Options(metrics=["trap_headroom"], strict=True))["fc"]
    assert layer.value("trap_headroom") > 1
    assert made == ["live_sides", "elements"]


def test_a_measurement_is_written_in_one_place_and_its_values_reach_the_batch_by_name(monkeypatch):
    monkeypatch.setitem(MEASUREMENTS, "corners", None)
    monkeypatch.setitem(TABLE["default"], "corner", None)

    @measurement()
    def corners(loaded, known, definitions):
        return {"corner": torch.stack([layer[0, 0, 0].double() for layer in loaded.layers])}

    assert list(MEASUREMENTS)[-1] == "corners"
    metric(source="this test", needs="corners")(corner)
    weights = [normal(40, 30), normal(50, 30, seed=1), torch.full((40, 30), NAN)]
    found = analyze_matrices([matrix(str(k), w) for k, w in enumerate(weights)], Options(metrics=["corner"]))
    assert [layer.value("corner") for layer in found.layers[:2]] == [float(w[0, 0]) for w in weights[:2]]
    assert math.isnan(found.layers[2].value("corner"))


def corner(batch):
    """The first weight."""
    return batch.column("corner")


def test_the_summary_reduces_the_known_values_by_each_metrics_own_rule():
    weights = normal(40, 30)
    weights[3, 4] = 50.0
    items = [matrix("a", normal(60, 50)), matrix("b", weights), matrix("nan", weights * math.nan)]
    snapshot = analyze_matrices(items, Options())
    a, b = snapshot["a"], snapshot["b"]
    assert snapshot.summary["log_norm"] == pytest.approx((a.value("log_norm") + b.value("log_norm")) / 2)
    assert snapshot.summary["trap_headroom"] == max(a.value("trap_headroom"), b.value("trap_headroom"))
    assert snapshot.summary["num_traps"] == a.value("num_traps") + b.value("num_traps") > 0
    assert snapshot.summary["trap_p_value"] == b.value("trap_p_value")


def test_weights_need_no_gradient_and_are_not_changed():
    weights = normal(1, 40, 30).requires_grad_()
    before = weights.detach().clone()
    analyze_matrices([Matrix("fc", "dense", (1, 40, 30), lambda: weights)], Options(metrics="all"))
    assert torch.equal(weights, before)
    assert weights.grad is None


@pytest.mark.parametrize(("rows", "columns"), [(0, 20), (40, 0), (40, 20), (0, 45)])
def test_dead_rows_and_columns_make_no_spikes(rows, columns):
    """The bulk is that of the living part; a layer that is random there is random-like."""
    w = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    w[200 - rows :], w[:, 100 - columns :] = 0.0, 0.0
    layer = analyze_matrices([Matrix("fc", "dense", (1, 200, 100), lambda: w[None])], Options()).layers[0]
    assert layer.value("num_spikes") == 0
    assert layer.verdict == "random_like"
    assert layer.value("bulk_std") == pytest.approx(1.0, abs=0.02)


def test_slices_too_narrow_for_a_bulk_are_not_called_random():
    """A first convolution on grey images: 25 slices of 16 × 1."""
    w = torch.randn(25, 16, 1, generator=torch.Generator().manual_seed(0))
    layer = analyze_matrices([Matrix("stem", "conv", (25, 16, 1), lambda: w)], Options()).layers[0]
    assert math.isnan(layer.value("num_spikes"))
    assert layer.verdict == "thin_slices"
    assert layer.value("alpha") > 1


def test_a_process_is_warmed_up_once(monkeypatch):
    done = []
    before_measurement(monkeypatch, "live_sides", lambda loaded: done.append([m.shape for m in loaded.matrices]))
    run.warm_up.cache_clear()
    run.warm_up()
    run.warm_up()
    assert done == [[(1, 32, 16)] * 2]
