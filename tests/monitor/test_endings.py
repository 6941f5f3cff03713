"""A process that ends while an analysis is under way ends as it would without it, and what is done is written."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import cloudpickle
import pytest

from tests.histories import steps_of
from tests.matrices import draw, matrix
from tests.processes import start_quietly
from tests.registries import before_measurement
from ww_monitor import History
from ww_monitor.callbacks._session import Session
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.engine.threads import controller
from ww_monitor.errors import SpectralWarning
from ww_monitor.metric import batch
from ww_monitor.monitor import Monitor
from ww_monitor.monitor.background import Background
from ww_monitor.record import Finding, Snapshot
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.sinks.memory import Memory

LAYERS = [matrix("fc", draw(40, 30))]

SCRIPT = """
import signal, sys, time, torch
from ww_monitor.monitor import Monitor
from ww_monitor.sinks.jsonl import JsonLines
from ww_monitor.walk.torch import walk
mode, size, how, path = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
net = torch.nn.Linear(size, size)
def run():
    monitor = Monitor(mode=mode, sinks=[JsonLines(path)])
    monitor.begin(0)
    print("begun", flush=True)
    for step in range(2 if how == "end" else 10**6):
        monitor.observe(walk(net), step=step)
try:
    run()
finally:
    print("returned", time.time(), flush=True)
