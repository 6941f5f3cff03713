"""A tenth of the campaign of hostile files, each in a process of its own; all of it is `benchmarks.faults.files`."""

import json
import sys

import pytest

from tests.processes import run_python


@pytest.mark.skipif(sys.platform != "linux", reason="its processes ask the system for their memory")
def test_hostile_files_give_one_error_of_ours_run_no_code_and_take_little_memory():
    pytest.importorskip("h5py", reason="some of the files are HDF5")
    pytest.importorskip("safetensors", reason="some of the files are")
    done = run_python("-W", "ignore", "-m", "benchmarks.faults.files", "--quick")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == {}
    assert result["tried"] == result["survived"] >= 30
