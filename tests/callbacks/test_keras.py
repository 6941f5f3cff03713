"""SpectralMonitor in Keras' own `fit`: on torch here, and on every backend in processes of their own."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported

keras = pytest.importorskip("keras", reason="keras, the framework, is not installed")

from tests.histories import steps_of  # noqa: E402
from tests.processes import once, run_python, start_python  # noqa: E402
from ww_monitor import Finding, History, InvalidArgument, SpectralWarning  # noqa: E402
from ww_monitor.callbacks.keras import SpectralMonitor, completed_updates  # noqa: E402
from ww_monitor.sinks.memory import Memory  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BACKENDS = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow"}  # name → module

pytestmark = [
    # Keras turns torch parameters into arrays with `copy=False`, which torch's `__array__` does not take yet
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends run in their own processes"),
]


def make_model(*, trap: bool = False, optimizer=None, **compiled):
    """Two matrices; the learning rate leaves a planted trap where it is. 8 batches of 8 an epoch."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(32, "relu", name="in"), keras.layers.Dropout(0.3), keras.layers.Dense(10, name="out")]
    model = keras.Sequential([keras.Input((24,)), *layers])
    if trap:
        kernel = np.array(model.layers[0].kernel)
        kernel[3, 4] = 2.0
        model.layers[0].kernel.assign(kernel)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer or keras.optimizers.SGD(1e-3), loss=loss, **compiled)
    return model


def fit(model, *callbacks, epochs: int = 1, verbose: int = 0, **arguments):
    x = np.random.default_rng(0).normal(size=(64, 24)).astype("float32")
    y = np.arange(64) % 10
    return model.fit(x, y, batch_size=8, epochs=epochs, callbacks=list(callbacks), verbose=verbose, **arguments)


def spectral_monitor(folder: Path, every_n_steps: int | None = 3, **arguments) -> SpectralMonitor:
    return SpectralMonitor(every_n_steps, folder=folder, **{"console": False, **arguments})


def ours_of(caught) -> int:
    return sum(issubclass(warning.category, SpectralWarning) for warning in caught)


class Logs(keras.callbacks.Callback):
    """What a later callback is given."""

    def __init__(self, monitor: str = "") -> None:
        super().__init__()
        self.monitor = monitor
        self.batches: list[dict] = []
        self.epochs: list[dict] = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append({key: value for key, value in logs.items() if key.startswith("ww")})

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append({key: value for key, value in logs.items() if key.startswith("ww")})


class Raise(keras.callbacks.Callback):
    """Ends the run after the fifth batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            raise self.error


# --- when it looks


def test_it_looks_before_the_first_step_where_due_and_after_the_last(tmp_path):
    monitor = spectral_monitor(tmp_path)
    fit(make_model(), monitor, epochs=2)
    history = monitor.monitor.history
    assert steps_of(history) == [0, 3, 6, 9, 12, 15, 16]
    assert [snapshot.epoch for snapshot in history] == [0, 0, 0, 1, 1, 1, 1]
    assert [layer.name for layer in history.last.layers] == ["in", "out"]


def test_it_looks_at_the_end_of_every_so_many_epochs(tmp_path):
    monitor = spectral_monitor(tmp_path, None, every_n_epochs=2)
    fit(make_model(), monitor, epochs=5)
    assert steps_of(monitor.monitor.history) == [0, 16, 32, 40]


def test_a_run_that_another_callback_ends_is_seen_at_its_last_step(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 3

    monitor = spectral_monitor(tmp_path)
    fit(make_model(), monitor, Stop(), epochs=3)
    assert steps_of(monitor.monitor.history) == [0, 3, 4]


class Two(keras.Model):
    """A model with optimizers of its own: the one it is compiled with does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = keras.Sequential([keras.layers.Dense(12, name="d")])
        self.first, self.second = keras.optimizers.SGD(1e-3), keras.optimizers.SGD(1e-3)

    def call(self, x):
        return self.net(x)

    def train_step(self, data):
        x, _ = data
        for optimizer in (self.first, self.second, self.second):
            self.zero_grad()
            loss = self(x).square().mean()
            loss.backward()
            variables = self.trainable_weights
            with torch.no_grad():
                optimizer.apply([variable.value.grad for variable in variables], variables)
        return {"loss": loss}


