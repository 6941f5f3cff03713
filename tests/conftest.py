"""What the tests share: the folder of reference values and data, and the peer tool in a process of its own."""

import gc
import json
import os
import struct
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.processes import ask_python

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure():
    torch.set_num_threads(1)
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported, whichever test does that first
    os.environ["KERAS_TORCH_DEVICE"] = "cpu"  # or keras makes its weights on a card that it finds
    if find_spec("hypothesis") is not None:
        from hypothesis import settings

        # CI draws the same examples each time; elsewhere every run searches anew.
        settings.register_profile("ci", derandomize=True, deadline=None)
        if os.environ.get("CI"):
            settings.load_profile("ci")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()
    try:
        return (yield)
    finally:
        _keep()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    modules = len(sys.modules)
    try:
        return (yield)
    finally:
        if len(sys.modules) > modules + 100:  # a framework
            _keep()


def _keep():
    """Spare the collector what is there by now: above all a million objects of frameworks, which stay to the end.

    Frameworks have it look through them all after each run, for half a second each time.
    """
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path):
    """Keep doctest from importing the scripts that tests run in processes and environments of their own."""
    is_script = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if is_script else None


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _card_in_turns(request, tmp_path_factory):
    """Tests on a card have it to themselves, whichever worker of pytest runs them: they measure and fill its memory."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    from filelock import FileLock  # torch needs it too

    base = tmp_path_factory.getbasetemp()
    with FileLock((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "card.lock"):
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def allow_threads(monkeypatch):
    """A function: let torch, and so the analysis, have so many threads, however many cores there are."""
    before = torch.get_num_threads()

    def allow(count, *, cores=None):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores or count), raising=False)
        torch.set_num_threads(count)

    yield allow
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared():
    """The folder with reference values and data beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with reference values and data is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def run_weightwatcher():
    """Call `answer(weightwatcher, question)` of a source text in the peer tool's own process, both ends as JSON."""
    if find_spec("weightwatcher") is None:
        pytest.skip("weightwatcher, the peer tool, is not installed")
    with ask_python(Path(__file__).with_name("weightwatcher_process.py")) as ask:

        def run(source, question):
            reply = ask(source, question)
            assert "answer" in reply, reply["failure"]
            return reply["answer"]

        yield run


@pytest.fixture
def read_wandb():
    """What the one offline W&B run in a folder wrote, after it has been finished: rows, steps, alerts and files."""

    def read(folder):
        (path,) = folder.glob("**/*.wandb")
        for _ in range(200):
            records = list(_wandb_records(path.read_bytes()))
            if any(record.WhichOneof("record_type") == "exit" for record in records):
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"{path} has no record of an exit after ten seconds")
        of_kind = {kind: [r for r in records if r.WhichOneof("record_type") == kind] for kind in _WANDB_KINDS}
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in of_kind["history"]
        ]
        metrics = [record.metric for record in of_kind["metric"]]
        return {
            "rows": rows,
            "steps": [(metric.glob_name or metric.name, metric.step_metric) for metric in metrics],
            "alerts": [(r.alert.title, r.alert.text, r.alert.level) for r in of_kind["alert"]],
            "files": [file.path for record in of_kind["files"] for file in record.files.files],
        }

    return read


_WANDB_KINDS = ("history", "metric", "alert", "files")


def _wandb_records(data):
    """The whole protobuf records of a `.wandb` file: a LevelDB log of 32 KiB blocks after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    if len(data) < 7:
        return
    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    position, block, whole = 7, 32768, b""
    while position + 7 <= len(data):
        left = block - position % block
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or (size == 0 and kind == 0):
            position += left
            continue
        if position + 7 + size > len(data):
            return  # W&B's own process is still writing this record: the caller reads again
        whole = (b"" if kind in (1, 2) else whole) + data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