"""


def run_to_its_end(mode, size, how, path):
    """Exit code, seconds from a signal to the return of the loop, steps in the file."""
    with start_quietly("-c", SCRIPT, mode, str(size), how, str(path)) as run:
        assert run.stdout.readline() == "begun\n"
        if how != "end":
            time.sleep(0.5)
            run.send_signal(getattr(signal, how))
        start = time.time()
        try:
            returned = float(run.communicate(timeout=60)[0].split()[-1]) - start
        except subprocess.TimeoutExpired:
            run.kill()
            raise
    return run.returncode, returned, steps_of(History.read(path)) if path.exists() else []


def test_python_ends_with_its_own_exit_code_and_the_last_snapshot_where_nobody_has_closed(tmp_path):
    code, _, steps = run_to_its_end("async", 512, "end", tmp_path / "run.jsonl")
    assert (code, steps[-1]) == (0, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize(
    ("mode", "size", "how", "expected"), [("sync", 3072, "SIGINT", -2), ("async", 256, "SIGTERM", 143)]
)
def test_an_interrupted_analysis_returns_before_the_solve_under_way_does(tmp_path, how, expected, mode, size):
    code, seconds, _ = run_to_its_end(mode, size, how, tmp_path / "run.jsonl")
    assert code == expected
    assert seconds < 2


@pytest.fixture
def gate(monkeypatch):
    """Analyses in the background wait for it."""
    event = threading.Event()
    before_measurement(
        monkeypatch, "live_sides", lambda _: "background" in threading.current_thread().name and event.wait(20)
    )
    yield event
    event.set()


def test_the_end_of_a_with_block_waits_for_what_is_under_way(gate):
    with Monitor(mode="async", sinks=[sink := Memory()]) as monitor:
        monitor.observe(LAYERS, step=0)
        monitor.observe(LAYERS, step=1)
        threading.Timer(0.1, gate.set).start()
    assert (steps_of(sink.history)[-1], sink.closed) == (1, True)


def _interrupted_in_a_block(monitor):
    with monitor:
        monitor.observe(LAYERS, step=0)
        raise KeyboardInterrupt


def test_an_interrupted_block_waits_for_nothing_but_a_moment(gate, monkeypatch):
    monkeypatch.setattr("ww_monitor.monitor.monitor.INTERRUPTED_SECONDS", 0.05)
    start = time.monotonic()
    monitor = Monitor(mode="async", sinks=[sink := Memory()])
    with pytest.raises(KeyboardInterrupt):
        _interrupted_in_a_block(monitor)
    assert time.monotonic() - start < 10
    assert sink.closed
    gate.set()
    monitor.observe(LAYERS, step=1)
    monitor.close()
    assert steps_of(sink.history) == [1]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_where_no_thread_can_be_started_the_caller_analyses(monkeypatch, mode):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monitor = Monitor(mode=mode)
    for step in range(2):
        monitor.observe([matrix("a", draw(600, 520)), matrix("b", draw(600, 520))], step=step)
        monitor.collect()
    monitor.close()
    assert steps_of(monitor.history) == [0, 1]
    assert {layer.status for snapshot in monitor.history for layer in snapshot.layers} == {"ok"}


COPIES = [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), lambda one: pickle.loads(cloudpickle.dumps(one))]


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("options", [{}, {"mode": "async", "track_delta": True, "every_n_steps": 2}])
def test_a_monitor_is_copied_before_and_while_it_works(tmp_path, gate, make, options):
    monitor = Monitor(**options, sinks=[JsonLines(tmp_path / "run.jsonl")])
    copies = [make(monitor)]
    monitor.observe(LAYERS, step=0, whole=True)
    monitor.observe(LAYERS, step=1)
    copies.append(make(monitor))
    gate.set()
    monitor.close()
    for one, before in zip(copies, (0, 1 if options else 2), strict=True):
        assert len(one.history) == before
        one.observe(LAYERS, step=2)
        one.close()
        assert one.history.last.step == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_begins_with_a_fresh_background(gate):
    background = Background(lambda job: gate.wait(20) and job)
    background.put(1)
    while background._waiting:
        time.sleep(0.001)
    background._changed.acquire()  # as a thread of the parent may at that moment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running
        child = os.fork()
    if not child:
        gate.set()
        background.put(2)
        os._exit(0 if background.join(20) and background.next_done().result == 2 else 1)
    background._changed.release()
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    assert background.close(20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_analyses_while_a_thread_of_its_parent_computes_a_metric(gate, monkeypatch):
    computing, compute = threading.Event(), batch.correlation_space

    def slowly(*arguments):
        if threading.current_thread() is not threading.main_thread():
            computing.set()
            gate.wait(20)
        return compute(*arguments)

    monkeypatch.setattr(batch, "correlation_space", slowly)
    thread = threading.Thread(target=analyze_matrices, args=(LAYERS, Options(metrics=["erg_num"])))
    thread.start()
    assert computing.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running
        child = os.fork()
    if not child:
        signal.alarm(10)
        os._exit(analyze_matrices(LAYERS, Options(metrics=["erg_num"])).layers[0].status != "ok")
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    thread.join(20)


def test_two_analyses_at_once_give_the_thread_counts_back(allow_threads):
    allow_threads(2)
    layers = [matrix(name, draw(64, 48)) for name in "abc"]
    before = [pool["num_threads"] for pool in controller().info()]
    threads = [
        threading.Thread(target=lambda: [analyze_matrices(layers, Options()) for _ in range(5)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pool["num_threads"] for pool in controller().info()] == before


def test_a_loop_that_is_run_again_is_looked_at_though_its_only_look_was_at_step_0():
    monitor = Monitor(every_n_steps=100)
    sink = Memory()
    monitor.sinks.append(sink)
    for cell in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if cell == 0 else "ignore", SpectralWarning)
            for step in range(5):
                if monitor.due(step):
                    monitor.observe(LAYERS, step=step)
        monitor.close()
    assert steps_of(sink.history) == [0, 0]


@pytest.mark.parametrize("closed", [True, False])
def test_a_cell_of_one_step_that_is_run_again_is_looked_at_once_a_run(monkeypatch, closed):
    """However often it asks: batches are accumulated, and the weights may change while the step does not."""
    shell = types.SimpleNamespace(execution_count=1)
    if not closed:
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with Monitor(every_n_steps=100, sinks=[sink := Memory()]) as monitor:
        for cell in range(3):
            shell.execution_count = cell
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", SpectralWarning)
                for step in (7, 7, 7):
                    if monitor.due(step):
                        monitor.observe(LAYERS, step=step)
            assert ["the steps begin again at 7" in str(one.message) for one in caught] == [True] * (cell == 1)
            if closed:
                monitor.close()
    assert (steps_of(sink.history), steps_of(monitor.history)) == ([7, 7, 7], [7])


def test_a_run_that_goes_on_in_another_cell_does_not_begin_anew(monkeypatch):
    shell = types.SimpleNamespace(execution_count=1)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monitor = Monitor(every_n_steps=1)
    for cell, steps in enumerate([(0, 1, 2), (2, 3), (3, 4)]):
        shell.execution_count = cell
        for step in steps:
            if monitor.due(step):
                monitor.observe(LAYERS, step=step)
    assert steps_of(monitor.history) == [0, 1, 2, 3, 4]
    once, resumed = Monitor(every_n_steps=100), Monitor(every_n_steps=100)
    once.observe(LAYERS, step=5)
    resumed.load_state_dict(once.state_dict())
    shell.execution_count = 9
    assert not resumed.due(5)
    assert steps_of(resumed.history) == [5]


def test_in_a_tight_address_space_openblas_is_left_alone(monkeypatch):
    def none(*_):
        raise OSError(12, "Cannot allocate memory")

    used = []
    monkeypatch.setattr("ww_monitor.engine.threads.mmap", none)
    monkeypatch.setattr("ww_monitor.spectra.lapack._routine", lambda *a: used.append(a))
    snapshot = analyze_matrices([matrix("fc", draw(600, 520))], Options())
    assert ([layer.status for layer in snapshot.layers], used) == (["ok"], [])


# --- rules and sinks that misbehave


class Wordless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def test_a_rule_that_never_ends_costs_its_findings(monkeypatch):
    monkeypatch.setattr("ww_monitor.rules.holding.MOST_FINDINGS", 1000)

    def endless(history):
        while True:
            yield Finding("endless", "fc", "info", "again")

    with pytest.warns(SpectralWarning, match="rule endless failed: ValueError: apply_rules: expected at most 1,000"):
        assert Monitor(rules=[endless]).observe(LAYERS, step=0).findings == ()


def test_the_file_is_written_though_a_rule_a_sink_and_the_users_warnings_fail(tmp_path, monkeypatch):
    class Sink(Memory):
        def write(self, snapshot):
            raise Wordless

    def rule(history):
        raise Wordless

    def show(*arguments, **keywords):
        raise OSError("closed")

    monkeypatch.setattr(warnings, "showwarning", show)
    monitor = Monitor(rules=[rule], sinks=[Sink(), JsonLines(tmp_path / "run.jsonl")])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        for step in range(2):
            assert monitor.observe(LAYERS, step=step) is not None
    assert steps_of(monitor.history) == steps_of(History.read(tmp_path / "run.jsonl")) == [0, 1]


def test_the_file_is_written_before_another_sink_can_be_interrupted(tmp_path):
    class Sink(Memory):
        def write(self, snapshot):
            raise KeyboardInterrupt

    monitor = Monitor(sinks=[Sink(), JsonLines(tmp_path / "run.jsonl")])
    with pytest.raises(KeyboardInterrupt):
        monitor.observe(LAYERS, step=0)
    assert steps_of(History.read(tmp_path / "run.jsonl")) == [0]


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_a_sink_that_ends_the_program_as_it_is_closed_costs_no_line_that_waits(tmp_path, monkeypatch, end):
    class Sink(Memory):
        def close(self):
            raise end

    def full(file, data):
        raise OSError(28, "No space left on device")

    monitor = Monitor(sinks=[Sink(), JsonLines(tmp_path / "run.jsonl")])
    with monkeypatch.context() as disk:
        disk.setattr("ww_monitor.sinks.jsonl.os.write", full)
        with pytest.warns(SpectralWarning, match="sink JsonLines failed: OSError"):
            monitor.observe(LAYERS, step=0)
    with pytest.raises(type(end)):
        monitor.close()
    assert steps_of(History.read(tmp_path / "run.jsonl")) == [0]


def test_a_sink_that_cannot_be_compared_leaves_with_its_run_and_is_copied(tmp_path):
    class Sink(Memory):
        __hash__ = None

        def __eq__(self, other):
            raise TypeError("a table is neither true nor false")

    monitor = Monitor(sinks=[Sink()])
    session = Session(monitor, folder=tmp_path, print_line=None)
    monitor.observe(LAYERS, step=0)
    assert len(session.without_own().sinks) == 1
    session.close()
    assert len(monitor.sinks) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_ends_leaves_the_sinks_of_its_parents_run_open(tmp_path):
    class Sink(Memory):
        def close(self):
            (tmp_path / str(os.getpid())).touch()

    session = Session(Monitor(sinks=[Sink()]), folder=tmp_path, print_line=None)
    child = os.fork()
    if not child:
        session.close()  # as what was registered for the end of Python does
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    session.close()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_rules_that_are_objects_are_called_by_their_class_and_fail_one_by_one():
    class Odd:
        def __call__(self, history):
            raise ValueError("odd")

    class Other(Odd):
        pass

    with pytest.warns(SpectralWarning) as caught:
        Monitor(rules=[Odd(), Other()]).observe(LAYERS, step=0)
    assert [str(one.message) for one in caught] == [
        f"ww_monitor: rule {name} failed: ValueError: odd" for name in ("Odd", "Other")
    ]


def test_a_snapshot_that_cannot_be_turned_into_text_costs_itself_only(tmp_path, monkeypatch):
    text = Snapshot.to_json

    def fails(self):
        if self.step == 1:
            raise TypeError("no text")
        return text(self)

    monkeypatch.setattr(Snapshot, "to_json", fails)
    monitor = Monitor(sinks=[JsonLines(tmp_path / "run.jsonl")])
    monitor.observe(LAYERS, step=0)
    with pytest.warns(SpectralWarning, match="sink JsonLines failed: TypeError: no text"):
        monitor.observe(LAYERS, step=1)
    monitor.observe(LAYERS, step=2)
    assert steps_of(monitor.history) == [0, 1, 2]
    assert steps_of(History.read(tmp_path / "run.jsonl")) == [0, 2]


def test_a_job_that_ends_its_thread_costs_itself_only():
    def run(job):
        if job == 0:
            raise SystemExit(3)
        return job

    background = Background(run)
    background.put(0)
    assert background.join(20)
    background.put(1)
    assert background.join(20)
    with pytest.raises(SystemExit):
        background.next_done().get()
    assert background.next_done().get() == 1
    assert background.close(20)
