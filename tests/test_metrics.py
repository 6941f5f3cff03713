"""Every standard metric is its definition, written out on plain numbers; every verdict has a spectrum that earns it."""

import math

import numpy as np
import pytest
import torch

from ww_monitor import InvalidArgument, analyze, metrics
from ww_monitor.metric import MEASUREMENTS, TABLE, choose


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def planted(eigenvalues, rows, *, seed=0):
    """rows × n with these eigenvalues."""
    n = len(eigenvalues)
    left, right = np.linalg.qr(normal(rows, n, seed=seed))[0], np.linalg.qr(normal(n, n, seed=seed + 1))[0]
    return (left * np.sqrt(eigenvalues)) @ right.T


def pareto(alpha, n):
    """Mid-point quantiles of a density ∝ x^-alpha on x ≥ 1."""
    return (1 - (np.arange(n) + 0.5) / n) ** (-1 / (alpha - 1))


def layer_of(weight, **options):
    return analyze({"fc.weight": torch.as_tensor(weight)}, **options)["fc"]


HEAVY = planted(pareto(2.5, 80), 120) + 0.01


def definitions():
    """Metric → value on HEAVY, from its definition; alpha, xmin and the bulk are taken as found."""
    layer = layer_of(HEAVY)
    value = np.linalg.svd(HEAVY, compute_uv=False)[::-1] ** 2
    alpha, xmin = layer.value("alpha"), layer.value("xmin")
    tail = value[value >= xmin * (1 - 1e-12)]
    k = len(tail)
    p = value / value.sum()
    cumulative = np.arange(k) / k
    std = layer.value("bulk_std")
    centred = HEAVY - HEAVY.mean()
    product = np.cumsum(np.log(value[::-1] / value.mean()))
    space = int(np.argmax(product < 0)) + 1
    reach = HEAVY.size**0.25
    bulk_entries = np.abs(centred) <= reach * centred.std()
    return layer, {
        "alpha": 1 + k / np.log(tail / xmin).sum(),
        "sigma": (alpha - 1) / math.sqrt(k),
        "ks": np.abs(1 - (tail / xmin) ** (1 - alpha) - cumulative).max(),
        "xmin": tail[0],
        "n_tail": k,
        "alpha_hat": alpha * math.log10(value[-1]),
        "log_alpha_norm": math.log10((value**alpha).sum()),
        "log_norm": math.log10((HEAVY**2).sum()),
        "log_spectral_norm": 2 * math.log10(np.linalg.norm(HEAVY, 2)),
        "stable_rank": (HEAVY**2).sum() / np.linalg.norm(HEAVY, 2) ** 2,
        "entropy": -(p * np.log(p)).sum() / math.log(80),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "rms_norm": np.linalg.norm(HEAVY, 2) * math.sqrt(80 / 120),
        "num_spikes": (value > value[-1 - int(layer.value("num_spikes"))]).sum(),
        "mp_softrank": layer.value("bulk_max") / value[-1],
        "bulk_min": std**2 * (math.sqrt(120) - math.sqrt(80)) ** 2,
        "bulk_max": std**2 * (math.sqrt(120) + math.sqrt(80)) ** 2,
        "matrix_rank": 80,
        "rank_loss": 0,
        "erg_num": space,
        "erg_lambda": value[-space],
        "erg_gap": space - k,
        "mean_shift": abs(HEAVY.mean()) * reach / np.sqrt((centred[bulk_entries] ** 2).mean()),
        "trap_headroom": np.abs(centred).max() / (reach * np.sqrt((centred[bulk_entries] ** 2).mean())),
    }


LAYER, EXPECTED = definitions()


@pytest.mark.parametrize("name", EXPECTED)
def test_metric_is_its_definition(name):
    assert LAYER.value(name) == pytest.approx(EXPECTED[name], rel=1e-9)


def test_every_standard_metric_is_tested_by_its_definition():
    """Tracy–Widom p-values and shuffled spectra have their slow twins in tests/spectra, the drift in tests/monitor."""
    elsewhere = {"spectral_drift", "spike_p_value", "bulk_std", "num_traps", "trap_severity", "trap_p_value"}
    assert {entry.name for entry in metrics() if entry.standard} == EXPECTED.keys() | elsewhere


def spiked_noise():
    return normal(200, 100) + planted(np.r_[np.zeros(92), np.linspace(1500, 4000, 8)], 200, seed=5)


