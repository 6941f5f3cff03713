"""`preset="weightwatcher"` gives weightwatcher 0.7.7's columns digit for digit, wherever those are well defined."""

import math

import pytest
import torch
from torch import nn

from tests.reference.cases import CASES, number, published, rows_of
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


def test_every_case_of_the_reference_is_compared():
    assert list(CASES) == list(published()["cases"])
    assert len(CASES) == 28
    assert [case for case in CASES if not rows_of(case)] == ["one_nan_120x60"]
    assert set(EXCLUDED) <= set(CASES)


def same(found, expected):
    return found == pytest.approx(expected, rel=TOLERANCE, abs=0) or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("case", CASES)
def test_columns_equal_the_reference(case):
    excluded = EXCLUDED.get(case, ([], ""))[0]
    snapshot = analyze(CASES[case](), preset="weightwatcher")
    rows = rows_of(case)
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
def test_exclusions_are_needed(case):
    """Every excluded column differs, so that the table lists no more than it must."""
    snapshot = analyze(CASES[case](), preset="weightwatcher")
    rows = rows_of(case)
    if not rows:
        assert snapshot.layers[0].status == "not_finite"
        return
    equal = [c for c in EXCLUDED[case][0] if same(snapshot.layers[0].value(c), number(rows[0][c]))]
    assert not equal


def test_layers_beyond_the_reference_are_those_it_cannot_read():
    """Of the mixed model weightwatcher leaves out the recurrent and attention weights and the transposed kernel."""
    snapshot = analyze(CASES["mixed_model"](), preset="weightwatcher")
    known = {row["longname"] for row in rows_of("mixed_model")}
    beyond = {layer.name.split(".")[0] for layer in snapshot.layers if layer.name not in known}
    assert beyond == {"up", "lstm", "attn"}


RUN_ON_STATE_DICT = """
def answer(weightwatcher, path):
    import torch
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    watcher = weightwatcher.WeightWatcher(model=state)
    details = watcher.analyze(plot=False, savefig=False)
    rows = {row["longname"]: [row["alpha"], row["D"]] for row in details.to_dict("records")}
    return {"rows": rows, "alpha_weighted": watcher.get_summary(details)["alpha_weighted"]}
"""


def train_on_digits(path):
    """A small convolutional net after an epoch on real digits, saved as `{"state_dict": …}` with `module.` prefixes."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels / 16, dtype=torch.float32, device="cpu").reshape(-1, 1, 8, 8)
    labels = torch.as_tensor(labels, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 24, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)),
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for image, label in zip(images.split(32), labels.split(32), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(image), label).backward()
            optimizer.step()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, path)


CHECKPOINTS = {"digits": None, "resnet20-12fca82f.th": 4.092, "resnet32-d509ac18.th": 4.802}
"""A checkpoint that is trained here and two published ones, where they are beside the project: their mean alpha."""


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """The file of a trained model and the mean alpha that is known of it."""
    path = tmp_path_factory.mktemp("trained") / "digits.pt"
    if request.param == "digits":
        train_on_digits(path)
    else:
        path = request.getfixturevalue("shared") / "data" / request.param
    return path, CHECKPOINTS[request.param]


@pytest.fixture(scope="module")
def theirs(checkpoint, run_weightwatcher):
    """What weightwatcher says of the checkpoint."""
    return run_weightwatcher(RUN_ON_STATE_DICT, str(checkpoint[0]))


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
        modules[f"at_{name.removesuffix('.weight').replace('.', '_')}"] = module
    return nn.ModuleDict(modules)


def test_alpha_and_distance_of_a_trained_net_equal_weightwatchers(checkpoint, theirs):
    path, mean_alpha = checkpoint
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    snapshot = analyze(holder_of(state), preset="weightwatcher")
    assert [layer.name for layer in snapshot.layers] == [f"at_{name.replace('.', '_')}" for name in theirs["rows"]]
    for layer, (alpha, distance) in zip(snapshot.layers, theirs["rows"].values(), strict=True):
        assert layer.value("alpha") == pytest.approx(alpha, rel=TOLERANCE)
        assert layer.value("D") == pytest.approx(distance, rel=TOLERANCE)
    assert mean_alpha is None or snapshot.summary["alpha"] == pytest.approx(mean_alpha, abs=1e-3)


def test_the_mean_alpha_hat_of_a_checkpoint_is_weightwatchers(checkpoint, theirs):
    """Read from the file as it is, prefixes and all."""
    snapshot = analyze(checkpoint[0], preset="weightwatcher")
    assert snapshot.summary["alpha_weighted"] == pytest.approx(theirs["alpha_weighted"], rel=TOLERANCE)
