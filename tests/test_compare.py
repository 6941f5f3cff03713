"""Distances between two models are what their definitions say, and a baseline follows a model without touching it."""

import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ww_monitor.compare as module
from tests.matrices import draw
from tests.reference.cases import published
from ww_monitor.baseline import Baseline
from ww_monitor.compare import compare_matrices, distances
from ww_monitor.errors import InvalidArgument, LayerError, MissingDependency
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.spectra.subspaces import (
    cka,
    numerical_floor,
    overlap,
    rotation,
    subspace,
)
from ww_monitor.walk.delta import delta
from ww_monitor.walk.torch import walk


def matrix(weights, name="fc", kind="dense"):
    return Matrix(name, kind, tuple(weights.shape), lambda: weights)


def orthogonal(side, seed=0):
    return torch.linalg.qr(draw(side, side, seed=seed)).Q


def pair_of_models():
    """The two models of the reference values: two kernels and a linear layer each."""

    def build(seed):
        convs = [(16, 3, 3, 3), (32, 16, 3, 3)]
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(128, 64))
        weights = [np.random.RandomState(seed).standard_normal(shape) * 0.1 for shape in convs]
        weights.append(np.random.RandomState(seed + 1).standard_normal((64, 128)) * 0.1)
        with torch.no_grad():
            for layer, weight in zip(net, weights, strict=True):
                layer.weight.copy_(torch.from_numpy(weight))
        return net

    return build(30), build(40)


# --- the definitions