def dead_columns(count):
    weight = normal(60, 50)
    weight[:, :count] = 0.0
    return weight


def clustered():
    """Two clusters of eigenvalues and nothing between, the upper one uniform: no power law."""
    return planted(np.r_[np.linspace(1, 1.3, 200), np.linspace(90, 100, 200)], 500)


VERDICTS = {
    "not_finite": np.full((60, 50), np.nan),
    "zero": np.zeros((60, 50)),
    "degenerate": np.eye(60)[:, :50],
    "rank_deficient": dead_columns(26),
    "few_eigenvalues": spiked_noise()[:, :19],
    "random_like": normal(200, 100),
    "poor_fit": clustered(),
    "ok": planted(pareto(2.5, 200), 400),
}


@pytest.mark.parametrize(("verdict", "weight"), VERDICTS.items(), ids=VERDICTS)
def test_each_verdict_has_a_spectrum_that_earns_it(verdict, weight):
    assert layer_of(weight).verdict == verdict
    if verdict not in ("zero", "not_finite"):
        assert layer_of(1e-12 * weight).verdict == verdict


def with_dependent_rows(how):
    free = normal(32, 128)
    return {
        "copies": np.r_[free, free],
        "three copies": np.r_[free[:21], free[:21], free[:21]],
        "multiples": np.r_[free, -2 * free],
        "some copies": np.r_[normal(48, 128), free[:8], free[:8]],
        "zeros": np.r_[free, 0 * free],
        "sums": np.r_[free, free[:16] + free[16:]],
        "mixtures": np.r_[free, normal(20, 32, seed=1) @ free],
        "copies and zeros": np.r_[normal(44, 128), normal(44, 128)[:8], 0 * free[:4]],
        "copied columns": np.c_[normal(128, 32), normal(128, 32)],
    }[how]


