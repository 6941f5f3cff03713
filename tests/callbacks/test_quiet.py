"""Nothing that others print comes through us: TensorFlow greets whoever makes PyTorch's TensorBoard writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_python

GREETING = "TensorFlow greets"
NEEDS = {
    "lightning": ["pytorch_lightning", "tensorboard"],
    "huggingface": ["transformers", "accelerate", "tensorboard"],
    "keras": ["keras", "tensorboard"],
}


@pytest.mark.parametrize("trainer", NEEDS)
def test_a_run_with_the_callback_prints_not_one_line_more(trainer):
    for package in NEEDS[trainer]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    done = run_python(str(Path(__file__).with_name("quiet_run.py")), trainer, KERAS_BACKEND="torch")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["without"]
    assert found["without"].count(GREETING) == (trainer != "keras"), "the trainer's own logger lets it greet"
    # Keras puts the values of callbacks at the end of its own line
    assert [line.partition(" - ww_")[0] for line in found["with"]] == found["without"]
