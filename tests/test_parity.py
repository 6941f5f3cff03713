"""`preset="weightwatcher"` gives weightwatcher 0.7.7's columns digit for digit, wherever those are well defined."""

import json
import math
import runpy
import sys
import types

import pytest
import torch
from torch import nn

from ww_monitor import analyze

TOLERANCE = 1e-9

COLUMNS = [
    "alpha", "D", "sigma", "xmin", "xmax", "num_pl_spikes",
    "norm", "log_norm", "spectral_norm", "log_spectral_norm", "stable_rank", "alpha_weighted", "log_alpha_norm",
    "entropy", "matrix_rank", "rank_loss", "weak_rank_loss", "sv_max", "sv_min", "lambda_max", "num_evals",
    "sigma_mp", "num_spikes", "mp_softrank", "bulk_min", "bulk_max", "W_scale",
    "detX_num", "num_ERG_spikes", "detX_val", "detX_val_unrescaled", "ERG_gap",
]  # fmt: skip

FIT = ["alpha", "D", "sigma", "xmin", "num_pl_spikes", "log_alpha_norm", "ERG_gap"]
DEFINED_FOR_ZERO = ["num_evals", "xmax", "stable_rank", "entropy", "detX_val", "detX_val_unrescaled"]

EXCLUDED = {
    "scaled_1e-3_t3": (["sigma"], "B19: three fitted eigenvalues, and sigma keeps a stale negative value"),
    "identity_60": ([*FIT, "xmax"], "a tail of ties has an infinite alpha there, and none here"),
    "scaled_1e-5_t3": ([*FIT, "alpha_weighted"], "B2: a failed fit is -1 there, NaN here"),
    "zeros_60x40": (
        [column for column in COLUMNS if column not in DEFINED_FOR_ZERO],
        "B2: -1, 0 and infinities there; here a zero matrix has the status `zero` and no numbers",
    ),
    "rank30_120x80": (
        ["sv_min", "detX_val", "detX_val_unrescaled"],
        "1e-8 of sv_max: each solver's own rounding, equal to 1e-8; the correlation space ends there",
    ),
    "conv2x2_64_32": (
        ["sigma_mp", "num_spikes", "mp_softrank", "bulk_min", "bulk_max"],
        "B4: an even number of slices with out < in exchanges N and M",
    ),
    "one_nan_120x60": (COLUMNS, "B7: one NaN raises there"),
}
"""Case → the columns in which that tool's own result is not well defined, and why."""

TIED = {("mixed_model", "head"): "emb"}
"""A weight that two modules share is listed twice there and once here, under its first name."""


@pytest.fixture(scope="module")
def reference(shared):
    return json.loads((shared / "reference" / "ww_reference.json").read_text())["cases"]