def test_of_several_optimizers_the_one_that_has_done_most_counts(tmp_path):
    model, monitor = Two(), spectral_monitor(tmp_path, 4)
    model.compile()
    fit(model, monitor)
    assert completed_updates(model) == 16
    assert steps_of(monitor.monitor.history) == [0, 4, 8, 12, 16]


# --- what others see


def test_the_logs_of_an_epoch_have_every_value_from_the_first_on(tmp_path):
    """The last known ones, as plain floats under the same keys, also where none is due."""
    logs, monitor = Logs(), spectral_monitor(tmp_path, 12, publish="all")
    fit(make_model(), monitor, logs, epochs=4)
    history = monitor.monitor.history
    assert steps_of(history) == [0, 12, 24, 32]
    expected = [history[0], history[1], history[2], history[3]]
    assert [row["ww_alpha"] for row in logs.epochs] == [snapshot.summary["alpha"] for snapshot in expected]
    keys = {f"ww_{metric}" for metric in history[0].summary}
    assert [set(row) for row in logs.epochs] == [keys] * 4
    assert {type(value) for row in logs.epochs for value in row.values()} == {float}


def test_history_and_csv_have_a_column_for_a_value_that_comes_late(tmp_path):
    """Without a trap nobody knows how severe it is; when one has grown the column is there."""

    class Grow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            kernel = np.array(self.model.layers[0].kernel)
            kernel[3, 4] = 2.0 * epoch
            self.model.layers[0].kernel.assign(kernel)

    table = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    monitor = spectral_monitor(tmp_path, 8, publish=["key", "trap_severity"])
    log = fit(make_model(), Grow(), monitor, table, epochs=2)
    first, second = log.history["ww_trap_severity"]
    assert math.isnan(first)
    assert second > 1
    with (tmp_path / "log.csv").open() as file:
        assert [float(row["ww_trap_severity"]) for row in csv.DictReader(file)][1] == second


def test_a_callback_never_finds_nan_under_the_key_it_monitors(tmp_path):
    """EarlyStopping would take it for the best there is, and a file name without the key ends the run."""
    stopper = keras.callbacks.EarlyStopping(monitor="ww_trap_severity", mode="min", patience=9)
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "{ww_trap_severity:.2f}.keras")
    monitor, logs = spectral_monitor(tmp_path, publish=["trap_severity", "trap_p_value"]), Logs()
    log = fit(make_model(), monitor, stopper, saved, logs, epochs=3)
    assert log.epoch == [0, 1, 2]
    assert [row["ww_trap_severity"] for row in logs.epochs] == [1.0] * 3
    assert [path.name for path in tmp_path.glob("*.keras")] == ["1.00.keras"]
    assert math.isnan(logs.epochs[0]["ww_trap_p_value"])


def test_the_logs_of_a_batch_have_alpha_and_what_is_monitored(tmp_path):
    logs, monitor = Logs("ww_num_traps"), spectral_monitor(tmp_path, 4)
    fit(make_model(), monitor, logs)
    assert [set(row) for row in logs.batches] == [{"ww_alpha", "ww_num_traps"}] * 8
    alphas = [snapshot.summary["alpha"] for snapshot in monitor.monitor.history]
    assert [row["ww_alpha"] for row in logs.batches] == [alphas[0]] * 3 + [alphas[1]] * 4 + [alphas[2]]


def test_what_is_monitored_is_measured_at_the_end_of_every_epoch(tmp_path):
    """A checkpoint is chosen by the weights it holds, not by those of epochs ago."""
    monitor = spectral_monitor(tmp_path, 1000)
    best = keras.callbacks.ModelCheckpoint(tmp_path / "{ww_alpha:.6f}.keras", monitor="ww_alpha", mode="min")
    fit(make_model(optimizer=keras.optimizers.Adam(0.01)), monitor, best, epochs=3)
    history = monitor.monitor.history
    assert steps_of(history) == [0, 8, 16, 24]
    alphas = {f"{snapshot.summary['alpha']:.6f}" for snapshot in list(history)[1:]}
    assert {path.stem for path in tmp_path.glob("*.keras")} == alphas