@pytest.mark.parametrize("shape", [(1, 30, 12), (3, 12, 30), (1, 9, 9)], ids=str)
def test_cka_is_the_cosine_between_the_gram_matrices_of_the_rows(shape):
    a, b = draw(*shape), draw(*shape, seed=1)
    expected = [
        float(((x @ x.T) * (y @ y.T)).sum() / torch.linalg.norm(x @ x.T) / torch.linalg.norm(y @ y.T))
        for x, y in zip(a, b, strict=True)
    ]
    assert cka(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def test_cka_ignores_scale_and_the_basis_of_the_inputs_but_not_that_of_the_outputs():
    a = draw(1, 20, 50)
    assert cka(a, -3 * a @ orthogonal(50)).item() == pytest.approx(1.0, abs=1e-12)
    assert cka(a, orthogonal(20) @ a).item() < 0.9


@pytest.mark.parametrize(("rows", "columns"), [(200, 50), (50, 200), (100, 100)])
def test_cka_of_unrelated_matrices_is_their_columns_over_the_sum_of_their_sides(rows, columns):
    found = cka(draw(1, rows, columns), draw(1, rows, columns, seed=1)).item()
    assert found == pytest.approx(columns / (rows + columns), abs=0.02)


@pytest.mark.parametrize("shape", [(2, 30, 12), (2, 12, 30), (1, 8, 8), (1, 5, 3)], ids=str)
def test_subspaces_are_those_of_a_singular_value_decomposition(shape):
    w = draw(*shape)
    left, right = subspace(w, 4)
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    k = min(4, *shape[1:])
    assert left.shape == (shape[0], shape[1], k)
    assert right.shape == (shape[0], shape[2], k)
    torch.testing.assert_close(overlap(left, u[:, :, :k]), torch.ones(shape[0], dtype=torch.float64))
    torch.testing.assert_close(overlap(right, vh.mT[:, :, :k]), torch.ones(shape[0], dtype=torch.float64))


def test_leading_directions_are_those_of_a_whole_decomposition():
    w = draw(2, 40, 20)
    (left, right), (u, _, vh) = subspace(w, 5), torch.linalg.svd(w.double(), full_matrices=False)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(overlap(left, u[:, :, :5]), ones)
    torch.testing.assert_close(overlap(right, vh[:, :5].mT), ones)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_baseline_follows_a_model_on_another_device():
    net = nn.Linear(40, 20).cuda()
    baseline = Baseline.capture(walk(net))
    (drift,) = baseline.drift(walk(net)).values()
    assert drift["delta_norm"] == 0.0
    assert drift["left_rotation"] == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(angle=st.floats(0.0, 1.5707), seed=st.integers(0, 1000))
def test_rotation_is_the_mean_squared_sine_of_the_angle(angle, seed):
    frame = orthogonal(10, seed)
    turned = torch.stack([frame[:, 0], np.cos(angle) * frame[:, 1] + np.sin(angle) * frame[:, 2]], 1)
    assert rotation(frame[None, :, :2], turned[None]).item() == pytest.approx(np.sin(angle) ** 2 / 2, abs=1e-12)


def test_directions_that_do_not_exist_take_no_part():
    low_rank = (draw(1, 40, 3) @ draw(1, 3, 30, seed=1)).float()
    left, right = subspace(low_rank, 8)
    assert (left != 0).any(1).sum().item() == (right != 0).any(1).sum().item() == 3
    noisy = subspace(low_rank * (1 + 1e-7 * draw(1, 40, 30, seed=2).float()), 8)
    assert overlap(left, noisy[0]).item() == pytest.approx(1.0, abs=1e-6)
    assert torch.isnan(overlap(left, subspace(torch.zeros(1, 40, 30), 8)[0])).all()


def test_a_subspace_inside_a_larger_one_overlaps_with_a_part_of_it():
    axes = torch.eye(5, dtype=torch.float64)[None]
    padded = torch.cat([axes[:, :, :1], torch.zeros(1, 5, 1, dtype=torch.float64)], 2)
    assert overlap(padded, axes[:, :, :2]).item() == 0.5
    assert overlap(padded, padded).item() == 1.0


def test_the_floor_is_above_the_rounding_of_the_storage_precision():
    w = draw(300, 100)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounding = torch.linalg.matrix_norm(w.to(dtype).double() - w, ord=2).item() ** 2
        largest = torch.linalg.matrix_norm(w, ord=2).square()[None]
        floor = numerical_floor(largest, w.square().mean()[None], 300, 100, eps=torch.finfo(dtype).eps).item()
        assert rounding < floor
        assert dtype == torch.float32 or floor < 10 * rounding  # there the solver's own error is larger


# --- two models


def test_frobenius_is_weightwatchers_raw_distance_and_cka_the_square_of_its_similarity():
    reference = published()["distances"]
    a, b = pair_of_models()
    found = distances(a, b)
    assert [row.frobenius for row in found.rows] == pytest.approx(reference["raw"]["delta_W"], rel=1e-5)
    assert found.summary["frobenius"] == pytest.approx(reference["raw"]["avg_dW"], rel=1e-5)
    assert found.rows[2].cka == pytest.approx(reference["cka"]["delta_W"][2] ** 2, rel=1e-5)
    for layer in (0, 1):
        slices = [net[layer].weight.detach().double().flatten(2).permute(2, 0, 1) for net in (a, b)]
        assert cka(*slices).sqrt().mean().item() == pytest.approx(reference["cka"]["delta_W"][layer], rel=1e-5)


def test_a_model_is_at_distance_zero_from_itself_whatever_the_kind_of_its_layers():
    net = nn.Sequential(nn.Linear(20, 10), nn.Conv2d(3, 8, 3), nn.LSTM(6, 5), nn.Embedding(30, 4))
    for row in distances(net, net).rows:
        assert (row.frobenius, row.relative) == (0.0, 0.0)
        assert (row.cka, row.left_overlap, row.right_overlap) == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)


