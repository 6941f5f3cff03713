"""Nothing that others print comes through us: TensorFlow greets whoever makes PyTorch's TensorBoard writer."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import once, run_python

GREETING = "TensorFlow greets"
NEEDS = {
    "lightning": ["pytorch_lightning", "tensorboard"],
    "huggingface": ["transformers", "accelerate", "tensorboard"],
    "keras": ["keras", "tensorboard"],
}


@pytest.fixture(scope="session")
def printed(tmp_path_factory):
    """Trainer that is installed → the lines that it has printed with the callback and without."""

    def run(folder):
        there = [name for name, packages in NEEDS.items() if all(map(find_spec, packages))]
        done = run_python(str(Path(__file__).with_name("quiet_run.py")), *there, KERAS_BACKEND="torch")
        assert done.returncode == 0, done.stderr
        (folder / "lines.json").write_text(done.stdout.splitlines()[-1])

    return json.loads((once(tmp_path_factory, "quiet", run) / "lines.json").read_text())


@pytest.mark.parametrize("trainer", NEEDS)
def test_a_run_with_the_callback_prints_not_one_line_more(printed, trainer):
    for package in NEEDS[trainer]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    found = printed[trainer]
    assert found["without"]
    assert found["without"].count(GREETING) == (trainer != "keras"), "the trainer's own logger lets it greet"
    # Keras puts the values of callbacks at the end of its own line
    assert [line.partition(" - ww_")[0] for line in found["with"]] == found["without"]
