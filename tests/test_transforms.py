"""Transforms change what they say they change, only that, and nothing where a fit failed."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import ww_monitor
from tests.matrices import draw
from tests.reference.cases import published
from tests.reference.cases import trapped as gaussian_with_traps
from tests.registries import before_measurement
from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.spectra.elements import elements
from ww_monitor.transforms import _trap_directions, svd_sharpen, svd_smooth, transform_matrices

KEEPS = ["erg", "detX", "alpha", "spikes", 5, 0.3]


def linear(weights, dtype=torch.float32):
    weights = torch.as_tensor(weights)
    layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weights)
    return nn.Sequential(layer)


def spiked(rows, columns, spikes=3, seed=0):
    """Noise with planted singular values far above its edge."""
    left, right = (torch.linalg.qr(draw(side, spikes, seed=seed + k)).Q for k, side in ((1, rows), (2, columns)))
    strength = torch.linspace(4, 8, spikes, dtype=torch.float64) * (math.sqrt(rows) + math.sqrt(columns))
    return draw(rows, columns, seed=seed) + (left * strength) @ right.T


def trapped(rows=300, columns=100, headroom=2.0, traps=3, seed=0):
    """Noise with entries planted at a headroom, no two in one row or column."""
    w = draw(rows, columns, seed=seed)
    for k in range(traps):
        w[7 * k + 2, 5 * k + 1] = (headroom + 0.2 * k) * (rows * columns) ** 0.25 * (-1) ** k
    return w


def headroom(weights):
    return elements(weights.double()[None]).headroom.item()


def singular(weights):
    return torch.linalg.svdvals(weights.double())


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(first, second):
    assert list(first) == list(second)
    for key, value in first.items():
        assert torch.equal(value.nan_to_num(nan=7.0), second[key].nan_to_num(nan=7.0)), key
        assert value.dtype == second[key].dtype


# --- smoothing


@pytest.mark.parametrize(
    ("keep", "theirs"), [(40, "svd_0.5"), (0.5, "svd_0.5"), ("erg", "detX"), ("detX", "detX"), ("alpha", "alpha_min")]
)
def test_smoothing_keeps_what_weightwatcher_keeps(keep, theirs):
    expected = published()["smoothing"][theirs]
    net = linear(np.random.RandomState(50).standard_t(3, (120, 80)))
    result = svd_smooth(net, keep)
    values = singular(result.state_dict["0.weight"])
    assert int((values > 1e-4).sum()) == expected["rank"] == result.changed[0].kept
    assert values[:5].tolist() == pytest.approx(expected["top5"], rel=1e-5)
    assert values.norm().item() == pytest.approx(expected["frobenius"], rel=1e-4)  # theirs is randomised:
    assert values.norm().item() > (1 - 1e-6) * expected["frobenius"]  # no more than the optimum


def test_smoothing_is_the_best_approximation_of_its_rank():
    w = draw(40, 60)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    result = svd_smooth(linear(w, torch.float64), 7).state_dict["0.weight"]
    torch.testing.assert_close(result, (u[:, :7] * s[:7]) @ vh[:7])


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(8, 60),
    columns=st.integers(8, 60),
    keep=st.sampled_from(["erg", "spikes", 5, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_smoothing_twice_is_smoothing_once(seed, rows, columns, keep, dtype, scale):
    net = linear(scale * spiked(rows, columns, spikes=2, seed=seed), dtype)
    once = svd_smooth(net, keep, inplace=True).state_dict["0.weight"].clone()
    again = svd_smooth(net, keep)
    assert not again.changed
    assert torch.equal(again.state_dict["0.weight"], once)


def test_smoothing_twice_by_the_tail_of_a_long_spectrum_is_smoothing_once():
    tail = (torch.arange(1, 81, dtype=torch.float64) / 80) ** -0.5
    u, v = torch.linalg.qr(draw(400, 200)).Q, torch.linalg.qr(draw(200, 200, seed=1)).Q
    net = linear((u * torch.cat([tail, torch.linspace(0.9, 0.1, 120, dtype=torch.float64)])) @ v.T)
    assert svd_smooth(net, "alpha", inplace=True).changed[0].kept >= 20
    assert not svd_smooth(net, "alpha").changed


def test_spikes_are_what_is_kept_of_a_planted_spectrum():
    result = svd_smooth(linear(spiked(200, 100, spikes=4)), "spikes")
    assert [layer.kept for layer in result.changed] == [4]


def test_a_fit_of_a_kernel_counts_over_its_slices_together_and_a_number_counts_in_each():
    kernel = torch.stack([spiked(32, 24, 1, seed=0), 0.01 * draw(32, 24, seed=9)]).permute(1, 2, 0).unsqueeze(-2)
    conv = nn.Conv2d(24, 32, (1, 2), bias=False)
    with torch.no_grad():
        conv.weight.copy_(kernel)
    layer, plan = svd_smooth(conv, "spikes"), svd_smooth(conv, 3)
    ranks = [int((singular(layer.state_dict["weight"][:, :, 0, k]) > 1e-4).sum()) for k in range(2)]
    assert sum(ranks) == layer.changed[0].kept
    assert ranks[0] > ranks[1]
    assert [int((singular(plan.state_dict["weight"][:, :, 0, k]) > 1e-6).sum()) for k in range(2)] == [3, 3]
    assert (plan.changed[0].kept, plan.changed[0].of) == (6, 48)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_storage_precision_stays(dtype):
    result = svd_smooth(linear(draw(40, 30), dtype), 5)
    assert result.state_dict["0.weight"].dtype == dtype
    assert len(result.changed) == 1


@pytest.mark.parametrize("keep", KEEPS)
def test_a_layer_with_nothing_known_about_it_stays_bit_for_bit(keep):
    net = nn.Sequential(*(linear(w)[0] for w in (torch.zeros(30, 20), torch.full((30, 20), float("nan")))))
    before = snapshot(net)
    result = svd_smooth(net, keep, inplace=True)
    assert not result.changed
    assert all(layer.reason for layer in result.unchanged)
    assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize(
    ("weights", "keep", "reason"),
    [
        (torch.eye(40), "alpha", "gives no number of components: degenerate"),
        (draw(120, 60), "spikes", "gives no number of components: random_like"),
        (torch.eye(40), "erg", "gives no number of components: degenerate"),
        (draw(40, 3) @ draw(3, 30), 3, "the rest is no more than the rounding"),
        (draw(40, 30), 1.0, "the rest is no more than the rounding"),
        (draw(40, 30), 99, "the rest is no more than the rounding"),
        (draw(40, 5), 2, "5 eigenvalues, fewer than min_size=8"),
        (torch.full((9, 9), float("inf")), 2, "not finite"),
    ],
)
def test_an_unchanged_layer_says_why(weights, keep, reason):
    net = linear(weights)
    before = snapshot(net)
    (layer,) = svd_smooth(net, keep, inplace=True).unchanged
    assert reason in layer.reason
    assert_same_bits(net.state_dict(), before)


def test_a_layer_that_fails_costs_itself_only():
    good = draw(1, 20, 10)

    def fail(matrix, weights):
        raise RuntimeError("no convergence")

    items = [Matrix("fc", "dense", (1, 20, 10), lambda: good), Skipped("x", "other", (3, 3), "integer weights")]
    result = transform_matrices(items, {"w": good}, fail, inplace=True)
    assert [layer.reason for layer in result.layers] == ["error: RuntimeError: no convergence", "integer weights"]
    assert torch.equal(result.state_dict["w"], draw(1, 20, 10))


@pytest.mark.parametrize("keep", ["ERG", 0, -3, 0.0, 1.5, float("nan"), True, None])
def test_a_wrong_keep_is_named(keep):
    with pytest.raises(InvalidArgument, match=r"keep must be one of 'erg', .* in \(0, 1\]; got "):
        svd_smooth(nn.Linear(8, 8), keep)


# --- sharpening


def test_sharpening_removes_the_directions_that_weightwatcher_removes_where_traps_lead():
    expected = published()["sharpening"]
    net = linear(gaussian_with_traps(300, 100, 11))
    assert singular(net[0].weight.detach())[:6].tolist() == pytest.approx(expected["before"], rel=1e-5)
    after = singular(svd_sharpen(net).state_dict["0.weight"])
    assert after[:6].tolist() == pytest.approx(expected["after"], rel=1e-5)


@pytest.mark.parametrize("method", ["directions", "clip"])
@pytest.mark.parametrize(("rows", "columns"), [(300, 100), (100, 300), (200, 200)])
def test_planted_traps_are_gone(method, rows, columns):
    net = linear(trapped(rows, columns))
    assert headroom(net[0].weight) > 2
    result = svd_sharpen(net, method=method)
    after = result.state_dict["0.weight"]
    assert headroom(after) < 1
    assert ww_monitor.analyze(linear(after), metrics=["num_traps"]).layers[0].value("num_traps") == 0
    (layer,) = result.changed
    expected = (min(rows, columns) - 3, min(rows, columns)) if method == "directions" else (rows * columns - 3,) * 1
    assert (layer.kept, layer.of)[: len(expected)] == expected


def test_learnt_directions_stay_though_they_are_larger_than_the_traps():
    w = spiked(300, 100, spikes=2)
    w[11, 13] += 2.5 * 30_000**0.25
    before, after = singular(w), singular(svd_sharpen(linear(w)).state_dict["0.weight"])
    assert after[:2].tolist() == pytest.approx(before[:2].tolist(), rel=1e-5)
    assert after[2] < before[2] * 0.9
    assert headroom(svd_sharpen(linear(w)).state_dict["0.weight"]) < 1


def test_equal_traps_that_share_their_directions_are_found_together():
    w = 0.01 * draw(200, 200)
    for k in range(6):
        w[20 * k, 10 * k] = 1.0
    result = svd_sharpen(linear(w))
    assert headroom(result.state_dict["0.weight"]) < 1
    assert result.changed[0].kept == 194


def test_no_more_directions_are_removed_than_there_are_traps_and_the_most_concentrated_go_first():
    w = trapped(200, 200, headroom=3.0)
    is_trap = w.abs() > 200**0.5
    one, count = _trap_directions(w[None], torch.where(is_trap, w, 0.0)[None], most=1)
    assert count == 1
    assert int(one[0].abs().argmax()) == int(w.abs().argmax())


def test_small_singular_directions_stay_whatever_their_share_of_a_trap():
    w = draw(600, 600)
    w[5, 7] = 1.5 * 600**0.5  # a share of 0.38 in its own direction, and of 0.90 in the last one, by cancellation
    before, after = singular(w), singular(svd_sharpen(linear(w, torch.float64)).state_dict["0.weight"])
    torch.testing.assert_close(after[:-1], before[1:])
    assert after[-1] < 1e-9


@pytest.mark.parametrize("strength", [1.5, 2.0, 3.0])
def test_the_share_of_a_lone_trap_is_that_of_the_theory(strength):
    w = draw(600, 600)
    w[5, 7] = strength * 600**0.5
    traps = torch.zeros_like(w)
    traps[5, 7] = w[5, 7]
    u, s, vh = torch.linalg.svd(w)
    share = ((u.T @ traps) * vh).sum(1) / s
    assert share[0].item() == pytest.approx((strength**2 - 1) / (strength**2 + 1), abs=0.06)


def test_traps_in_one_row_are_one_direction():
    w = draw(200, 200)
    w[5, [3, 50, 120]] = 2.0 * 200**0.5
    result = svd_sharpen(linear(w))
    assert result.changed[0].kept == 199
    assert headroom(result.state_dict["0.weight"]) < 1


def test_clipping_touches_the_trap_entries_only():
    net = linear(trapped())
    before, after = net[0].weight.detach(), svd_sharpen(net, method="clip").state_dict["0.weight"]
    moved = (before != after).nonzero().tolist()
    assert moved == [[2, 1], [9, 6], [16, 11]]
    assert after[2, 1] > 0 > after[9, 6]


@pytest.mark.parametrize("method", ["directions", "clip"])
@pytest.mark.parametrize(
    "weights",
    [draw(200, 100), spiked(200, 100), draw(200, 100) + 0.5, torch.zeros(20, 20), trapped(traps=1, headroom=0.9)],
    ids=["noise", "learnt", "mean", "zero", "near"],
)
def test_a_healthy_layer_stays_bit_for_bit(weights, method):
    net = linear(weights)
    before = snapshot(net)
    result = svd_sharpen(net, method=method, inplace=True)
    assert [layer.reason for layer in result.layers] == ["no traps"]
    assert_same_bits(net.state_dict(), before)


def test_a_trap_too_weak_to_have_a_direction_is_left_and_reported():
    net = linear(trapped(200, 200, headroom=1.2, traps=1, seed=3))
    before = snapshot(net)
    (layer,) = svd_sharpen(net).layers
    assert layer.reason == "no singular direction is concentrated on its traps; method='clip' removes them"
    assert_same_bits(net.state_dict(), before)
    assert headroom(svd_sharpen(net, method="clip").state_dict["0.weight"]) < 1


def test_a_wrong_method_is_named():
    with pytest.raises(InvalidArgument, match="method must be one of 'directions', 'clip'; got 'zero'"):
        svd_sharpen(nn.Linear(8, 8), method="zero")


def test_the_seed_is_that_of_the_shuffles(monkeypatch):
    definitions = before_measurement(monkeypatch, "shuffled", lambda loaded: None)
    svd_sharpen(linear(trapped()), seed=5)
    assert {one.seed for one in definitions} == {5}


# --- where the weights are


class Several(nn.Module):
    """Every way a weight is stored: plain, tied, fused, recurrent, a kernel, and computed ones."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(24, 4)
        self.recurrent = nn.LSTM(24, 16)
        self.conv = nn.Conv2d(16, 12, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(24, 24))
        self.pruned = nn.Linear(24, 24)
        prune.random_unstructured(self.pruned, "weight", 0.5)
        self.register_buffer("counter", torch.tensor(3))


