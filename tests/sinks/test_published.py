"""What a tracker gets by default, counted in its own files for models of every size, and what can be asked for."""

from __future__ import annotations

import csv
import json
import logging
import re
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ww_monitor import InvalidArgument
from ww_monitor.description import describe
from ww_monitor.record import Histogram, Layer, Snapshot, layer_key
from ww_monitor.sinks.published import LAYER_METRICS, Published

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
VERDICTS = ("ok", "random_like", "poor_fit", "few_eigenvalues")


def snapshot(names: list[tuple[str, str]], step: int = 0) -> Snapshot:
    """Layers of these names and roles, with every metric that an analysis has and some more."""
    rng = np.random.default_rng(step)
    metrics = [*LAYER_METRICS, "stable_rank", "log_spectral_norm", "ks", "entropy", "erg_gap"]
    layers = []
    for at, (name, role) in enumerate(names):
        values = {metric: float(rng.uniform(1, 5)) for metric in metrics}
        fields = {"verdict": VERDICTS[at % 4], "role": role, "metrics": values, "esd": Histogram(-2.0, 1.0, (3, 0, 5))}
        layers.append(Layer(name, "dense", (1, 64, 64), **fields))
    summary = {metric: float(np.mean([layer.value(metric) for layer in layers])) for metric in metrics}
    return Snapshot(tuple(layers), summary=summary, step=step)


@pytest.fixture(scope="module")
def models():
    """Names and roles of the matrices of GPT-2 small and of Llama 7B, from their configurations alone."""
    transformers = pytest.importorskip("transformers", reason="transformers, whose models are asked, is not installed")
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    found = {
        name: [(row.name, row.role) for row in describe(net).rows] for name, net in (("gpt2", gpt2), ("7b", llama))
    }
    whole = [(f"h.{block}.{role}", role) for block in range(12) for role in ("qkv", "o", "up", "down")]
    return {**found, "gpt2 whole": whole}


BOUNDS = [("gpt2", 260), ("gpt2 whole", 260), ("7b", 120)]


# --- counts


@pytest.mark.parametrize(("model", "bound"), BOUNDS)
def test_tensorboards_file_has_few_charts(tmp_path, read_events, models, model, bound):
    pytest.importorskip("tensorboard", reason="tensorboard, the reader of the files, is not installed")
    from ww_monitor.sinks.tensorboard import TensorBoard

    sink = TensorBoard(tmp_path)
    for step in range(2):
        sink.write(snapshot(models[model], step))
    sink.close()
    tags = read_events(tmp_path).Tags()
    assert tags["histograms"] == []
    assert len([*tags["scalars"], *tags["images"]]) <= bound
    assert {"ww/alpha", "ww/trap_headroom", "ww_verdict/ok"} <= set(tags["scalars"])


@pytest.mark.parametrize(("model", "bound"), BOUNDS)
def test_wandbs_file_has_few_keys(tmp_path, start_wandb, read_wandb, models, model, bound):
    pytest.importorskip("wandb", reason="wandb, the tracker, is not installed")
    from ww_monitor.sinks.wandb import WandB

    run, sink = start_wandb(tmp_path), WandB()
    for step in range(2):
        sink.write(snapshot(models[model], step))
    run.finish()
    keys = {key for row in read_wandb(tmp_path)["rows"] for key in row if not key.startswith("_")}
    media = {key.removesuffix("/_type") for key in keys if key.endswith("/_type")}
    charts = media | {key for key in keys if not key.startswith(tuple(f"{medium}/" for medium in media))}
    assert 50 < len(charts) <= bound
    assert media == {"ww/layers", "ww/alpha_map"}


@pytest.mark.parametrize(("model", "bound"), BOUNDS)
def test_lightnings_csv_has_few_columns(tmp_path, models, model, bound):
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning, the trainer, is not installed")
    from pytorch_lightning.loggers import CSVLogger

    from ww_monitor.callbacks.lightning import SpectralMonitor

    logger, monitor = CSVLogger(tmp_path), SpectralMonitor(console=False, history=False)
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True)
    monitor._log(trainer, snapshot(models[model]), 0)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert 50 < len(row) <= bound


@pytest.mark.parametrize(("model", "bound"), BOUNDS)
def test_the_trainers_state_grows_by_little(models, model, bound):
    transformers = pytest.importorskip("transformers", reason="transformers, the trainer, is not installed")
    from ww_monitor.callbacks.huggingface import SpectralMonitor

    monitor, state = SpectralMonitor(console=False, history=False), transformers.TrainerState(epoch=0.5)
    monitor._known = {}
    monitor._publish(None, state, None, [snapshot(models[model], step) for step in range(10)])
    assert len(state.log_history) == 10
    assert len(json.dumps(state.log_history, indent=2)) <= 10 * 2000


# --- what is chosen


def names(count: int) -> list[tuple[str, str]]:
    return [(f"h.{at // 7}.{role}", role) for at, role in zip(range(count), cycle(ROLES), strict=False)]


def metrics_of_layers(values: dict[str, float]) -> list[str]:
    return list(dict.fromkeys(re.findall(r"ww_(\w+)/", " ".join(values))))


