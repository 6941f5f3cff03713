"""The suite does not depend on a card that the machine may have: only tests marked `gpu` compute there."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import torch

from tests.processes import environment, run_python

TESTS = Path(__file__).parent
SOURCES = [path for path in sorted(TESTS.rglob("*.py")) if "extras" not in path.parts]  # those run without pytest
STARTING = re.compile(
    r"^(subprocess\.(run|Popen|call|check_call|check_output|getoutput|getstatusoutput)"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)"
    r"|(\w+\.)*(ProcessPoolExecutor|spawn|start_processes|get_context)"
    r"|(multiprocessing|mp)\.(Process|Pool))$"
)


def calls(text: str) -> list[str]:
    """The dotted names of everything that is called."""
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]


def test_processes_are_started_in_one_place():
    starting = {path.name for path in SOURCES if any(map(STARTING.match, calls(path.read_text(encoding="utf-8"))))}
    assert starting == {"processes.py"}


@pytest.mark.parametrize(
    "code", ["subprocess.run([])", "subprocess.Popen([])", "os.execv('a', [])", "torch.multiprocessing.spawn(f)"]
)
def test_a_process_that_is_started_elsewhere_is_found(code):
    assert any(map(STARTING.match, calls(code)))


def test_a_started_process_sees_no_card(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    done = run_python("-c", "import os, torch; print([os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda.device_count()])")
    assert done.stdout.strip() == "['', 0]", done.stderr


def test_what_a_test_adds_joins_the_environment():
    done = run_python("-c", "import os; print(os.environ['WW_ADDED'], os.environ['OMP_NUM_THREADS'])", WW_ADDED="yes")
    assert done.stdout.split() == ["yes", "1"]


@pytest.mark.parametrize(
    ("trains", "on_the_cpu"), [(r"\bTrainer\(", r"accelerator|use_cpu"), (r"TrainingArguments\(", r"use_cpu")]
)
def test_every_trainer_in_a_test_is_told_to_use_the_cpu(trains, on_the_cpu):
    """A card that it finds would train there, with other last digits."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in SOURCES if path != Path(__file__)}
    training = {name for name, text in texts.items() if re.search(trains, text)}
    assert len(training) > 3
    assert {name for name in training if not re.search(on_the_cpu, texts[name])} == set()


def test_keras_is_told_to_use_the_cpu():
    pytest.importorskip("keras", reason="keras is not installed")
    if os.environ["KERAS_BACKEND"] != "torch":
        pytest.skip("another backend was asked for")
    from keras.src.backend.torch import core

    assert core.get_device() == "cpu"


def test_a_benchmark_plugin_in_the_environment_does_not_break_the_run(tmp_path):
    """pytest-benchmark before 5.3 warns under xdist as soon as it is loaded, and here warnings are errors."""
    (tmp_path / "noisy.py").write_text("raise RuntimeError('loaded')\n", encoding="utf-8")
    facts = tmp_path / "noisy-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Name: noisy\nVersion: 1\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text("[pytest11]\nbenchmark = noisy\n", encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    one = str(TESTS / "test_schedule.py")
    done = run_python("-m", "pytest", "--collect-only", "-q", one, folder=TESTS.parent, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
def test_a_test_that_is_marked_has_a_card():
    assert torch.zeros(1, device="cuda").is_cuda