def test_fused_recurrent_tied_and_kernel_weights_are_written_through_and_computed_ones_are_listed():
    net = Several()
    before = snapshot(net)
    result = svd_smooth(net, 4)
    assert_same_bits(net.state_dict(), before)
    assert {layer.name: layer.reason for layer in result.unchanged} == {
        "head": "tied to embed",
        "normed": "its weights are computed, not stored in one tensor",
        "pruned": "its weights are computed, not stored in one tensor",
    }
    new = result.state_dict
    assert list(new) == list(before)
    assert torch.equal(new["head.weight"], new["embed.weight"])
    other = Several()
    other.load_state_dict(new)
    changed = {layer.name for layer in result.changed}
    assert {"attention.q", "attention.out_proj", "recurrent.weight_hh_l0.f", "conv"} <= changed
    for item in ww_monitor.walk.torch.walk(other):
        if isinstance(item, Matrix) and item.name in changed:
            assert (torch.linalg.svdvals(item.load().double())[:, 4:] < 1e-5).all(), item.name
    same = [key for key, value in before.items() if torch.equal(value, new[key])]
    assert all("weight" not in key or key.split(".")[0] in ("normed", "pruned") for key in same)


def test_a_state_dict_is_transformed_as_its_model_is():
    net = nn.Sequential(linear(trapped())[0], nn.Conv2d(16, 12, 3), nn.LSTM(24, 16))
    for transform in (svd_sharpen, svd_smooth):
        from_module, from_state = transform(net), transform(net.state_dict())
        assert {layer.name: layer.kept for layer in from_state.changed}["0"] == from_module.changed[0].kept
        assert torch.equal(from_state.state_dict["0.weight"], from_module.state_dict["0.weight"])
        assert not torch.equal(from_state.state_dict["0.weight"], net[0].weight)