def test_layers_are_shown_by_as_many_metrics_as_fit_and_then_by_role():
    shown = {count: Published().scalars(snapshot(names(count))) for count in (7, 48, 74, 100, 101)}
    metrics = {count: [m for m in metrics_of_layers(values) if m != "verdict"] for count, values in shown.items()}
    assert metrics == {7: list(LAYER_METRICS), 48: list(LAYER_METRICS), 74: list(LAYER_METRICS[:3]),
                       100: list(LAYER_METRICS[:2]), 101: list(LAYER_METRICS)}  # fmt: skip
    assert "ww_alpha/h.14.o" not in shown[101]
    layers = [layer.value("alpha") for layer in snapshot(names(101)).layers if layer.role == "q"]
    assert shown[101]["ww_alpha/q_mean"] == pytest.approx(np.mean(layers))
    assert shown[101]["ww_alpha/q_p10"] == pytest.approx(np.quantile(layers, 0.1))
    assert shown[101]["ww_alpha/q_p90"] == pytest.approx(np.quantile(layers, 0.9))


def test_adapters_are_no_layers_of_the_role_that_they_adapt():
    many = [(f"h.{at}.q{end}", "q") for at in range(60) for end in ("", ".lora[default]", ".loha[default]")]
    shown = Published().scalars(snapshot(many))
    assert {"ww_alpha/q_mean", "ww_alpha/q_lora_mean", "ww_alpha/q_loha_mean"} <= shown.keys()


def test_a_verdict_that_is_gone_falls_to_zero():
    chosen, layer = Published(), Layer("fc", "dense", (1, 8, 8), verdict="poor_fit")
    assert chosen.scalars(Snapshot((layer,)))["ww_verdict/poor_fit"] == 1.0
    after = chosen.scalars(Snapshot((Layer("fc", "dense", (1, 8, 8), verdict="ok"),)))
    assert (after["ww_verdict/poor_fit"], after["ww_verdict/ok"]) == (0.0, 1.0)


def test_all_is_everything():
    seen = snapshot(names(150))
    assert Published("all").scalars(seen).items() >= seen.scalars().items()
    assert len(list(Published("all").histograms(seen))) == 150


@pytest.mark.parametrize(
    ("publish", "expected"),
    [
        ("ks", {"ww/ks", "ww_ks/a", "ww_ks/b"}),
        (["ks", "entropy"], {"ww/ks", "ww_ks/a", "ww_ks/b", "ww/entropy", "ww_entropy/a", "ww_entropy/b"}),
        (["ww/*_rank"], {"ww/stable_rank"}),
        (["ww_alpha/a"], {"ww_alpha/a"}),
        (["erg_*"], {"ww/erg_gap", "ww_erg_gap/a", "ww_erg_gap/b"}),
    ],
)
def test_names_and_globs_are_all_that_is_shown(publish, expected):
    assert Published(publish).scalars(snapshot([("a", "q"), ("b", "q")])).keys() == expected


def test_the_brackets_of_a_layer_s_name_are_its_own():
    seen = snapshot([("a.lora[default]", "q"), ("a.lorad", "q"), ("h1", "q")])
    assert Published(["ww_alpha/*.lora[default]"]).scalars(seen).keys() == {
        "ww_alpha/a.lora_default",
        "ww_alpha/a.lorad",
    }
    assert Published(["ww_alpha/h[12]"]).scalars(seen).keys() == {"ww_alpha/h1"}


def test_key_among_names_stands_for_its_own_set():
    seen = snapshot([("a", "q")])
    both = Published(["key", "ks"]).scalars(seen)
    assert both.keys() == Published().scalars(seen).keys() | {"ww/ks", "ww_ks/a"}


@pytest.mark.parametrize("wrong", [None, 3, [], [""], [1], ""])
def test_what_is_no_name_is_refused(wrong):
    with pytest.raises(InvalidArgument, match="must be a name or a sequence of names"):
        Published(wrong)


# --- keys that every tracker takes

NAMES = (
    "base_model.model.q_proj.lora[default]", "a//b/", "/a/b", "a/../b", "a/./b", "..", "", "x y(z)|*?<>:\"'", "fc\n1",
    "ünï.cödé", "w" * 400, "a[b]", "a_b", "a(b)", "inner/dense/kernel",
)  # fmt: skip


def test_any_name_makes_a_key_of_its_own_that_mlflow_and_tensorboard_take(caplog):
    validation = pytest.importorskip("mlflow.utils.validation", reason="mlflow, which checks keys, is not installed")
    from torch.utils.tensorboard.summary import scalar

    seen = snapshot([(name, "q") for name in NAMES])
    keys = [layer_key("alpha", name) for name in seen.key_names]
    assert len(set(keys)) == len(NAMES)
    with caplog.at_level(logging.INFO):
        for key in keys:
            validation._validate_metric_name(key)
            assert scalar(key, 1.0).value[0].tag == key
            assert len(key) <= 250
            assert re.fullmatch(r"[\w/. -]+", key)  # all that Lightning's logger for MLflow leaves
    assert not [record for record in caplog.records if "tag" in record.message.lower()]
    assert sum(key.startswith("ww_alpha/") for key in Published().scalars(seen)) == len(NAMES)


def test_names_that_are_plain_are_left_alone():
    for name in ("encoder.layers.0.fc1", "inner/dense/kernel", "net.0", "_orig.a-b"):
        assert layer_key("alpha", name) == f"ww_alpha/{name}"
