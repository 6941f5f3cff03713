"""Every example runs as a user runs it, and says what it promises. A new example is a new row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_python
from ww_monitor import History

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOW = {"demo.py"}
"""Not run here: minutes long, and run by `make demo`."""

CASES = [
    # script, arguments beside --output, packages it needs, what it prints, history files it writes
    ("huggingface_gpt.py", ["--steps", "40"], ["transformers", "tensorboard"], "steps 0 to 40", ["ww_history.jsonl"]),
    ("keras_mlp.py", ["--epochs", "2"], ["keras", "sklearn", "tensorboard"], "steps 0 to 90", ["ww_history.jsonl"]),
    (
        "lightning_cnn.py",
        ["--epochs", "2"],
        ["pytorch_lightning", "sklearn", "tensorboard"],
        "steps 0 to 114",
        ["version_0/ww_history.jsonl"],
    ),
    ("lora.py", ["--steps", "20"], ["transformers", "peft"], "moved by 0.", ["adapter/ww_history.jsonl"]),
    ("pytorch_loop.py", ["--epochs", "2"], ["sklearn", "rich"], "steps 0 to 58", ["ww_history.jsonl"]),
]


@pytest.mark.parametrize(("script", "arguments", "needs", "prints", "writes"), CASES, ids=[case[0] for case in CASES])
def test_example_runs(tmp_path, script, arguments, needs, prints, writes):
    for package in needs:
        pytest.importorskip(package, reason=f"{package}, which the example is about, is not installed")
    command = [str(EXAMPLES / script), "--output", str(tmp_path), *arguments]
    done = run_python(*command, folder=tmp_path, timeout=180, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "SpectralWarning" not in done.stderr
    assert prints in done.stdout
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.jsonl"))] == writes
    for path in writes:
        assert len(History.read(tmp_path / path)) > 1


def test_every_example_is_short_and_run():
    scripts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {case[0] for case in CASES} == scripts.keys() - SLOW
    assert {name: lines for name, lines in scripts.items() if lines > 60}.keys() <= SLOW