def test_a_copy_shares_no_memory_with_the_model():
    net = Several()
    live = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    for result in (svd_smooth(net, 4), svd_sharpen(net)):
        assert not live & {value.untyped_storage().data_ptr() for value in result.state_dict.values()}


def test_in_place_writes_into_the_parameters_what_the_copy_holds():
    net = Several()
    copied = svd_smooth(net, 4).state_dict
    parameters = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()}
    result = svd_smooth(net, 4, inplace=True)
    assert parameters == {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()}
    assert_same_bits(net.state_dict(), copied)
    assert_same_bits(result.state_dict, copied)


def test_weights_that_are_not_contiguous_are_written_where_they_are():
    net = nn.Sequential(OrderedDict(fc=nn.Linear(30, 20, bias=False)))
    wide = draw(30, 25).float()
    net.fc.weight = nn.Parameter(wide.T[:20])
    assert not net.fc.weight.is_contiguous()
    result = svd_smooth(net, 4).state_dict["fc.weight"]
    expected = svd_smooth(linear(wide.T[:20]), 4).state_dict["0.weight"]
    torch.testing.assert_close(result, expected)
    sliced = nn.Parameter(draw(20, 60).float()[:, ::2])
    net.fc.weight = sliced
    torch.testing.assert_close(
        svd_smooth(net, 4).state_dict["fc.weight"], svd_smooth(linear(sliced.detach()), 4).state_dict["0.weight"]
    )


@pytest.mark.parametrize("transform", [svd_smooth, svd_sharpen])
def test_patterns_choose_the_layers_and_the_random_stream_stays(transform):
    net = nn.Sequential(*(linear(trapped(60, 40, seed=k))[0] for k in range(3)))
    state = torch.get_rng_state()
    assert [layer.name for layer in transform(net, exclude=["1"]).changed] == ["0", "2"]
    assert [layer.name for layer in transform(net, include=["1"]).changed] == ["1"]
    assert torch.equal(torch.get_rng_state(), state)


def test_only_models_can_be_transformed():
    with pytest.raises(InvalidArgument, match=r"model must be a torch.nn.Module or its state dict; got str"):
        svd_smooth("model.safetensors")
