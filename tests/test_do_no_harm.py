"""Training with the monitor is bit-identical to training without it, and nothing global is left changed."""

import copy
import logging
import random
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import ww_monitor
from tests.processes import run_python
from tests.registries import before_measurement
from ww_monitor.engine import threads

pl = pytest.importorskip("pytorch_lightning")

STEPS = 56
SHORT = 10


def make_net() -> nn.Sequential:
    """Dropout, BatchNorm and a power iteration: each betrays a global draw or a touched buffer."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(24, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.2),
        parametrizations.spectral_norm(nn.Linear(32, 32)),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(32, 10),
    )
    with torch.no_grad():
        for layer in (net[0], net[7]):
            layer.weight.mul_(8)
            layer.weight[3, 4] = 12 * layer.weight.std()
        net[4].parametrizations.weight.original[5, 6] = 2.0
    return net


def make_module(net: nn.Module) -> "pl.LightningModule":
    class Net(pl.LightningModule):
        """Draws from all three global random streams in every step."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.losses: list[float] = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            noise = random.gauss(0, 0.01) + float(np.random.normal(0, 0.01))
            loss = nn.functional.cross_entropy(self.net(x + noise), y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Net()


@dataclass
class Run:
    module: "pl.LightningModule"
    trainer: "pl.Trainer"
    state: dict[str, object]


def train(folder, callbacks=(), *, steps=STEPS) -> Run:
    pl_module = make_module(make_net())
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(64, 24, generator=generator), torch.arange(64) % 10)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(pl_module, DataLoader(data, batch_size=8, shuffle=True))
    (optimizer,) = trainer.optimizers
    state: dict[str, object] = {f"net {name}": value.clone() for name, value in pl_module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer {index} {name}": value.clone() for name, value in moments.items()}
    state["loss sequence"] = list(pl_module.losses)
    state["torch stream"] = torch.get_rng_state()
    state["numpy stream"] = [*np.random.get_state()[1].tolist(), np.random.get_state()[2]]
    state["python stream"] = random.getstate()
    return Run(pl_module, trainer, state)


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names whose values are not bit-identical."""
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]


def spectral_monitor(**arguments):
    from ww_monitor.callbacks.lightning import SpectralMonitor

    return SpectralMonitor(**{"every_n_steps": 1, "console": False, **arguments})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    """The run without a monitor."""
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain_short(tmp_path_factory) -> Run:
    """The same, cut short: enough to see a run part from it."""
    return train(tmp_path_factory.mktemp("short"), steps=SHORT)


@pytest.fixture
def shuffled(monkeypatch) -> list[str]:
    """Names of the matrices that may have been shuffled, once a snapshot."""
    names: list[str] = []
    before_measurement(monkeypatch, "shuffled", lambda loaded: names.extend(one.name for one in loaded.matrices))
    return names


CALLBACKS = {
    "every step": {},
    "weightwatcher preset, all metrics, every 10 steps": {
        "every_n_steps": 10,
        "preset": "weightwatcher",
        "metrics": "all",
    },
    "every epoch": {"every_n_steps": None, "every_n_epochs": 1},
    "with stop_on, that never comes to stop": {"stop_on": "traps", "patience": 1000},
    "in the background": {"mode": "async"},
    "as often as the budget allows": {"every_n_steps": None},
}


@pytest.mark.parametrize("arguments", CALLBACKS.values(), ids=CALLBACKS)
def test_training_with_the_monitor_is_bit_identical(plain, tmp_path, arguments):
    watched = train(tmp_path, [spectral_monitor(**arguments)])
    assert differences(plain.state, watched.state) == []


def test_training_is_bit_identical_beside_workers_too(plain, tmp_path, monkeypatch):
    """torch's own count stays: training with another one is another training."""
    used = set()
    before_measurement(monkeypatch, "elements", lambda loaded: used.add(threading.current_thread().name))
    monkeypatch.setattr(threads, "thread_budget", lambda: 2)
    before = process_state()
    watched = train(tmp_path, [spectral_monitor()])
    assert all(name.startswith("ww_monitor") for name in used)
    assert used
    assert differences(plain.state, watched.state) == []
    assert changed(before, process_state()) in ([], ["streams"])  # of the training


def test_the_comparison_above_sees_shuffled_spectra_and_a_power_iteration(plain, tmp_path, shuffled):
    monitor = spectral_monitor()
    watched = train(tmp_path, [monitor])
    assert len(shuffled) > STEPS
    assert any(layer.value("trap_severity") > 0 for layer in monitor.monitor.history.last.layers)
    assert {
        "net net.4.parametrizations.weight.0._u",
        "net net.1.running_var",
        "optimizer 0 exp_avg",
    } <= plain.state.keys()
    assert [layer.name for layer in monitor.monitor.history.last.layers] == ["net.0", "net.4", "net.7"]
    assert differences(plain.state, watched.state) == []


def test_a_run_that_the_monitor_stops_is_identical_up_to_there(plain, tmp_path):
    stopped = train(tmp_path, [spectral_monitor(stop_on="traps", patience=4)])
    assert 1 <= stopped.trainer.global_step < 10
    assert stopped.module.losses == plain.module.losses[: stopped.trainer.global_step]


@pytest.mark.parametrize(
    ("draw", "seen"),
    [
        (lambda: torch.randperm(9), "torch stream"),
        (lambda: np.random.permutation(9), "numpy stream"),
        (lambda: random.sample(range(9), 9), "python stream"),
    ],
)
def test_a_draw_from_a_global_stream_would_be_seen(plain_short, tmp_path, monkeypatch, draw, seen):
    before_measurement(monkeypatch, "elements", lambda loaded: draw())
    watched = train(tmp_path, [spectral_monitor()], steps=SHORT)
    assert {seen, "loss sequence", "net net.0.weight"} <= set(differences(plain_short.state, watched.state))


def test_a_power_iteration_by_the_monitor_would_be_seen(plain_short, tmp_path):
    from ww_monitor.callbacks.lightning import SpectralMonitor

    class ReadsInTrainMode(SpectralMonitor):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            _ = pl_module.net[4].weight
            super().on_train_batch_end(trainer, pl_module, *arguments)

    watched = train(tmp_path, [ReadsInTrainMode(1, console=False)], steps=SHORT)
    assert "net net.4.parametrizations.weight.0._u" in differences(plain_short.state, watched.state)


# --- what is global


def process_state() -> dict[str, object]:
    from threadpoolctl import threadpool_info

    named = {
        name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "pools": [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()],
        "float32 matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "linalg library": torch.backends.cuda.preferred_linalg_library(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "denormals": torch.tensor(1e-40).mul(1).item(),
        "numpy errors": np.geterr(),
        "warnings filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "loggers": {
            name: (logger.level, logger.disabled, logger.propagate, list(logger.handlers), list(logger.filters))
            for name, logger in {**named, "": logging.root}.items()
        },
        "logging disabled": logging.root.manager.disable,
        "streams": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def model_state(model: nn.Module) -> dict[str, object]:
    """Identities and values of all that hangs on a model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    return {
        "attributes": {name: list(vars(module)) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for name, m in modules.items()
        },
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "tensors": {name: (id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in tensors.items()},
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad._version, p.grad.cpu().numpy().tobytes())
            for name, p in model.named_parameters()
        },
    }


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [name for name, value in before.items() if after[name] != value]


def test_analyze_leaves_the_process_and_the_model_as_they_were():
    net = make_net().train()
    net[0].weight.requires_grad_(False)
    net(torch.randn(8, 24)).sum().backward()
    ww_monitor.analyze(make_net())  # what is only loaded at first use
    before = process_state(), model_state(net)
    snapshot = ww_monitor.analyze(net)
    ww_monitor.analyze(net, preset="weightwatcher", metrics="all")
    after = process_state(), model_state(net)
    assert snapshot["0"].value("num_traps") > 0
    assert net[4].parametrizations.weight.original.grad is not None
    assert changed(before[0], after[0]) == []
    assert changed(before[1], after[1]) == []


def test_the_first_analysis_of_a_process_changes_nothing_either():
    """In a fresh interpreter, where every lazy import still lies ahead."""
    script = (
        "import logging, random, warnings, numpy, torch, ww_monitor\n"
        "net = torch.nn.Linear(32, 32); net.weight.data[0, 0] = 9.0\n"
        "def state(): return (list(warnings.filters), logging.root.level, list(logging.root.handlers),\n"
        "    torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state().tolist(),\n"
        "    numpy.random.get_state()[1].tolist(), random.getstate(), numpy.geterr())\n"
        "before = state()\n"
        "ww_monitor.analyze(net)\n"
        "ww_monitor.analyze(net, preset='weightwatcher', metrics='all')\n"
        "print([one == other for one, other in zip(before, state())])\n"
    )
    done = run_python("-c", script)
    assert (done.stdout.strip(), done.stderr) == (str([True] * 9), "")


def test_an_analysis_in_the_background_changes_nothing_for_other_threads_while_it_runs():
    import threading

    from ww_monitor.monitor import analyzer
    from ww_monitor.walk.torch import walk

    net, started, go_on = make_net(), threading.Event(), threading.Event()
    watcher = ww_monitor.Monitor(mode="async", every_n_steps=1)
    watcher.observe(walk(net), step=0, whole=True)
    analyse = analyzer.analyze_matrices

    def held(*arguments, **options):
        result = analyse(*arguments, **options)
        started.set()
        assert go_on.wait(20)
        return result

    analyzer.analyze_matrices = held
    before = process_state()
    try:
        watcher.observe(walk(net), step=1)
        assert started.wait(20)
        during = process_state()
    finally:
        analyzer.analyze_matrices = analyse
        go_on.set()
    assert changed(before, during) == []
    assert [snapshot.step for snapshot in watcher.finish()] == [1]
    watcher.close()
    assert changed(before, process_state()) == []


HOOKS = ("on_train_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end", "teardown")


def test_no_hook_of_the_callback_leaves_the_process_or_the_model_changed(tmp_path):
    from ww_monitor.callbacks.lightning import SpectralMonitor

    seen: dict[str, list[str]] = {}

    def compared(hook):
        def run(self, trainer, pl_module, *arguments, **named):
            before = process_state(), model_state(pl_module.net)
            getattr(SpectralMonitor, hook)(self, trainer, pl_module, *arguments, **named)
            after = process_state(), model_state(pl_module.net)
            seen.setdefault(hook, []).extend(changed(before[0], after[0]) + changed(before[1], after[1]))

        return run

    watcher = type("Compared", (SpectralMonitor,), {hook: compared(hook) for hook in HOOKS})
    train(tmp_path / "warm", [spectral_monitor()], steps=4)
    run = train(tmp_path, [watcher(2, stop_on="traps", patience=1000, console=False)], steps=12)
    assert seen == {hook: [] for hook in HOOKS}
    assert all(p.grad is not None for p in run.module.parameters())


@pytest.mark.parametrize(
    ("mischief", "seen"),
    [
        (lambda net: setattr(net[0], "_seen", 1), "attributes"),
        (lambda net: net[1].eval(), "training"),
        (lambda net: net[0].weight.requires_grad_(False), "requires_grad"),
        (lambda net: net.zero_grad(), "gradients"),
        (lambda net: net[1].running_mean.add_(0.0), "tensors"),
        (lambda net: net[4].weight, "values"),
        (lambda net: torch.randn(1), "streams"),
        (lambda net: torch.set_float32_matmul_precision("high"), "float32 matmul"),
        (lambda net: warnings.simplefilter("ignore"), "warnings filters"),
        (lambda net: torch.set_num_threads(torch.get_num_threads() + 1), "threads"),
        (lambda net: logging.getLogger("pytorch_lightning").addHandler(logging.NullHandler()), "loggers"),
    ],
)
def test_each_of_these_changes_would_be_seen(mischief, seen):
    net = make_net()
    net(torch.randn(8, 24)).sum().backward()
    threads, handlers = torch.get_num_threads(), list(logging.getLogger("pytorch_lightning").handlers)
    before = {**process_state(), **model_state(net)}
    try:
        with warnings.catch_warnings():
            mischief(net)
            after = {**process_state(), **model_state(net)}
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        logging.getLogger("pytorch_lightning").handlers[:] = handlers
    assert seen in changed(before, after)


def test_two_analyses_of_one_model_are_equal_and_leave_no_trace_in_each_other():
    net = make_net()
    twin = copy.deepcopy(net)
    first, second = ww_monitor.analyze(net, seed=3), ww_monitor.analyze(net, seed=3)
    assert first.scalars() == second.scalars() == ww_monitor.analyze(twin, seed=3).scalars()