def test_a_kernel_is_compared_slice_by_slice():
    a, b = draw(4, 12, 6), draw(4, 12, 6, seed=1)
    row = compare_matrices([matrix(a, kind="conv")], [matrix(b, kind="conv")], top=2).rows[0]
    assert row.frobenius == pytest.approx(torch.linalg.vector_norm(a - b).item())
    assert row.relative == pytest.approx((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item())
    assert row.cka == pytest.approx(cka(a, b).mean().item())
    left = [subspace(w, 2)[0] for w in (a, b)]
    assert row.left_overlap == pytest.approx(overlap(*left).mean().item())
    one_direction = compare_matrices([matrix(a)], [matrix(b)], top=1).rows[0]
    assert one_direction.left_overlap != row.left_overlap


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_what_has_no_spectrum_is_nan_and_enters_no_mean(bad):
    a = [matrix(torch.full((1, 8, 8), bad), "bad"), matrix(draw(1, 8, 8), "good")]
    b = [matrix(draw(1, 8, 8, seed=1), "bad"), matrix(draw(1, 8, 8), "good")]
    found = compare_matrices(a, b)
    assert all(np.isnan([found.rows[0].relative, found.rows[0].cka, found.rows[0].left_overlap]))
    assert found.summary["cka"] == pytest.approx(1.0)


def test_layers_that_do_not_pair_are_an_error_or_are_listed():
    a = [matrix(draw(1, 8, 8), "both"), matrix(draw(1, 8, 8), "mine"), matrix(draw(1, 8, 4), "shape")]
    b = [matrix(draw(1, 8, 8), "both"), matrix(draw(1, 4, 8), "shape"), Skipped("mine", "dense", (8, 8), "tied to x")]
    with pytest.raises(InvalidArgument, match=r"'mine': only in a, left out of b \(tied to x\); 'shape': shape \(1, 8"):
        compare_matrices(a, b)
    found = compare_matrices(a, b, unpaired="skip")
    assert [row.name for row in found.rows] == ["both"]
    assert set(found.unpaired) == {"mine", "shape"}


def test_patterns_choose_the_layers():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    assert [row.name for row in distances(net, other, exclude=["1"]).rows] == ["0"]
    assert [row.name for row in distances(net, other, include=["0"]).rows] == ["0"]


def test_parts_of_one_checkpoint_are_compared(tmp_path):
    torch.manual_seed(0)
    weights = {"fc.weight": torch.randn(20, 30)}
    torch.save({"model": weights, "ema": {"fc.weight": 1.5 * weights["fc.weight"]}}, tmp_path / "c.pt")
    (row,) = distances(tmp_path / "c.pt", str(tmp_path / "c.pt"), part="model", part_b="ema").rows
    assert (row.name, row.relative) == ("fc", pytest.approx(0.5))
    assert distances(tmp_path / "c.pt", tmp_path / "c.pt", part="ema").rows[0].relative == 0
    assert distances(weights, tmp_path / "c.pt", part_b="ema").rows[0].relative == pytest.approx(0.5)


def test_wrong_arguments_are_named():
    net = nn.Linear(8, 8)
    with pytest.raises(InvalidArgument, match="top must be an integer >= 1; got 0"):
        distances(net, net, top=0)
    with pytest.raises(InvalidArgument, match="unpaired must be one of 'error', 'skip'; got 'drop'"):
        distances(net, net, unpaired="drop")


def test_a_layer_that_cannot_be_read_is_named():
    broken = Matrix("broken", "dense", (1, 8, 8), lambda: 1 / 0)
    with pytest.raises(LayerError, match="layer 'broken': division by zero"):
        compare_matrices([broken], [broken])


def test_one_pair_is_in_memory_at_a_time():
    alive = weakref.WeakValueDictionary()
    counts = []

    def load(seed):
        array = draw(1, 30, 20, seed=seed).numpy()  # lives as long as the tensor that is made of it
        alive[len(counts)] = array
        counts.append(len(alive))
        return torch.from_numpy(array)

    items = [Matrix(str(i), "dense", (1, 30, 20), functools.partial(load, i)) for i in range(5)]
    compare_matrices(items, items)
    assert max(counts) == 2


def test_the_table_has_one_row_a_layer(monkeypatch):
    pytest.importorskip("pandas")
    a, b = pair_of_models()
    table = distances(a, b).to_pandas()
    assert list(table.columns) == ["name", "shape", "frobenius", "relative", "cka", "left_overlap", "right_overlap"]
    assert len(table) == 3
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingDependency, match=r"ww-monitor\[plots\]"):
        distances(a, b).to_pandas()


