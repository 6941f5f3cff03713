"""An analyzer gives the same rows however it reads: at once, or from copies in the background."""

import dataclasses
import functools
import math
import threading
import weakref

import pytest
import torch
from torch import nn

from tests.registries import before_measurement
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.matrix import Matrix
from ww_monitor.monitor import analyzer, copies
from ww_monitor.monitor.analyzer import Analyzer
from ww_monitor.monitor.copies import copy_weights
from ww_monitor.monitor.frozen import Checked
from ww_monitor.settings import RunOptions
from ww_monitor.walk.torch import walk


def make_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 32), nn.Conv2d(4, 8, 3), nn.Linear(32, 10))


def change(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5).add_(0.01)


def make_analyzer(**options):
    return Analyzer(Options(), RunOptions(**options))


def rows(snapshot):
    return {layer.name: {k: v for k, v in layer.metrics.items() if not math.isnan(v)} for layer in snapshot.layers}


def collected(watcher):
    """The snapshots that the background has completed."""
    return [watcher.completed(done) for done in iter(watcher.next_done, None)]


def analyze(watcher, net, step, **options):
    return watcher.analyze(list(walk(net)), step=step, epoch=None, **options)


@pytest.fixture
def analysed(monkeypatch):
    """A function: the names of the matrices that were measured since it was last called."""
    names = []
    before_measurement(monkeypatch, "live_sides", lambda loaded: names.extend(one.name for one in loaded.matrices))

    def since():
        found = sorted(names)
        names.clear()
        return found

    return since


def test_a_look_is_an_analysis_of_all():
    net = make_net()
    snapshot = analyze(make_analyzer(), net, 5)
    expected = analyze_matrices(walk(net), Options(), step=5)
    assert (snapshot.step, rows(snapshot), snapshot.skipped) == (5, rows(expected), expected.skipped)
    assert snapshot.summary == pytest.approx(expected.summary, nan_ok=True)


def test_frozen_layers_are_analysed_once_and_again_when_they_change(analysed):
    net, watcher = make_net(), make_analyzer()
    net[1].requires_grad_(False)
    analyze(watcher, net, 1)
    assert analysed() == ["0", "1", "2", "3"]
    snapshot = analyze(watcher, net, 2)
    assert analysed() == ["0", "2", "3"]
    assert [layer.step for layer in snapshot.layers] == [2, 1, 2, 2]
    with torch.no_grad():
        net[1].weight[3, 4] += 1
    analyze(watcher, net, 3)
    assert analysed() == ["0", "1", "2", "3"]
    watcher.restart()
    analyze(watcher, net, 4)
    assert analysed() == ["0", "1", "2", "3"]


def test_the_background_analyses_the_weights_of_the_step_it_was_given():
    net, watcher = make_net(), make_analyzer(mode="async")
    expected = rows(analyze_matrices(walk(net), Options()))
    assert analyze(watcher, net, 7) is None
    change(net)
    assert watcher.join(60)
    (snapshot,) = collected(watcher)
    assert snapshot.step == 7
    found = rows(snapshot)
    assert {name: found[name] == pytest.approx(expected[name], rel=1e-9) for name in expected} == dict.fromkeys(
        expected, True
    )
    assert snapshot.summary["snapshots_dropped"] == 0
    watcher.close(60)


def test_dropped_snapshots_are_counted(monkeypatch):
    net, watcher = make_net(), make_analyzer(mode="async")
    for step in range(20):
        analyze(watcher, net, step)
    watcher.join(60)
    snapshots = collected(watcher)
    assert len(snapshots) + snapshots[-1].summary["snapshots_dropped"] == 20
    assert [snapshot.step for snapshot in snapshots] == sorted(snapshot.step for snapshot in snapshots)
    assert snapshots[-1].step == 19
    watcher.close(60)


def test_a_whole_look_is_made_now_in_async_mode_too():
    snapshot = analyze(make_analyzer(mode="async"), make_net(), 0, whole=True)
    assert (snapshot.step, snapshot.summary["snapshots_dropped"]) == (0, 0)


def test_frozen_layers_are_neither_copied_nor_analysed_again_in_the_background(analysed):
    net, watcher = make_net(), make_analyzer(mode="async")
    net[1].requires_grad_(False)
    for step, expected in ((1, ["0", "1", "2", "3"]), (2, ["0", "2", "3"])):
        analyze(watcher, net, step)
        watcher.join(60)
        (snapshot,) = collected(watcher)
        assert analysed() == expected
    assert [layer.step for layer in snapshot.layers] == [2, 1, 2, 2]
    watcher.close(60)


def test_drift_is_that_of_the_copied_weights():
    net, watcher = make_net(), make_analyzer(mode="async", track_delta=True)
    analyze(watcher, net, 0, whole=True)
    change(net)
    analyze(watcher, net, 1)
    change(net)
    watcher.join(60)
    (snapshot,) = collected(watcher)
    expected = watcher._baseline.drift(list(walk(net)))["0"]["delta_norm"]
    assert 0 < snapshot.layers[0].value("delta_norm") < expected
    watcher.close(60)


def test_a_weight_that_cannot_be_copied_costs_its_row_only():
    items, watcher = list(walk(make_net())), make_analyzer(mode="async")

    def load():
        raise OSError("gone")

    items[1] = type(items[1])(items[1].name, "dense", items[1].shape, load)
    watcher.analyze(items, step=0, epoch=None)
    watcher.join(60)
    (snapshot,) = collected(watcher)
    assert [layer.status for layer in snapshot.layers] == ["ok"] * 3
    assert [(item.name, item.reason) for item in snapshot.skipped] == [
        (items[1].name, "could not be read: OSError: gone")
    ]
    watcher.close(60)


