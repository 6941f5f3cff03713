"""What the tests share: the folder of reference values and data, and the peer tool in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure():
    torch.set_num_threads(1)
    if find_spec("hypothesis") is not None:
        from hypothesis import settings

        # CI draws the same examples each time; elsewhere every run searches anew.
        settings.register_profile("ci", derandomize=True, deadline=None)
        if os.environ.get("CI"):
            settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared():
    """The folder with reference values and data beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with reference values and data is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def run_weightwatcher():
    """Call `answer(weightwatcher, question)` of a source text in a process of its own, both ends as JSON.

    Importing weightwatcher silences every warning and reconfigures the root logger, so it stays out of this process.
    """
    if find_spec("weightwatcher") is None:
        pytest.skip("weightwatcher, the peer tool, is not installed")

    def run(source, question):
        frame = (
            "import contextlib, io, json, sys\n"
            "with contextlib.redirect_stdout(io.StringIO()):\n"
            "    import weightwatcher\n"
            f"{source}\n"
            "question = json.load(sys.stdin)\n"
            "with contextlib.redirect_stdout(io.StringIO()):\n"
            "    result = answer(weightwatcher, question)\n"
            "print(json.dumps(result))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", frame], input=json.dumps(question), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