@pytest.mark.parametrize(
    ("make", "sees"),
    [
        (lambda folder: keras.callbacks.CSVLogger(str(folder / "log.csv")), "its values"),
        (
            lambda folder: keras.callbacks.ModelCheckpoint(folder / "a.keras", monitor="ww_alpha", mode="min"),
            "ww_alpha",
        ),
        (lambda folder: keras.callbacks.EarlyStopping(monitor="ww_num_traps", mode="min"), "ww_num_traps"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*which is not available:UserWarning")  # so says Keras of the value
@pytest.mark.filterwarnings("ignore:Can save best model only:UserWarning")
def test_it_says_who_stands_before_it_and_cannot_see_its_values(tmp_path, make, sees):
    callback = make(tmp_path)
    message = f"{type(callback).__name__} stands before SpectralMonitor and cannot see {sees}; put it after"
    with pytest.warns(SpectralWarning, match=message):
        fit(make_model(), callback, spectral_monitor(tmp_path))


def test_the_right_order_and_callbacks_that_need_nothing_say_nothing(tmp_path):
    """Warnings are errors here."""
    before = keras.callbacks.EarlyStopping(monitor="loss", patience=9)
    after = keras.callbacks.EarlyStopping(monitor="ww_alpha", mode="min", patience=9)
    log = fit(make_model(), before, keras.callbacks.TerminateOnNaN(), spectral_monitor(tmp_path), after)
    assert log.epoch == [0]


def test_the_progress_bar_shows_alpha_and_console_lines_begin_after_it(tmp_path, capsys):
    def warns(history):
        if history.last.step == 6:
            yield Finding("warns", "", "warning", "of all layers", step=6)

    monitor = spectral_monitor(tmp_path, 3, console=True, rules=[warns])
    fit(make_model(), monitor, epochs=2, verbose=1)
    out = capsys.readouterr().out
    assert "- ww_alpha: " in out.split("Epoch 2/2")[0]
    assert f"an analysis takes {monitor.monitor.history[0].seconds:.2g} s, every 3 steps, history in {tmp_path}" in out
    assert "ww_monitor: 7 snapshots, steps 0 to 16" in out
    lines = [line for line in out.split("\n") if "ww_monitor" in line]
    assert any("warns at step 6" in line for line in lines)
    assert all(line.startswith("ww_monitor") for line in lines)


def test_without_a_console_nothing_is_printed(tmp_path, capsys):
    fit(make_model(trap=True), spectral_monitor(tmp_path))
    assert capsys.readouterr() == ("", "")


# --- the history file


def test_the_history_file_holds_what_was_seen(tmp_path):
    monitor = spectral_monitor(tmp_path / "new" / "folder")
    fit(make_model(), monitor)
    written = History.read(tmp_path / "new" / "folder" / "ww_history.jsonl")
    assert [snapshot.to_json() for snapshot in written] == [s.to_json() for s in monitor.monitor.history]


def test_no_history_file_where_none_is_wanted(tmp_path):
    fit(make_model(), spectral_monitor(tmp_path, history=False))
    assert list(tmp_path.iterdir()) == []


def test_two_monitors_of_one_run_write_two_files(tmp_path):
    fit(make_model(), spectral_monitor(tmp_path, 4), spectral_monitor(tmp_path, 2, include=["in"]))
    files = [History.read(tmp_path / name) for name in ("ww_history.jsonl", "ww_history-1.jsonl")]
    assert [steps_of(history) for history in files] == [[0, 4, 8], [0, 2, 4, 6, 8]]
    assert [len(history.last.layers) for history in files] == [2, 1]


def test_a_second_fit_goes_on_and_another_model_starts_anew(tmp_path):
    model, monitor = make_model(), spectral_monitor(tmp_path)
    fit(model, monitor)
    fit(model, monitor)
    assert steps_of(monitor.monitor.history) == [0, 3, 6, 8, 9, 12, 15, 16]
    fit(make_model(), monitor)
    assert steps_of(monitor.monitor.history) == [0, 3, 6, 8]
    files = [History.read(tmp_path / name) for name in ("ww_history.jsonl", "ww_history-1.jsonl")]
    assert [steps_of(history) for history in files] == [[0, 3, 6, 8, 9, 12, 15, 16], [0, 3, 6, 8]]


def test_a_run_is_resumed_from_a_saved_model_and_the_saved_state(tmp_path):
    """Its history is that of the run that was never cut, number for number."""
    whole = spectral_monitor(tmp_path / "whole", 2, stop_on="traps", patience=100)
    fit(make_model(trap=True), whole, epochs=2, shuffle=False)

    first, model = spectral_monitor(tmp_path / "cut", 2, stop_on="traps", patience=100), make_model(trap=True)
    fit(model, first, shuffle=False)
    model.save(tmp_path / "model.keras")
    state = json.dumps(first.state_dict(), allow_nan=False)

    second = spectral_monitor(tmp_path / "cut", 2, stop_on="traps", patience=100)
    second.load_state_dict(json.loads(state))
    fit(keras.saving.load_model(tmp_path / "model.keras"), second, epochs=2, initial_epoch=1, shuffle=False)
    (path,) = (tmp_path / "cut").iterdir()
    ours, theirs = History.read(path), History.read(tmp_path / "whole" / "ww_history.jsonl")
    assert steps_of(ours) == steps_of(theirs) == list(range(0, 17, 2))
    for mine, other in zip(list(ours)[:5], theirs, strict=False):  # dropout is drawn anew after the cut
        assert dict(mine.scalars()) == dict(other.scalars())
    assert [str(finding) for finding in ours.findings] == [str(finding) for finding in theirs.findings]


def test_weights_that_a_later_callback_restores_are_the_first_ones_seen(tmp_path):
    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)

    fit(make_model(), backup(), epochs=1)
    monitor = spectral_monitor(tmp_path)
    fit(make_model(), monitor, backup(), epochs=2)
    assert steps_of(monitor.monitor.history) == [8, 9, 12, 15, 16]


# --- stopping


def test_stop_on_traps_ends_the_run(tmp_path, capsys):
    model, monitor = make_model(trap=True), spectral_monitor(tmp_path, 2, stop_on="traps", patience=2, console=True)
    log = fit(model, monitor, epochs=5)
    assert steps_of(monitor.monitor.history) == [0, 2]
    assert model.stop_training
    assert log.epoch == [0]
    assert "ww_monitor: stopping at step 2: traps in 2 snapshots in a row" in capsys.readouterr().out


def test_a_healthy_run_is_not_stopped(tmp_path):
    model = make_model()
    log = fit(model, spectral_monitor(tmp_path, 1, stop_on="traps", patience=1), epochs=2)
    assert (log.epoch, model.stop_training) == ([0, 1], False)


# --- what goes wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the data is broken")])
def test_a_run_that_dies_leaves_its_history_and_the_next_goes_on(tmp_path, error):
    class Closing(Memory):
        closed = 0

        def close(self):
            self.closed += 1

    sink, model = Closing(), make_model()
    monitor = spectral_monitor(tmp_path, 2, sinks=[sink])
    with pytest.raises(type(error)):
        fit(model, monitor, Raise(error))
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4]
    assert sink.closed == 0
    fit(model, monitor)
    assert sink.closed == 2
    assert monitor.monitor.sinks == [sink]
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4, 5, 6, 8, 10, 12, 13]