def test_an_analysis_that_fails_in_the_background_costs_its_own_snapshot_only(monkeypatch):
    """Those that were completed before and after it are handed out."""

    def fail(*arguments, step, **options):
        if step == 1:
            raise MemoryError("no room")
        return analyze_matrices(*arguments, step=step, **options)

    watcher = make_analyzer(mode="async")
    monkeypatch.setattr(analyzer, "analyze_matrices", fail)
    for step in range(3):
        analyze(watcher, make_net(), step)
        watcher.join(60)
    assert watcher.completed(watcher.next_done()).step == 0
    with pytest.raises(MemoryError, match="no room"):
        watcher.completed(watcher.next_done())
    assert [snapshot.step for snapshot in collected(watcher)] == [2]
    watcher.close(60)


def test_a_still_is_a_copy_of_everything_that_may_change():
    net = make_net()
    items = list(walk(net))
    taken = copy_weights(items, Checked({}, {}), step=3, epoch=1, memory=None)
    for copied, original in zip(taken.items, items, strict=True):
        assert torch.equal(copied.load(), original.load())
        assert copied.load().untyped_storage().data_ptr() != original.load().untyped_storage().data_ptr()


class Cloned(torch.Tensor):
    """Weights that say of each copy of them whether it is still there."""

    def clone(self, **options):
        copy = self.as_subclass(torch.Tensor).clone(**options)
        CLONES.append(weakref.ref(copy.untyped_storage()))
        return copy

    def detach(self):
        return self


CLONES: list[weakref.ref] = []


@pytest.fixture
def items():
    """The matrices of a net, of four shapes, the most expensive first; their copies are in `CLONES`, in this order."""
    CLONES.clear()
    found = sorted(walk(make_net()), key=lambda item: -item.cost)
    return [dataclasses.replace(item, load=functools.partial(cloned, item)) for item in found]


class Unruly(Matrix):
    """A matrix that ends the analysis before anything is loaded."""

    @property
    def eigenvalue_factor(self):
        raise ArithmeticError("no factor")


def cloned(item):
    return item.load().detach().as_subclass(Cloned)


def alive():
    return [copy() is not None for copy in CLONES]


def test_in_a_tight_address_space_no_thread_is_begun(monkeypatch, items):
    monkeypatch.setattr("ww_monitor.monitor.analyzer.room_for_blas", lambda threads: False)
    watcher = make_analyzer(mode="async")
    assert watcher.analyze(items, step=0, epoch=None).step == 0
    assert not watcher.busy
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ww_monitor")]


@pytest.mark.parametrize("track_delta", [False, True])
def test_a_copy_is_dead_once_its_layer_was_analysed(monkeypatch, items, track_delta):
    watcher, seen = make_analyzer(mode="async", track_delta=track_delta), []
    expected = rows(analyze(make_analyzer(), make_net(), 0))
    before_measurement(monkeypatch, "live_sides", lambda loaded: seen.append(alive()))
    watcher.analyze(items, step=1, epoch=None)
    watcher.join(60)
    (snapshot,) = collected(watcher)
    assert [layer.status for layer in snapshot.layers] == ["ok"] * 4
    assert rows(snapshot)["1"]["alpha"] == pytest.approx(expected["1"]["alpha"])
    assert ("delta_norm" in snapshot.summary) == track_delta
    assert seen == [[False] * done + [True] * (4 - done) for done in range(4)]
    watcher.close(60)


def test_no_copy_outlives_its_analysis_though_nobody_has_collected_it_or_it_failed(items):
    watcher = make_analyzer(mode="async")
    watcher.analyze(items, step=0, epoch=None)
    watcher.join(60)
    assert alive() == [False] * 4
    last = Unruly(**vars(items.pop()))
    watcher.analyze([*items, last], step=1, epoch=None)
    watcher.join(60)
    assert alive() == [False] * 8
    with pytest.raises(ArithmeticError, match="no factor"):
        collected(watcher)
    watcher.close(60)


def test_a_copy_that_was_given_away_can_be_read_while_it_is_held():
    item, *_ = copy_weights(list(walk(make_net())), Checked({}, {}), step=0, epoch=None, memory=None).to_analyse()
    weights = item.load()
    assert item.load() is weights
    del weights
    with pytest.raises(RuntimeError, match="expected one load of a copied weight"):
        item.load()


def test_what_torch_has_reserved_and_not_allocated_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    assert copies._allowed(torch.device("cuda", 0), None) == copies.FREE_SHARE * 4000
    assert copies._allowed(torch.device("cuda", 0), 7) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("copy_budget_bytes", [None, 1])
def test_a_gpus_weights_are_copied_there_or_to_pinned_memory(copy_budget_bytes):
    net = make_net().cuda()
    watcher = make_analyzer(mode="async", copy_budget_bytes=copy_budget_bytes)
    expected = rows(analyze_matrices(walk(net), Options()))
    analyze(watcher, net, 7)
    change(net)
    watcher.join(60)
    (snapshot,) = collected(watcher)
    assert rows(snapshot)["0"] == pytest.approx(expected["0"], rel=1e-8)
    watcher.close(60)
