"""A plan says what an analysis would do, without reading a weight."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ww_monitor
from ww_monitor import description
from ww_monitor.description import Rates, describe, measured_rates, operations, plan_matrices
from ww_monitor.errors import InvalidArgument, MissingDependency
from ww_monitor.matrix import Matrix, Skipped

RATES = Rates(gram=1e9, solve=1e8)


def unreadable(name, shape, kind="dense"):
    return Matrix(name, kind, shape, lambda: pytest.fail("a weight was read"))


def model():
    return nn.Sequential(nn.Linear(40, 30), nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Embedding(50, 12))


def test_reads_no_weight():
    found = plan_matrices([unreadable("fc", (1, 30, 40))], rates=RATES)
    assert [row.name for row in found.rows] == ["fc"]


def test_plans_the_layers_that_analyze_analyses_and_skips_those_it_skips():
    options = {"exclude": ["3"], "min_size": 5, "max_size": 29}
    for chosen in ({}, options, {"include": ["0", "1"]}):
        found, done = describe(model(), **chosen), ww_monitor.analyze(model(), **chosen)
        assert [(row.name, row.shape) for row in found.rows] == [(layer.name, layer.shape) for layer in done.layers]
        assert [(item.name, item.reason) for item in found.skipped] == [
            (item.name, item.reason) for item in done.skipped
        ]


def test_a_model_on_the_meta_device_is_described_as_where_it_has_weights():
    """But for `analyze` it has none: there it stays left out."""
    with torch.device("meta"):
        unmade = model()
    found, expected = describe(unmade), describe(model())
    assert (found.rows, found.skipped) == (expected.rows, expected.skipped)
    assert {item.reason for item in ww_monitor.analyze(unmade).skipped} == {"on the meta device: no data"}


def test_a_row_has_the_shape_and_the_work_of_its_layer():
    (row,) = plan_matrices([unreadable("conv", (9, 8, 30), "conv")], rates=RATES).rows
    assert (row.long_side, row.short_side, row.num_eigenvalues) == (30, 8, 72)
    assert row.operations == pytest.approx(9 * (8 * 8 * 30 + 4 / 3 * 8**3))
    assert row.seconds == pytest.approx(9 * (8 * 8 * 30 / 1e9 + 4 / 3 * 8**3 / 1e8))


def test_totals_are_sums():
    found = plan_matrices([unreadable("a", (1, 30, 40)), unreadable("b", (1, 10, 10))], rates=RATES)
    assert found.num_eigenvalues == 40
    assert found.operations == sum(row.operations for row in found.rows)
    assert found.seconds == sum(row.seconds for row in found.rows)


def test_nothing_to_analyse_costs_nothing():
    found = plan_matrices([Skipped("x", "other", (3, 4), "integer weights")], rates=RATES)
    assert (found.num_eigenvalues, found.operations, found.seconds) == (0, 0, 0)
    assert "skipped x 3×4: integer weights" in str(found)


def test_prints_a_table_with_reasons_and_totals():
    text = str(plan_matrices([unreadable("fc", (1, 300, 600)), Skipped("e", "dense", (), "why")], rates=RATES))
    assert text.splitlines() == [
        "name  kind   role  shape    eigenvalues  seconds",
        "fc    dense        300×600  300          0.41",
        "skipped e : why",
        "1 matrices, 300 eigenvalues, 9e+07 operations, about 0.41 s (1 skipped)",
    ]


def test_the_rate_is_measured_once(monkeypatch):
    measured_rates.cache_clear()
    calls = []
    monkeypatch.setattr(description, "repeat", lambda run, **times: calls.append(run) or [0.5, 0.25])
    assert measured_rates() == measured_rates() == Rates(512**3 / 0.25, 4 / 3 * 512**3 / 0.25)
    assert len(calls) == 2
    measured_rates.cache_clear()


def test_the_measured_rate_is_a_rate():
    rates = describe(model()).rates
    assert 1e7 < rates.gram < 1e14
    assert 1e7 < rates.solve < 1e14


def test_the_measurement_leaves_the_random_streams_alone():
    measured_rates.cache_clear()
    before = torch.get_rng_state()
    measured_rates()
    assert torch.equal(torch.get_rng_state(), before)


def test_work_does_not_depend_on_which_side_is_longer():
    assert operations((2, 30, 70)) == operations((2, 70, 30))


def test_the_table_ends_with_what_is_skipped(monkeypatch):
    pytest.importorskip("pandas")
    found = plan_matrices([unreadable("a", (1, 30, 40)), Skipped("x", "other", (3, 4), "integer weights")], rates=RATES)
    table = found.to_pandas()
    assert list(table["skipped"]) == ["", "integer weights"]
    assert math.isnan(table["seconds"][1])
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingDependency, match=r"ww-monitor\[plots\]"):
        found.to_pandas()


def test_wrong_arguments_are_named():
    with pytest.raises(InvalidArgument, match="min_size must be an integer >= 1; got 0"):
        describe(model(), min_size=0)


def test_a_description_says_what_is_followed_of_each_kind_and_what_share_of_the_parameters_it_is():
    own = torch.nn.Module()
    own.kernel = torch.nn.Parameter(torch.zeros(40, 30))
    own.pos_embed = torch.nn.Parameter(torch.zeros(1, 10, 30))
    own.register_buffer("average", torch.zeros(500, 30))
    model = torch.nn.Sequential(torch.nn.Linear(40, 20), own, torch.nn.Linear(20, 4))
    whole = sum(parameter.numel() for parameter in model.parameters())
    found = describe(model)
    kinds = {one.kind: one for one in found.kinds}
    assert (kinds["dense"].followed, kinds["dense"].skipped) == (1, 1)
    assert kinds["dense"].share == pytest.approx(800 / whole)
    assert dict(kinds["dense"].reasons) == {"4 eigenvalues, fewer than min_size=8": 1}
    assert (kinds["parameter"].followed, kinds["parameter"].share) == (1, pytest.approx(1200 / whole))
    assert kinds["other"].share_skipped == pytest.approx(300 / whole)
    assert kinds["vector"].share_skipped == pytest.approx(24 / whole)
    assert found.share + sum(one.share_skipped for one in found.kinds) == pytest.approx(1.0)
    assert "parameter: 1 followed (49.9% of the parameters), 0 skipped (0.0%)" in str(found)
    assert "1 × a table of positions" in str(found)


@pytest.mark.parametrize("kind", ["module", "mapping", "nested", "torch", "safetensors"])
def test_shares_are_of_all_parameters_whatever_the_weights_are_in(kind, tmp_path):
    net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    if kind == "safetensors":
        save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pt")
    found = describe(
        {
            "module": net,
            "mapping": net.state_dict(),
            "nested": {"a": {"b": net.state_dict()}, "step": 3},
            "torch": str(tmp_path / "net.pt"),
            "safetensors": tmp_path / "net.safetensors",
        }[kind]
    )
    assert found.parameters == 1850
    assert [(one.kind, one.followed) for one in found.kinds] == [("dense", 2), ("vector", 0)]
    assert [one.share_skipped for one in found.kinds] == [0, pytest.approx(50 / 1850)]
    assert "vector: 2.7% of the parameters, which have no spectrum" in str(found)


def test_a_part_of_a_checkpoint_and_a_fused_weight_are_described_as_they_are_analysed(tmp_path):
    torch.save({"model": {"a.qkv": torch.zeros(60, 20)}, "ema": {"b.weight": torch.zeros(90, 30)}}, tmp_path / "c.pt")
    found = describe(tmp_path / "c.pt", part="ema", split={"b": 3})
    assert [(row.name, row.shape) for row in found.rows] == [(f"b.{i}", (1, 30, 30)) for i in range(3)]
    assert (found.parameters, found.share) == (2700, 1.0)
    with pytest.raises(InvalidArgument, match="part must be one of those in it; got 'x'"):
        describe(tmp_path / "c.pt", part="x")


def test_the_parameters_of_factors_are_those_of_the_delta_that_is_followed():
    tensors = {
        "a.fc.lora_A.weight": torch.zeros(8, 40),
        "a.fc.lora_B.weight": torch.zeros(30, 8),
        "b.lora_A": torch.zeros(8, 9),
    }
    found = {one.kind: one for one in describe(tensors).kinds}
    assert (found["dense"].followed, found["dense"].share) == (1, pytest.approx(560 / 632))
    assert (found["other"].skipped, found["other"].share_skipped) == (3, pytest.approx(72 / 632))
