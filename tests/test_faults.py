"""The campaign of faults, a few of each kind, some in processes of their own; `make faults` has all of them."""

import json
import sys

import pytest

from benchmarks.faults import disk, ends, folders, misbehaviour
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


@pytest.mark.skipif(not hasattr(disk.os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*")
@pytest.mark.parametrize("part", [disk, misbehaviour, folders, ends], ids=lambda part: part.__name__)
def test_of_a_few_faults_of_each_kind_all_are_survived(part):
    counts = part.run(quick=True)
    assert {what: survived for what, (_, survived) in counts.items()} == {
        what: tried for what, (tried, _) in counts.items()
    }
    assert sum(tried for tried, _ in counts.values()) > 5
