"""What the ranks conclude from what each holds."""

import pickle
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ww_monitor.distributed.inventory import Held, checksum, describe, merge
from ww_monitor.engine.measure import needs_weights
from ww_monitor.engine.options import Options
from ww_monitor.errors import WWMonitorError
from ww_monitor.matrix import Matrix, Shards, Skipped
from ww_monitor.spectra.elements import Moments


def held(name, rank, content, **fields):
    return Held(name, "dense", (1, 30, 20), ranks=(rank,), content=content, **fields)


def listed(jobs):
    return [(job.name, job.holders) for job in jobs]


def test_replicas_are_one_job_of_all_their_holders():
    jobs, _ = merge([[held("fc", rank, 7)] for rank in range(3)])
    assert listed(jobs) == [("fc", [0, 1, 2])]


def test_experts_with_replicas_are_named_by_their_first_rank():
    jobs, _ = merge([[held("expert", rank, 7 + rank % 2)] for rank in range(4)])
    assert listed(jobs) == [("expert@rank0", [0, 2]), ("expert@rank1", [1, 3])]


def test_a_convolution_in_groups_is_read_whole_since_a_sum_over_its_groups_has_no_norm_of_one():
    matrix = Matrix("conv", "conv", (1, 40, 12), lambda: torch.ones(1, 40, 12), groups=(4, 1))
    [job], _ = merge([describe([matrix], 0, [0])])
    sums = Moments(*torch.ones(len(fields(Moments)), 1, dtype=torch.float64))
    assert needs_weights(job.matrix, sums, Options(metrics=["rms_norm"]))
    assert not needs_weights(replace(job.matrix, groups=(1, 1)), sums, Options(metrics=["rms_norm"]))


def test_the_order_is_that_of_the_first_holder():
    jobs, _ = merge([[held("a", 0, 1), held("c", 0, 3)], [held("b", 1, 2), held("c", 1, 3)]])
    assert [job.name for job in jobs] == ["a", "c", "b"]


def test_a_replica_that_cannot_be_read_is_held_by_the_others():
    jobs, _ = merge([[held("fc", 0, None, error="ValueError: no")], [held("fc", 1, 7)]])
    assert listed(jobs) == [("fc", [1])]


def test_what_nobody_can_read_has_the_reason_of_its_owner():
    [job], _ = merge([[held("fc", rank, None, error="ValueError: no")] for rank in range(2)])
    assert job.error(1) == "ValueError: no on rank 1"


def test_what_one_rank_has_is_not_left_out():
    jobs, skipped = merge([[Held("fc", "dense", (), reason="packed")], [held("fc", 1, 7)]])
    assert listed(jobs) == [("fc", [1])]
    assert skipped == []


def test_what_all_leave_out_is_left_out_once():
    _, skipped = merge([[Held("fc", "dense", (4, 4), reason="small")]] * 2)
    assert [(item.name, item.reason) for item in skipped] == [("fc", "small")]


def test_a_rank_that_lacks_what_others_hold_with_it_is_named():
    shard = Held("fc", "dense", (1, 30, 20), ranks=(0, 1), sharded=True)
    with pytest.raises(WWMonitorError, match=r"layer 'fc': expected it on the ranks \[0, 1\]; rank \[1\]"):
        merge([[shard], []])


def test_shards_outside_the_group_are_named():
    matrix = Matrix("fc", "dense", (1, 30, 20), lambda: None, shards=Shards((0, 5)))
    with pytest.raises(WWMonitorError, match=r"layer 'fc'.*on the ranks of the group, \[0, 1\]; got some on \[5\]"):
        describe([matrix], 0, [0, 1])


def test_a_message_names_many_ranks_once():
    def message(world):
        shards = Shards(tuple(range(world)))
        items = [Matrix(f"layer {k}", "dense", (1, 8, 8), torch.zeros, shards=shards) for k in range(100)]
        return len(pickle.dumps(describe(items, 0, range(world))))

    assert message(1000) - message(10) < 10_000


def test_a_load_that_raises_is_an_error_of_that_layer():
    def load():
        raise ValueError("no weights")

    found = describe([Matrix("fc", "dense", (1, 3, 2), load), Skipped("bias", "other", (3,), "flat")], 0, [0, 1])
    assert [(one.error, one.reason) for one in found] == [("ValueError: no weights", None), ("", "flat")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_checksum_sees_one_bit_and_the_order_of_rows(dtype):
    weights = torch.arange(24.0).view(2, 4, 3).to(dtype)
    changed = weights.clone()
    changed.view(torch.uint8)[1, 2, 0] ^= 1
    sums = {int(checksum(one)) for one in (weights, changed, weights.flip(1), weights.flip(0))}
    assert len(sums) == 4


@given(st.integers(1, 3), st.integers(1, 900), st.integers(1, 900))
def test_the_checksum_is_that_of_the_definition(slices, rows, columns):
    weights = torch.randn(slices, rows, columns)
    bits = weights.view(torch.int32).long().sum(2).flatten()
    assert int(checksum(weights)) == int((bits * torch.arange(1, len(bits) + 1)).sum())
    assert int(checksum(weights.mT.contiguous().mT)) == int(checksum(weights))
