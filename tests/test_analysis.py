"""`analyze`: a bad weight costs itself only, bad arguments are named, and every option does something."""

import inspect
import math

import pytest
import torch
from torch import nn

import ww_monitor
from tests.matrices import normal
from ww_monitor import InvalidArgument, LayerError, analyze


def linear(weight):
    holder = nn.Linear(1, 1, bias=False)
    holder.weight = nn.Parameter(weight, requires_grad=False)
    return holder


def model(**weights):
    return nn.ModuleDict({name: linear(weight) for name, weight in weights.items()})


def spiked(rows, columns, *, seed=0):
    """Gaussian with a planted heavy tail, so that a fit is worth making."""
    left = torch.linalg.qr(normal(rows, 12, seed=seed + 1)).Q
    right = torch.linalg.qr(normal(columns, 12, seed=seed + 2)).Q
    strengths = 2 * (rows**0.5 + columns**0.5) * torch.arange(1, 13) ** -0.5
    return normal(rows, columns, seed=seed) + (left * strengths) @ right.T


def good_weights():
    """Two layers that share their batch with the bad one, and one that does not."""
    return {"same": spiked(40, 30, seed=1), "tall": spiked(30, 40, seed=2), "other": spiked(120, 60, seed=3)}


def broken(value):
    weight = normal(40, 30)
    weight[3, 4] = value
    return weight


def as_numbers(layer):
    """Everything of a layer that is a number or a word, NaN made comparable."""
    metrics = {name: None if math.isnan(value) else value for name, value in layer.metrics.items()}
    return metrics, layer.status, layer.verdict, layer.phase, layer.esd, layer.trap_entries, layer.eigenvalues


ANALYSED = {
    "NaN": (broken(math.nan), "not_finite", "not_finite", ["broken_layer"]),
    "Inf": (broken(math.inf), "not_finite", "not_finite", ["broken_layer"]),
    "zero": (torch.zeros(40, 30), "zero", "zero", []),
    "constant": (torch.full((40, 30), 0.3), "few_eigenvalues", "rank_deficient", []),
    "constant in float64": (torch.full((40, 30), 0.3).double(), "few_eigenvalues", "rank_deficient", []),
    "constant but for rounding": (0.3 + 1e-9 * normal(40, 30), "few_eigenvalues", "rank_deficient", []),
    "rank one": (torch.outer(torch.linspace(-1, 1, 40), torch.ones(30)), "few_eigenvalues", "rank_deficient", None),
    "orthogonal": (torch.linalg.qr(normal(40, 30)).Q, "degenerate", "degenerate", []),
    "one row": (normal(1, 30), "few_eigenvalues", "degenerate", []),
    "one column": (normal(40, 1), "few_eigenvalues", "degenerate", []),
    "float8": (spiked(40, 30).to(torch.float8_e4m3fn), "ok", None, []),
}
"""Weight, status, verdict (None: any that is no failure) and rules of the findings (None: about traps and means only).
The rank-one matrix stands for any: its spectrum has one mode, so that no rule about training may fire."""

SKIPPED = {
    "empty": (torch.zeros(0, 30), "empty"),
    "integer": (torch.ones(40, 30, dtype=torch.int32), "integer weights"),
    "boolean": (torch.ones(40, 30, dtype=torch.bool), "integer weights"),
    "complex": (torch.ones(40, 30, dtype=torch.complex64), "complex weights"),
    "meta": (torch.empty(40, 30, device="meta"), "meta device"),
}


@pytest.mark.parametrize("preset", ["default", "weightwatcher"])
@pytest.mark.parametrize("weight", [case[0] for case in (ANALYSED | SKIPPED).values()], ids=ANALYSED | SKIPPED)
def test_a_bad_weight_leaves_the_other_layers_bit_identical(weight, preset):
    alone = analyze(model(**good_weights()), preset=preset, min_size=1)
    beside = analyze(model(bad=weight, **good_weights()), preset=preset, min_size=1)
    for name in good_weights():
        assert as_numbers(beside[name]) == as_numbers(alone[name])
    others = [finding for finding in beside.findings if finding.layer != "bad"]
    assert others == list(alone.findings)


