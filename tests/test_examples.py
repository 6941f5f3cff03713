"""Every example runs as a user runs it, and says what it promises. A new example is a new row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import once, run_in_forks
from ww_monitor import History

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOW = {"demo.py"}
"""Not run here: minutes long, and run by `make demo`."""

CASES = [
    # script, arguments beside --output, packages it needs, what it prints, history files it writes
    ("huggingface_gpt.py", ["--steps", "20"], ["transformers", "tensorboard"], "steps 0 to 20", ["ww_history.jsonl"]),
    ("keras_mlp.py", ["--epochs", "1"], ["keras", "sklearn", "tensorboard"], "steps 0 to 45", ["ww_history.jsonl"]),
    (
        "lightning_cnn.py",
        ["--epochs", "1"],
        ["pytorch_lightning", "sklearn", "tensorboard"],
        "steps 0 to 57",
        ["version_0/ww_history.jsonl"],
    ),
    ("lora.py", ["--steps", "20"], ["transformers", "peft"], "moved by 0.", ["adapter/ww_history.jsonl"]),
    ("pytorch_loop.py", ["--epochs", "1"], ["sklearn", "rich"], "steps 0 to 29", ["ww_history.jsonl"]),
]


@pytest.fixture(scope="session")
def ran(tmp_path_factory) -> Path:
    """Where each example has run, and beside it what it said."""

    def run(folder):
        commands = {name: [str(EXAMPLES / name), "--output", str(folder / name), *more] for name, more, *_ in CASES}
        run_in_forks(folder, commands, "ww_monitor", "sklearn.datasets", "transformers.trainer", COLUMNS="200")

    return once(tmp_path_factory, "examples", run)


@pytest.mark.parametrize(
    ("script", "needs", "prints", "writes"),
    [(name, *rest) for name, _, *rest in CASES],
    ids=[case[0] for case in CASES],
)
def test_example_runs(ran, script, needs, prints, writes):
    for package in needs:
        pytest.importorskip(package, reason=f"{package}, which the example is about, is not installed")
    done, folder = json.loads((ran / f"{script}.json").read_text()), ran / script
    assert done["status"] == 0, done["err"]
    assert "SpectralWarning" not in done["err"]
    assert prints in done["out"]
    assert [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.jsonl"))] == writes
    for path in writes:
        assert len(History.read(folder / path)) > 1


def test_every_example_is_short_and_run():
    scripts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {case[0] for case in CASES} == scripts.keys() - SLOW
    assert {name: lines for name, lines in scripts.items() if lines > 60}.keys() <= SLOW