def test_a_monitor_that_nobody_holds_after_its_run_died_closes_its_sinks(tmp_path):
    """At the latest when Python ends: a TensorBoard writer has not written everything before."""
    closed = []

    class Sink(Memory):
        def close(self):
            closed.append(True)

    monitor = spectral_monitor(tmp_path, sinks=[Sink()])
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), monitor, Raise(KeyboardInterrupt()))
    assert monitor._left_open.atexit
    del monitor
    gc.collect()
    assert closed == [True]


def test_a_sink_that_raises_is_said_once_and_costs_nothing_else(tmp_path):
    class Broken:
        def write(self, snapshot):
            raise OSError("disk full")

        def close(self):
            raise OSError("disk full")

    monitor = spectral_monitor(tmp_path, 2, sinks=[Broken()])
    with pytest.warns(SpectralWarning, match="sink Broken failed: OSError: disk full") as caught:
        fit(make_model(), monitor)
    assert ours_of(caught) == 1
    assert steps_of(History.read(tmp_path / "ww_history.jsonl")) == [0, 2, 4, 6, 8]


def test_a_layer_that_breaks_is_a_status(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                self.model.layers[-1].kernel.assign(np.full((32, 10), np.nan))

    monitor = spectral_monitor(tmp_path, 2)
    fit(make_model(), monitor, Break())
    history = monitor.monitor.history
    assert [layer.status == "ok" for layer in history.of_layer("out")] == [True, True, False, False, False]
    assert all(math.isfinite(snapshot.summary["alpha"]) for snapshot in list(history)[:2])


class Unreadable(keras.layers.Dense):
    """A layer that does not tell what it holds, but to Keras."""

    @property
    def quantization_mode(self):
        if sys._getframe(2).f_globals["__name__"].startswith("ww_monitor"):
            raise RuntimeError("not now")
        return None


def test_a_model_that_cannot_be_read_costs_the_analysis_only(tmp_path):
    model = keras.Sequential([keras.Input((24,)), Unreadable(16), keras.layers.Dense(10)])
    model.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    monitor = spectral_monitor(tmp_path)
    with pytest.warns(SpectralWarning, match="analysis failed: RuntimeError: not now"):
        log = fit(model, monitor, epochs=2)
    assert len(log.history["loss"]) == 2
    assert len(monitor.monitor.history) == 0


def test_an_optimizer_that_cannot_be_read_is_said_once(tmp_path):
    class Secret(keras.optimizers.SGD):
        @property
        def iterations(self):
            raise RuntimeError("secret")

    with pytest.warns(SpectralWarning, match=r"reading optimizer.iterations failed: RuntimeError: secret") as caught:
        log = fit(make_model(optimizer=Secret()), spectral_monitor(tmp_path))
    assert ours_of(caught) == 1
    assert log.epoch == [0]


def test_two_processes_agree_and_the_first_one_writes(tmp_path):
    done = run_python("-m", "tests.callbacks.keras_ranks", str(tmp_path), KERAS_BACKEND="torch", folder=ROOT)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == [0, 3, 6]  # the planted trap stops both at the third
    assert first["stopped at"] == second["stopped at"] < 3 * 8
    assert {**second, "in the sink": 3} == first
    assert second["in the sink"] == 0
    assert first["logs"] == first["alpha"][-1:]
    assert (tmp_path / "rank0" / "ww_history.jsonl").exists()
    assert not (tmp_path / "rank1").exists()
    assert done.stdout.count("ww_monitor: watching") == 1


def test_arguments_are_checked_at_construction(tmp_path):
    with pytest.raises(InvalidArgument, match="every_n_steps"):
        SpectralMonitor(0, folder=tmp_path)
    with pytest.raises(TypeError, match="every_n_step"):
        SpectralMonitor(every_n_step=3)


@pytest.mark.parametrize(
    ("missing", "wanted"), [("keras", "pip install 'ww-monitor[keras]'"), ("jax", "set KERAS_BACKEND to one you have")]
)
def test_what_is_missing_is_named(missing, wanted):
    code = f"import sys; sys.modules[{missing!r}] = None; import ww_monitor.callbacks.keras"
    done = run_python("-c", code, KERAS_BACKEND="jax")
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingDependency: ww_monitor.callbacks.keras: needs" in last
    assert wanted in last


# --- every backend


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What `keras_run.py` writes on each backend."""
    missing = [name for name, module in BACKENDS.items() if find_spec(module) is None]
    if missing:
        pytest.skip(f"the backends {missing} of keras are not installed")
    root = once(tmp_path_factory, "keras_backends", run_backends)
    return {backend: json.loads((root / backend / "found.json").read_text()) for backend in BACKENDS}


def run_backends(root: Path) -> None:
    """One process a backend, side by side."""
    quick = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    quick["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    runs = {}
    for backend in BACKENDS:
        folder = root / backend
        folder.mkdir(exist_ok=True)
        script = str(HERE / "keras_run.py")
        with (folder / "output.txt").open("w") as file:
            runs[folder] = start_python(script, str(folder), output=file, KERAS_BACKEND=backend, **quick)
    failed = [folder for folder, run in runs.items() if run.wait(timeout=600)]
    assert not failed, "".join((folder / "output.txt").read_text()[-4000:] for folder in failed)


OTHERS = ["jax", "tensorflow"]


@pytest.mark.parametrize("backend", OTHERS)
def test_every_layer_is_the_same_on_every_backend(found, backend):
    """Names, kinds, roles, shapes, precision and every number of its weights."""
    for name, layer in found["torch"]["zoo"].items():
        other = found[backend]["zoo"][name]
        assert other["skipped"] == layer["skipped"]
        assert list(other["matrices"]) == list(layer["matrices"])
        for matrix, row in layer["matrices"].items():
            expected = {key: value for key, value in row.items() if key != "alpha"}
            assert {key: value for key, value in other["matrices"][matrix].items() if key != "alpha"} == expected


@pytest.mark.parametrize("backend", OTHERS)
def test_equal_weights_have_equal_alpha_on_every_backend(found, backend):
    alphas = [
        (row["alpha"], found[backend]["zoo"][name]["matrices"][matrix]["alpha"])
        for name, layer in found["torch"]["zoo"].items()
        for matrix, row in layer["matrices"].items()
    ]
    assert len(alphas) > 60
    assert max(abs(ours - theirs) for ours, theirs in alphas) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_weights_have_the_alpha_of_the_torch_module(found, backend):
    assert found[backend]["torch"] < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_read_where_they_lie(found, backend):
    assert not found[backend]["copies"]


def test_weights_that_jax_has_on_several_devices_are_read_whole(found):
    assert found["jax"]["sharded"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_is_bit_identical_with_and_without(found, backend):
    harm = found[backend]["harm"]
    assert harm["with"] == harm["without"]
    assert harm["steps"] == [0, 4, 8, 12]
    assert harm["moved"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_an_update(found, backend):
    """16 batches: 4 to an update, 2 to an update under a scaled loss, and 4 in one call."""
    expected = {"accumulating": [0, 2, 4], "scaling_accumulating": [0, 2, 4, 6, 8]}
    if backend != "torch":
        expected["several_per_execution"] = [0, 4, 8, 12, 16]
    assert found[backend]["counted"] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_own_callbacks_see_the_values(found, backend):
    """EarlyStopping ends the run in its third epoch; each epoch has the alpha of its own last step."""
    seen = found[backend]["seen"]
    assert seen["epochs"] == [0, 1, 2]
    assert seen["checkpoints"] == ["1.keras", "2.keras", "3.keras"]
    assert seen["history"] == seen["csv"] == seen["alphas"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensorboard_needs_no_tensorflow(found, backend):
    """The processes of torch and JAX cannot import it."""
    seen = found[backend]["seen"]
    assert seen["scalars"] == pytest.approx(seen["snapshots"], rel=1e-6)
    assert len(seen["scalars"]) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_goes_on(found, backend):
    expected = {"before": [0, 2, 4], "after": [0, 2, 4, 5, 6, 8, 10, 12, 13], "iterations": 13}
    assert found[backend]["interrupted"] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_actions_change_is_that_of_a_loop_by_hand(found, backend):
    """Ten steps of SGD with momentum and weight decay, whose rates and decays differ by layer and change twice."""
    assert found[backend]["acting"] < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_actions_step_a_layer_that_is_built_in_the_first_step(found, backend):
    assert found[backend]["late"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_makes_it_warn(found, backend):
    assert found[backend]["warnings"] == []