@pytest.mark.parametrize(("weight", "status", "verdict", "rules"), ANALYSED.values(), ids=ANALYSED)
def test_a_degenerate_weight_has_a_status_and_no_finding_but_broken_layer(weight, status, verdict, rules):
    snapshot = analyze(model(bad=weight), min_size=1)
    layer = snapshot["bad"]
    assert layer.status == status
    if verdict is not None:
        assert layer.verdict == verdict
    found = [finding.rule for finding in snapshot.findings]
    assert found == rules if rules is not None else set(found) <= {"trap", "mean_shift"}
    if status in ("not_finite", "zero"):
        assert all(math.isnan(value) for value in layer.metrics.values())
        assert layer.esd is None
    if status != "ok":
        assert math.isnan(layer.value("alpha"))
    if verdict == "rank_deficient":
        assert math.isnan(layer.value("num_spikes"))


@pytest.mark.parametrize("weight", [case[0] for name, case in ANALYSED.items() if "constant" in name])
def test_a_constant_weight_has_no_mean_shift(weight):
    layer = analyze(model(bad=weight), min_size=1)["bad"]
    assert math.isnan(layer.value("mean_shift"))
    assert math.isnan(layer.value("num_traps"))


@pytest.mark.parametrize(("weight", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_holds_no_real_numbers_is_skipped_with_a_reason(weight, reason):
    snapshot = analyze(model(bad=weight, good=normal(40, 30)), min_size=1)
    assert [layer.name for layer in snapshot.layers] == ["good"]
    assert [entry.name for entry in snapshot.skipped] == ["bad"]
    assert reason in snapshot.skipped[0].reason


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_have_the_spectrum_of_their_exact_values(dtype):
    weight = normal(40, 30).to(dtype)
    expected = torch.linalg.svdvals(weight.double()).flip(0).square()
    found = torch.tensor(analyze(model(fc=weight))["fc"].eigenvalues, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_layer_without_numbers_enters_no_mean():
    snapshot = analyze(model(bad=broken(math.nan), flat=torch.eye(60)[:, :50], good=good_weights()["other"]))
    assert snapshot.summary["alpha"] == snapshot["good"].value("alpha")


STRICT = {
    "NaN": (broken(math.nan), r"layer 'bad': expected finite weights, got 1 NaN and 0 infinite of 1200 entries"),
    "Inf": (broken(-math.inf), r"layer 'bad': expected finite weights, got 0 NaN and 1 infinite of 1200 entries"),
}


@pytest.mark.parametrize(("weight", "message"), STRICT.values(), ids=STRICT)
def test_strict_raises_with_layer_what_was_expected_and_what_came(weight, message):
    with pytest.raises(LayerError, match=message):
        analyze(model(good=normal(40, 30), bad=weight), strict=True)


def test_strict_lets_healthy_and_zero_layers_pass():
    assert len(analyze(model(good=normal(40, 30), zero=torch.zeros(40, 30)), strict=True).layers) == 2


BAD_ARGUMENTS = {
    "preset": ({"preset": "ww"}, r"preset must be one of 'default', 'weightwatcher'; got 'ww'"),
    "metric": ({"metrics": ["alpha", "alhpa"]}, r"metrics must be among 'alpha', .*; got 'alhpa'"),
    "metric of the other preset": ({"metrics": "D"}, r"metrics must be among 'alpha', .*; got 'D'"),
    "include": ({"include": "fc*"}, r"include must be a sequence of globs; got the string 'fc\*'"),
    "exclude": ({"exclude": "fc*"}, r"exclude must be a sequence of globs; got the string 'fc\*'"),
    "min_size": ({"min_size": 0}, r"min_size must be an integer >= 1; got 0"),
    "max_size": ({"max_size": 7}, r"max_size must be None or >= min_size=8; got 7"),
    "no replicas": ({"replicas": 0}, r"replicas must be an integer >= 1; got 0"),
    "half a replica": ({"replicas": 1.5}, r"replicas must be an integer >= 1; got 1.5"),
    "significance 0": ({"significance": 0.0}, r"significance must be between 0 and 1; got 0.0"),
    "significance 1": ({"significance": 1}, r"significance must be between 0 and 1; got 1"),
    "significance NaN": ({"significance": math.nan}, r"significance must be between 0 and 1; got nan"),
    "fit": ({"fit": "TPL"}, r"fit must be one of 'csn', 'hill', 'truncated'; got 'TPL'"),
    "fit_k": ({"fit": "hill", "fit_k": 0}, r"fit_k must be an integer >= 1; got 0"),
    "fit_k without hill": ({"fit_k": 10}, r"fit_k goes with fit='hill'.*; got fit='csn', fit_k=10"),
    "fix_fingers": ({"fix_fingers": "xmin_peak"}, r"fix_fingers must be one of None, 'clip_xmax'; got 'xmin_peak'"),
    "fix_fingers of hill": ({"fit": "hill", "fix_fingers": "clip_xmax"}, r"got fit='hill', .*fix_fingers='clip_xmax'"),
    "aspect_ratio": ({"aspect_ratio": 0.5}, r"aspect_ratio must be None or >= 1; got 0.5"),
    "split": ({"split": {"fc": 0}}, r"split\['fc'\] must be .*; got 0"),
    "experts": ({"experts": "both"}, r"experts must be one of 'separate', 'pooled'; got 'both'"),
    "lora": ({"lora": "base"}, r"lora must be a sequence of some of 'base', 'delta', 'merged'; got 'base'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_its_value_and_the_choices(arguments, message):
    with pytest.raises(InvalidArgument, match=f"^analyze: .*{message}"):
        analyze(model(fc=normal(40, 30)), **arguments)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(InvalidArgument, match=r"model must be a torch.nn.Module, .*; got list"):
        analyze([normal(40, 30)])


def names(snapshot):
    return [layer.name for layer in snapshot.layers]


def value(name):
    return lambda snapshot: snapshot.layers[0].value(name)


def trapped():
    weight = normal(40, 30)
    weight[3, 4] = 12.0
    return weight


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(normal(4, 24, 16))


THREE = {"a.weight": normal(40, 30), "b.weight": normal(12, 10), "c.weight": normal(90, 80)}

OPTIONS = {
    "base": (THREE, {"base": {**THREE, "a.weight": normal(40, 30, seed=9)}}, value("log_norm")),
    "preset": (THREE, {"preset": "weightwatcher"}, lambda s: ("D" in s.layers[0].metrics, s.preset)),
    "metrics": (THREE, {"metrics": ["ks"]}, lambda s: list(s.layers[0].metrics)),
    "include": (THREE, {"include": ["[ab]"]}, names),
    "exclude": (THREE, {"exclude": ["b"]}, names),
    "min_size": (THREE, {"min_size": 11}, names),
    "max_size": (THREE, {"max_size": 30}, names),
    "seed": ({"a.weight": trapped()}, {"seed": 1}, value("trap_severity")),
    "replicas": ({"a.weight": trapped()}, {"replicas": 7}, value("trap_severity")),
    "significance": ({"a.weight": normal(200, 100)}, {"significance": 0.999}, value("num_spikes")),
    "fit": (THREE, {"fit": "hill"}, value("alpha")),
    "fit_k": ({"a.weight": normal(40, 30)}, {"fit": "hill", "fit_k": 5}, value("n_tail")),
    "fix_fingers": (THREE, {"fix_fingers": "clip_xmax"}, lambda s: "raw_alpha" in s.layers[0].metrics),
    "aspect_ratio": (THREE, {"aspect_ratio": 1.0}, value("alpha")),
    "split": (THREE, {"split": {"c": 3}}, names),
    "experts": (nn.ModuleDict({"experts": Experts()}), {"experts": "pooled"}, names),
}
"""A model, the option, and what it changes; `lora`, `part`, `strict`, … are tested apart."""


@pytest.mark.parametrize(("source", "arguments", "seen"), OPTIONS.values(), ids=OPTIONS)
def test_every_option_changes_what_it_is_for(source, arguments, seen):
    assert seen(analyze(source, **arguments)) != seen(analyze(source))


def test_there_is_a_test_for_every_option():
    apart = {"model", "lora", "part", "strict", "across_ranks", "device", "progress"}
    assert set(inspect.signature(analyze).parameters) == {*apart, *OPTIONS}


def test_the_same_seed_gives_the_same_snapshot_and_no_global_stream_moves():
    source = model(fc=trapped())
    before = torch.get_rng_state()
    first, again = (analyze(source, metrics=["num_traps", "trap_severity"], seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert as_numbers(first["fc"]) == as_numbers(again["fc"])


def test_weights_and_transposed_weights_have_the_same_numbers_but_for_which_side_is_the_input():
    weight = spiked(120, 60)
    snapshot = analyze(model(tall=weight, wide=weight.T.contiguous()))
    tall, wide = dict(snapshot["tall"].metrics), dict(snapshot["wide"].metrics)
    assert wide.pop("rms_norm") == pytest.approx(2 * tall.pop("rms_norm"))
    assert tall == pytest.approx(wide, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("exponent", [-20, 20])
def test_scale_leaves_what_is_a_ratio_and_shifts_what_is_a_logarithm(exponent):
    """W → cW leaves alpha, verdict and every pure number, and adds 2 log10 c to log_norm."""
    weight, scale = spiked(120, 60, seed=5).double(), 2.0**exponent
    before, after = analyze(model(fc=weight))["fc"], analyze(model(fc=weight * scale))["fc"]
    assert (after.verdict, after.phase) == (before.verdict, before.phase)
    shifted = ("alpha_hat", "log_alpha_norm", "log_norm", "log_spectral_norm")
    for entry in ww_monitor.metrics():
        if entry.standard and entry.unit == "1" and entry.name not in shifted:
            assert after.value(entry.name) == pytest.approx(before.value(entry.name), rel=1e-9, nan_ok=True), entry.name
    shift = 2 * exponent * math.log10(2)
    assert after.value("log_norm") - before.value("log_norm") == pytest.approx(shift, rel=1e-12)
    assert after.value("alpha_hat") - before.value("alpha_hat") == pytest.approx(shift * before.value("alpha"))
    assert after.value("xmin") == pytest.approx(scale**2 * before.value("xmin"), rel=1e-9)


def test_progress_is_told_from_nothing_to_all_and_changes_no_number():
    source, told = model(**{f"fc{number}": spiked(64, 32 + number, seed=number) for number in range(5)}), []
    snapshot = analyze(source, progress=told.append)
    assert told[0] == 0
    assert told[-1] == 1
    assert told == sorted(set(told))
    assert len(told) == 6
    assert list(map(as_numbers, snapshot.layers)) == list(map(as_numbers, analyze(source).layers))


@pytest.mark.gpu
def test_the_weights_of_a_file_are_analysed_on_the_device(tmp_path):
    torch.save({"fc.weight": spiked(600, 500)}, tmp_path / "net.pt")
    layer = analyze(tmp_path / "net.pt", device="cuda").layers[0]
    assert layer.solved_on.startswith("cuda")
    assert layer.value("alpha") == pytest.approx(analyze(tmp_path / "net.pt").layers[0].value("alpha"), rel=1e-6)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", 99])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(InvalidArgument, match="analyze: device must be one that"):
        analyze(model(fc=spiked(60, 30)), device=device)