@pytest.mark.parametrize("how", ["copies", "three copies", "multiples", "some copies", "zeros", "copies and zeros"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_copied_rows_are_no_spikes_in_any_precision(how, dtype):
    layer = layer_of(torch.as_tensor(with_dependent_rows(how)).to(dtype))
    assert (layer.verdict, math.isnan(layer.value("num_spikes"))) == ("rank_deficient", True)


@pytest.mark.parametrize("how", ["sums", "mixtures", "copied columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dependent_rows_are_no_spikes(how, dtype):
    layer = layer_of(torch.as_tensor(with_dependent_rows(how)).to(dtype))
    assert (layer.verdict, math.isnan(layer.value("num_spikes"))) == ("rank_deficient", True)


@pytest.mark.parametrize(
    ("weight", "rank"),
    [
        (normal(64, 128) - normal(64, 128).mean(0), 63),  # rows that sum to zero, as those of a head that began at zero
        (np.r_[normal(63, 128), normal(63, 128)[:1]], 63),
        (np.r_[normal(44, 128), np.zeros((20, 128))], 44),
    ],
    ids=["one constraint", "one copy", "pruned rows"],
)
def test_a_layer_that_lacks_one_mode_or_has_been_pruned_keeps_its_bulk(weight, rank):
    layer = layer_of(weight)
    assert (layer.verdict, layer.value("matrix_rank"), layer.value("num_spikes")) == ("random_like", rank, 0)


def test_rounding_makes_no_square_matrix_deficient():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert layer_of(torch.as_tensor(normal(256, 256)).to(dtype)).verdict == "random_like"


THIN = {
    "depthwise": torch.nn.Conv2d(48, 48, 5, groups=48),
    "depthwise, many taps": torch.nn.Conv1d(48, 48, 31, groups=48),
    "narrow groups": torch.nn.Conv2d(64, 64, 3, groups=16),
    "on colours": torch.nn.Conv2d(3, 64, 7),
}


@pytest.mark.parametrize("kernel", THIN.values(), ids=THIN)
def test_a_kernel_of_thin_slices_adds_its_norms_and_no_exponent(kernel):
    """Its few entries are heavy-tailed here, of which a fit to the pooled norms makes an over-trained layer."""
    with torch.no_grad():
        kernel.weight.copy_(kernel.weight.sign() * (kernel.weight.abs() / kernel.weight.abs().max()) ** 6)
    other = torch.nn.Linear(96, 64)
    snapshot = analyze(torch.nn.ModuleDict({"thin": kernel, "other": other}))
    layer, plain = snapshot["thin"], analyze(torch.nn.ModuleDict({"other": other}))
    assert layer.verdict == "thin_slices"
    for name in ("alpha", "alpha_hat", "n_tail", "erg_gap", "entropy", "effective_rank"):
        assert snapshot.summary[name] == pytest.approx(plain.summary[name], nan_ok=True), name
    assert snapshot.summary["log_norm"] != plain.summary["log_norm"]
    assert not [finding for finding in snapshot.findings if finding.layer == "thin"]
    weight = kernel.weight.detach().double()
    assert layer.value("log_norm") == pytest.approx(math.log10(weight.square().sum() / 2))
    slices = weight.flatten(2).permute(2, 0, 1)
    largest = torch.linalg.matrix_norm(slices, 2).max() ** 2 / 2
    assert layer.value("log_spectral_norm") == pytest.approx(math.log10(largest))


def test_the_weightwatcher_preset_averages_the_exponents_of_thin_slices_too():
    snapshot = analyze(THIN["depthwise"], preset="weightwatcher")
    assert snapshot.summary["alpha"] == snapshot.layers[0].value("alpha")
    assert snapshot.layers[0].verdict == "thin_slices"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_rank_is_judged_by_the_storage_precision(dtype):
    """A product of rank 30 of 80 rounded to storage precision has the rank 30, and Gaussian noise has full rank."""
    product = torch.as_tensor(normal(120, 30) @ normal(30, 80, seed=1)).to(dtype)
    layer = layer_of(product)
    assert (layer.value("matrix_rank"), layer.value("rank_loss"), layer.verdict) == (30, 50, "rank_deficient")
    assert layer_of(torch.as_tensor(normal(120, 80)).to(dtype)).value("matrix_rank") == 80


def test_an_orthogonal_layer_has_no_alpha_that_could_enter_a_mean():
    """Rounding makes its eigenvalues differ by 1e-7, of which a fit would make an alpha of millions."""
    orthogonal = torch.as_tensor(np.linalg.qr(normal(60, 50))[0]).float()
    for options in ({}, {"fit": "hill"}, {"fix_fingers": "clip_xmax"}, {"aspect_ratio": 1.0}):
        layer = layer_of(orthogonal, **options)
        assert (layer.status, layer.verdict) == ("degenerate", "degenerate")
        assert math.isnan(layer.value("alpha"))


@pytest.mark.parametrize("weight", [np.ones((60, 50)), np.outer(normal(60), normal(50, seed=1)), dead_columns(40)])
def test_a_bulk_of_rounding_errors_is_not_known(weight):
    layer = layer_of(torch.as_tensor(weight).float())
    for name in ("num_spikes", "spike_p_value", "mp_softrank", "bulk_std", "bulk_min", "bulk_max"):
        assert math.isnan(layer.value(name)), name


@pytest.mark.parametrize("preset", TABLE)
def test_every_metric_says_what_it_is(preset):
    for entry in metrics(preset):
        assert entry.definition
        assert entry.definition.endswith(".")
        assert entry.unit
        assert entry.source
        assert entry.needs in ("", *MEASUREMENTS)


def test_choose_gives_the_standard_ones_all_or_those_named():
    standard, every = choose(None, "default"), choose("all", "default")
    assert {entry.name for entry in standard} < {entry.name for entry in every}
    assert all(entry.standard for entry in standard)
    assert [entry.name for entry in choose(["ks", "alpha"], "default")] == ["ks", "alpha"]
    assert [entry.name for entry in choose("ks", "default")] == ["ks"]
    assert "raw_alpha" in {entry.name for entry in choose(None, "default", options=["fingers"])}
    with pytest.raises(InvalidArgument, match="preset must be one of 'default', 'weightwatcher'; got 'other'"):
        metrics("other")


@pytest.mark.parametrize("preset", TABLE)
def test_all_metrics_are_computed_and_known_on_a_healthy_layer(preset):
    options = {"fit": "truncated"} if preset == "default" else {}
    layer = layer_of(HEAVY, preset=preset, metrics="all", **options)
    unknown = {name for name, value in layer.metrics.items() if math.isnan(value)}
    assert list(layer.metrics) == [entry.name for entry in metrics(preset)]
    assert unknown <= {"sigma", "trap_severity", "trap_p_value", "spectral_drift"}


@pytest.mark.parametrize(
    ("eigenvalues", "expected"),
    [([1.0] * 8, 8.0), ([1.0] + [0.0] * 7, 1.0), ([3.0, 1.0] + [0.0] * 6, 4 / 3**0.75)],
)
def test_the_effective_rank_counts_equal_modes(eigenvalues, expected):
    weight = torch.zeros(8, 12, dtype=torch.float64)
    weight[:, :8] = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64).sqrt())
    assert layer_of(weight).value("effective_rank") == pytest.approx(expected, rel=1e-12)


def with_weight(layer, value=0.5):
    """Every entry of every slice is the same: σmax = value √(rows · columns)."""
    with torch.no_grad():
        layer.weight.fill_(value)
    return layer


RMS = {
    "linear": (torch.nn.Linear(32, 8), 0.5 * 32),  # a mean of 32 equal inputs, times 32
    "convolution": (torch.nn.Conv2d(32, 8, 3), 0.5 * 32),
    "transposed convolution": (torch.nn.ConvTranspose2d(32, 8, 3), 0.5 * 32),
    "embedding": (torch.nn.Embedding(32, 8), math.nan),
}


@pytest.mark.parametrize(("layer", "expected"), RMS.values(), ids=RMS)
def test_the_rms_norm_is_from_inputs_to_outputs_however_the_weight_is_stored(layer, expected):
    (row,) = analyze(with_weight(layer)).layers
    assert row.value("rms_norm") == pytest.approx(expected, rel=1e-6, nan_ok=True)


GROUPED = {
    "groups": torch.nn.Conv1d(32, 64, 1, groups=2, bias=False),
    "more groups": torch.nn.Conv1d(32, 64, 1, groups=4, bias=False),
    "narrowing": torch.nn.Conv1d(64, 32, 1, groups=4, bias=False),
    "transposed": torch.nn.ConvTranspose1d(32, 64, 1, groups=4, bias=False),
    "depthwise": torch.nn.Conv1d(16, 32, 1, groups=16, bias=False),
    "one group": torch.nn.Conv1d(32, 64, 1, bias=False),
}


@pytest.mark.parametrize("layer", GROUPED.values(), ids=GROUPED)
def test_the_rms_norm_of_a_grouped_convolution_is_that_of_what_it_computes(layer):
    """Its operator, block diagonal, from the outputs of all unit vectors."""
    with torch.no_grad():
        operator = layer(torch.eye(layer.in_channels)[:, :, None])[:, :, 0].T
    sigma = torch.linalg.matrix_norm(operator.double(), 2).item()
    beside = torch.nn.Conv1d(*reversed(layer.weight.shape[:2]), 1)  # whose matrix has the same shape
    row = analyze(torch.nn.Sequential(layer, beside), min_size=1).layers[0]
    assert row.value("rms_norm") == pytest.approx(sigma * math.sqrt(layer.in_channels / layer.out_channels), rel=1e-6)


def test_the_groups_of_a_kernel_change_no_other_metric():
    torch.manual_seed(0)
    grouped, plain = torch.nn.Conv2d(64, 48, 3, groups=4), torch.nn.Conv2d(16, 48, 3)
    with torch.no_grad():
        plain.weight.copy_(grouped.weight)
    one, other = ({**analyze(layer).layers[0].metrics} for layer in (grouped, plain))
    blocks = grouped.weight.detach().double().reshape(4, 12, 16, 9).movedim(-1, 1).flatten(0, 1)
    assert one.pop("rms_norm") == pytest.approx(math.sqrt(16 / 12) * torch.linalg.matrix_norm(blocks, 2).max().item())
    assert other.pop("rms_norm") > 0
    assert one == pytest.approx(other, nan_ok=True)


@pytest.mark.parametrize("name", ["c_fc", "c_proj", "c_attn", "fc"])
def test_the_rms_norm_of_weights_that_gpt2_stores_inputs_first(name):
    """One input is repeated on all outputs: by GPT-2's names also in a file, where only the shape tells."""
    inputs, outputs = {"c_fc": (16, 64), "c_proj": (64, 16), "c_attn": (16, 48), "fc": (16, 64)}[name]
    stored = (outputs, inputs) if name == "fc" else (inputs, outputs)
    rows = analyze({f"h.0.{name}.weight": torch.full(stored, 0.5)}).layers
    assert [row.value("rms_norm") for row in rows] == pytest.approx([0.5 * inputs] * (3 if name == "c_attn" else 1))