@pytest.fixture(scope="module")
def builders(shared):
    """The models of the reference; its script imports weightwatcher, which building them does not need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "weightwatcher", types.ModuleType("weightwatcher"))
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MPLBACKEND"):
            patch.setenv(variable, "1" if variable != "MPLBACKEND" else "Agg")
        return runpy.run_path(str(shared / "reference" / "ww_reference.py"))["CASES"]


CASES = [
    "gauss_300x100", "gauss_square_128", "student_t3_400x200", "student_t1.5_300x150", "planted_alpha_1.5",
    "planted_alpha_2", "planted_alpha_3", "planted_alpha_5", "lowrank_noise_500x200", "square_spikes_200",
    "trap_400x120", "trap_200x60", "conv3x3_64_128", "conv2x2_64_32", "tiny_8x8", "tiny_60x12", "tall_1000x8",
    "rank30_120x80", "zero_columns_100x60", "one_nan_120x60", "bfloat16_256x128", "float16_256x128",
    "scaled_1e-3_t3", "scaled_1e-5_t3", "zeros_60x40", "identity_60", "fingers_120x60", "mixed_model",
]  # fmt: skip


def test_every_case_of_the_reference_is_compared(reference, builders):
    assert set(CASES) == set(reference) == set(builders)
    assert set(EXCLUDED) <= set(CASES)


def number(value):
    """A column of the file: NaN and infinities are strings there, an unset xmax is null."""
    return math.nan if value is None else float(value)


def same(found, expected):
    return found == pytest.approx(expected, rel=TOLERANCE, abs=0) or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("case", CASES)
def test_columns_equal_the_reference(reference, builders, case):
    excluded = EXCLUDED.get(case, ([], ""))[0]
    snapshot = analyze(builders[case][0](), preset="weightwatcher")
    rows = reference[case]["runs"]["plain"].get("rows", [])
    theirs = {TIED.get((case, row["longname"]), row["longname"]): row for row in rows}
    if rows:
        assert {layer.name for layer in snapshot.layers} >= theirs.keys()
    wrong = {}
    for name, row in theirs.items():
        for column in COLUMNS:
            found, expected = snapshot[name].value(column), number(row[column])
            if column not in excluded and not same(found, expected):
                wrong[name, column] = (found, expected)
    assert not wrong


@pytest.mark.parametrize("case", EXCLUDED)
def test_exclusions_are_needed(reference, builders, case):
    """Every excluded column differs, so that the table lists no more than it must."""
    snapshot = analyze(builders[case][0](), preset="weightwatcher")
    rows = reference[case]["runs"]["plain"].get("rows")
    if rows is None:
        assert snapshot.layers[0].status == "not_finite"
        return
    equal = [c for c in EXCLUDED[case][0] if same(snapshot.layers[0].value(c), number(rows[0][c]))]
    assert not equal


def test_layers_beyond_the_reference_are_those_it_cannot_read(reference, builders):
    """Of the mixed model weightwatcher leaves out the recurrent and attention weights and the transposed kernel."""
    snapshot = analyze(builders["mixed_model"][0](), preset="weightwatcher")
    known = {row["longname"] for row in reference["mixed_model"]["runs"]["plain"]["rows"]}
    beyond = {layer.name.split(".")[0] for layer in snapshot.layers if layer.name not in known}
    assert beyond == {"up", "lstm", "attn"}


RUN_ON_STATE_DICT = """
def answer(weightwatcher, path):
    import torch
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    details = weightwatcher.WeightWatcher(model=state).analyze(plot=False, savefig=False)
    return {row["longname"]: [row["alpha"], row["D"]] for row in details.to_dict("records")}
"""


def holder_of(state):
    """A module for each kernel and matrix, under its name with dots made underscores."""
    modules = {}
    for name, tensor in state.items():
        if not name.endswith(".weight") or tensor.ndim not in (2, 4):
            continue
        if tensor.ndim == 4:
            module = nn.Conv2d(tensor.shape[1], tensor.shape[0], tuple(tensor.shape[2:]), bias=False)
        else:
            module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        module.weight = nn.Parameter(tensor)
        modules[name.removesuffix(".weight").replace(".", "_")] = module
    return nn.ModuleDict(modules)


@pytest.mark.parametrize(
    ("file", "mean_alpha"), [("resnet20-12fca82f.th", 4.092), ("resnet32-d509ac18.th", 4.802)], ids=["20", "32"]
)
def test_alpha_and_distance_of_trained_resnets_equal_weightwatchers(shared, run_weightwatcher, file, mean_alpha):
    path = shared / "data" / file
    theirs = run_weightwatcher(RUN_ON_STATE_DICT, str(path))
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    snapshot = analyze(holder_of(state), preset="weightwatcher")
    assert [layer.name for layer in snapshot.layers] == [name.replace(".", "_") for name in theirs]
    for layer, (alpha, distance) in zip(snapshot.layers, theirs.values(), strict=True):
        assert layer.value("alpha") == pytest.approx(alpha, rel=TOLERANCE)
        assert layer.value("D") == pytest.approx(distance, rel=TOLERANCE)
    assert snapshot.summary["alpha"] == pytest.approx(mean_alpha, abs=1e-3)