# --- the same model, later


def test_drift_follows_a_known_turn_of_the_leading_direction():
    u, v = orthogonal(30), orthogonal(20, seed=1)
    spectrum = torch.tensor([10.0, *[0.1] * 19], dtype=torch.float64)
    initial = (u[:, :20] * spectrum) @ v.T
    live = initial.clone()[None]
    baseline = Baseline.capture([matrix(live)], top=1)
    angle = 0.3
    turned = u.clone()
    turned[:, 0] = np.cos(angle) * u[:, 0] + np.sin(angle) * u[:, 1]
    turned[:, 1] = np.cos(angle) * u[:, 1] - np.sin(angle) * u[:, 0]
    live.copy_(((turned[:, :20] * spectrum) @ v.T)[None])
    drift = baseline.drift([matrix(live)])["fc"]
    assert drift["left_rotation"] == pytest.approx(np.sin(angle) ** 2, abs=1e-9)
    assert drift["right_rotation"] == pytest.approx(0.0, abs=1e-9)
    moved = torch.linalg.vector_norm(live[0] - initial) / torch.linalg.vector_norm(initial)
    assert drift["delta_norm"] == pytest.approx(moved.item(), rel=1e-12)


def test_a_baseline_holds_copies_and_leaves_the_model_alone():
    net = nn.Sequential(nn.Linear(16, 12), nn.Conv2d(2, 9, 3)).to(torch.bfloat16)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    baseline = Baseline.capture(walk(net))
    pointers = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    for item in baseline.matrices:
        assert item.load().dtype == torch.bfloat16
        assert item.load().untyped_storage().data_ptr() not in pointers
        assert not item.load().requires_grad
    baseline.drift(walk(net))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


def test_a_baseline_gives_the_delta_spectra_of_training():
    net = nn.Linear(16, 12)
    baseline = Baseline.capture(walk(net))
    with torch.no_grad():
        net.weight.add_(0.5)
    (change,) = delta(walk(net), baseline.matrices)
    torch.testing.assert_close(change.load(), torch.full((1, 12, 16), 0.5))


@pytest.mark.parametrize("case", ["new", "shape", "broken", "not finite"])
def test_a_layer_without_a_usable_baseline_has_unknown_drift(case):
    baseline = Baseline.capture([matrix(draw(1, 8, 8), "fc"), matrix(draw(1, 8, 8), "ok")])
    now = {
        "new": matrix(draw(1, 8, 8), "other"),
        "shape": matrix(draw(1, 8, 4), "fc"),
        "broken": Matrix("fc", "dense", (1, 8, 8), lambda: 1 / 0),
        "not finite": matrix(torch.full((1, 8, 8), float("nan")), "fc"),
    }[case]
    drift = baseline.drift([now, matrix(draw(1, 8, 8), "ok"), Skipped("x", "dense", (1,), "why")])
    assert all(np.isnan(list(drift[now.name].values())))
    assert drift["ok"]["delta_norm"] == 0.0
    assert set(drift) == {now.name, "ok"}


def test_a_baseline_of_zeros_has_no_relative_change_and_no_rotation():
    baseline = Baseline.capture([matrix(torch.zeros(1, 8, 8)), Matrix("broken", "dense", (1, 8, 8), lambda: 1 / 0)])
    assert [item.name for item in baseline.matrices] == ["fc"]
    assert all(np.isnan(list(baseline.drift([matrix(draw(1, 8, 8))])["fc"].values())))


def test_the_number_of_directions_is_checked():
    with pytest.raises(InvalidArgument, match="Baseline: top must be an integer >= 1; got -1"):
        Baseline.capture([], top=-1)
    assert module.TOP == 8
