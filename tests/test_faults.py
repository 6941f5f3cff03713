"""The campaign of faults, a few of each kind; `make faults` has all of them."""

import pytest

from benchmarks.faults import disk, misbehaviour


@pytest.mark.skipif(not hasattr(disk.os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("part", [disk, misbehaviour], ids=lambda part: part.__name__)
def test_of_a_few_faults_of_each_kind_all_are_survived(part):
    counts = part.run(quick=True)
    assert {what: survived for what, (_, survived) in counts.items()} == {
        what: tried for what, (tried, _) in counts.items()
    }
    assert all(tried for tried, _ in counts.values())
