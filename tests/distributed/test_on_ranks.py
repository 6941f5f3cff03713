"""Models on two and four ranks give the snapshot of one process, on every rank, and a missing rank is named."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ww_monitor
from tests.distributed import models
from tests.processes import once, run_python
from ww_monitor.description import Rates
from ww_monitor.plan import plan_ranks
from ww_monitor.walk.sharded import even_shards
from ww_monitor.walk.torch import walk

ROOT = Path(__file__).resolve().parents[2]

TWO = (
    "ddp fsdp2 fsdp2_measured fsdp2_weightwatcher fsdp2_delta fsdp2_state fsdp2_bfloat16 tensor_parallel fsdp1"
    " fsdp1_flat zero3 experts pipeline broken_layer late_break strict bad_walker twice alone training counted"
    " counted_whole shares frozen"
)
FOUR = (
    "ddp fsdp2 tensor_parallel mixed hsdp data_and_tensor fsdp1 experts pipeline subgroup"
    " counted counted_replicas counted_mixed shares subgroup_shards"
)
ON_THE_WAY = ("killed_on_the_way_1_2", "killed_on_the_way_2_5")
MISSING = (
    *((4, name) for name in ("killed", "killed_in_shards", "killed_while_adding", *ON_THE_WAY)),
    (2, "hanging"),
)

MODELS = {
    "ddp": "net",
    "fsdp2": "net",
    "hsdp": "net",
    "fsdp1": "net",
    "fsdp1_flat": "net",
    "zero3": "chain",
    "tensor_parallel": "chain",
    "mixed": "chain",
    "data_and_tensor": "chain",
}
SAME = [(2, name) for name in TWO.split() if name in MODELS] + [(4, name) for name in FOUR.split() if name in MODELS]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the ranks have left what they saw."""
    jobs = [(2, TWO), (4, FOUR), *MISSING, (4, "killed_keeper"), (2, "memory memory_wide")]
    scenarios = [f"{world}:{','.join(names.split())}" for world, names in jobs]

    def run(folder):
        done = run_python("-m", "tests.distributed.job", str(folder), *scenarios, folder=ROOT)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "ranks", run)


@pytest.fixture(scope="session")
def on_ranks(folder):
    """Rank → what it saw of a scenario; nothing of a rank that was killed."""

    def analyze(world, scenario):
        files = {rank: folder / f"{scenario}-{world}-{rank}.pkl" for rank in range(world)}
        return {rank: pickle.loads(file.read_bytes()) for rank, file in files.items() if file.exists()}

    return analyze


@pytest.fixture(scope="session")
def seen(on_ranks):
    """What each rank saw, none of which is missing."""

    def analyze(world, scenario):
        found = on_ranks(world, scenario)
        assert len(found) == world
        return list(found.values())

    return analyze


@pytest.fixture(scope="session")
def alone():
    """The snapshot of a model in one process."""
    return {name: ww_monitor.analyze(getattr(models, name)(), min_size=3) for name in ("net", "chain")}


def metrics(snapshot):
    return {(layer.name, name): value for layer in snapshot.layers for name, value in layer.metrics.items()}


# --- the snapshot of one process


@pytest.mark.parametrize(("world", "scenario"), SAME)
def test_alpha_is_that_of_one_process(seen, alone, world, scenario):
    snapshot, expected = seen(world, scenario)[0], alone[MODELS[scenario]]
    alphas = [[layer.value("alpha") for layer in one.layers] for one in (snapshot, expected)]
    assert alphas[0] == pytest.approx(alphas[1], rel=1e-9, nan_ok=True)


def test_a_state_dict_in_shards_gives_what_the_whole_one_does(seen):
    for snapshot, whole in seen(2, "fsdp2_state"):
        assert [layer.name for layer in whole.layers] == ["embedding", "up", "down", "plain", "up.lora[default]"]
        assert metrics(snapshot) == pytest.approx(metrics(whole), rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(("world", "scenario"), SAME)
def test_every_metric_is_that_of_one_process(seen, alone, world, scenario):
    snapshot, expected = seen(world, scenario)[0], alone[MODELS[scenario]]
    assert metrics(snapshot) == pytest.approx(metrics(expected), rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(("world", "scenario"), SAME)
def test_every_rank_can_tell_the_drift_of_every_layer(seen, alone, world, scenario):
    for snapshot in seen(world, scenario):
        for layer, expected in zip(snapshot.layers, alone[MODELS[scenario]].layers, strict=True):
            assert layer.sketch == (None if expected.sketch is None else pytest.approx(expected.sketch, abs=1e-6))


@pytest.mark.parametrize(("world", "scenario"), SAME)
def test_layers_statuses_and_what_was_left_out_are_those_of_one_process(seen, alone, world, scenario):
    snapshot, expected = seen(world, scenario)[0], alone[MODELS[scenario]]
    rows = [
        [(row.name, row.kind, row.role, row.shape, row.status, row.verdict, row.trap_entries) for row in one.layers]
        for one in (snapshot, expected)
    ]
    assert rows[0] == rows[1]
    assert snapshot.skipped == expected.skipped


@pytest.mark.parametrize(("world", "scenario"), SAME)
def test_findings_are_those_of_one_process(seen, alone, world, scenario):
    expected = alone[MODELS[scenario]].findings
    assert seen(world, scenario)[0].findings == expected
    assert expected


@pytest.mark.parametrize(("world", "scenario"), [*SAME, (2, "experts"), (4, "pipeline"), (2, "broken_layer")])
def test_every_rank_has_the_same_snapshot(seen, world, scenario):
    found = seen(world, scenario)
    assert len({snapshot.to_json() for snapshot in found}) == 1
    assert len({repr([layer.eigenvalues for layer in snapshot.layers]) for snapshot in found}) == 1


def test_the_model_has_a_layer_of_each_status(alone):
    """Or the comparisons would not reach the paths that read whole weights."""
    assert {"ok", "zero", "not_finite"} <= {layer.status for layer in alone["net"].layers}
    assert alone["net"]["trap"].value("num_traps") > 0
    assert alone["net"]["wide_trap"].value("num_traps") > 0
    assert any(item.reason == "tied to embedding" for item in alone["net"].skipped)


def test_half_precision(seen):
    expected = ww_monitor.analyze(models.net().bfloat16(), min_size=3)
    assert metrics(seen(2, "fsdp2_bfloat16")[1]) == pytest.approx(metrics(expected), rel=1e-6, abs=1e-9, nan_ok=True)


def test_weightwatchers_preset(seen):
    expected = ww_monitor.analyze(models.chain(), min_size=3, preset="weightwatcher")
    assert metrics(seen(2, "fsdp2_weightwatcher")[1]) == pytest.approx(metrics(expected), rel=1e-9, nan_ok=True)


def test_the_difference_of_two_sharded_models(seen):
    model, base = models.chain(), models.chain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.cos())
    expected = ww_monitor.analyze(model, base=base, min_size=3)
    assert metrics(seen(2, "fsdp2_delta")[0]) == pytest.approx(metrics(expected), rel=1e-6, nan_ok=True)


def test_a_measurement_that_is_not_declared_gram_only_is_made_on_the_real_weights(seen):
    """Shards are gathered for it; a stand-in full of ones would show."""
    expected = {name: float(weight.flatten()[0]) for name, weight in models.chain().state_dict().items()}
    for layer in seen(2, "fsdp2_measured")[0].layers:
        assert layer.value("corner") == expected[f"{layer.name}.weight"]
        assert layer.value("alpha") > 1


def test_training_goes_on_in_the_same_bits(seen):
    assert seen(2, "training") == [[True] * 9] * 2


def test_a_call_on_one_rank_alone_says_what_to_do(seen):
    snapshot = seen(2, "alone")[0]
    assert not snapshot.layers
    why = "ValueError: spread over ranks; expected across_ranks=True, and the same call on each of them"
    assert {item.reason for item in snapshot.skipped} == {f"could not be read: {why}"}


# --- ranks that differ


@pytest.mark.parametrize("world", [2, 4])
def test_experts_with_one_name_have_a_row_each(seen, world):
    snapshot = seen(world, "experts")[0]
    assert [layer.name for layer in snapshot.layers] == ["router", *(f"expert@rank{rank}" for rank in range(world))]
    torch.manual_seed(10 + world - 1)
    expected = ww_monitor.analyze(nn.Linear(30, 40)).layers[0].value("alpha")
    assert snapshot[f"expert@rank{world - 1}"].value("alpha") == pytest.approx(expected, rel=1e-9)


def test_stages_are_put_together_and_one_has_no_matrix(seen):
    snapshot = seen(4, "pipeline")[3]
    assert [layer.name for layer in snapshot.layers] == ["stage0", "also0", "stage1", "also1", "stage2", "also2"]


def test_groups_of_ranks_have_models_of_their_own(seen):
    shapes = [snapshot.layers[0].shape for snapshot in seen(4, "subgroup")]
    assert shapes == [(1, 40, 30), (1, 40, 31), (1, 40, 30), (1, 40, 31)]


def test_groups_of_ranks_have_shards_of_their_own(seen):
    for rank, snapshot in enumerate(seen(4, "subgroup_shards")):
        torch.manual_seed(rank // 2)
        expected = ww_monitor.analyze(nn.Linear(30, 41)).layers[0].value("alpha")
        assert snapshot.layers[0].value("alpha") == pytest.approx(expected, rel=1e-9)


def test_steps_and_epochs_are_those_of_the_call(seen):
    first, second = seen(2, "twice")[0]
    assert [(snapshot.step, snapshot.epoch) for snapshot in (first, second)] == [(3, 1), (4, None)]
    assert {layer.step for layer in second.layers} == {4}


# --- what fails on one rank


def unread(snapshot):
    return {item.name: item.reason for item in snapshot.skipped}


def test_a_shard_that_cannot_be_read_costs_its_row(seen, alone):
    snapshot = seen(2, "broken_layer")[0]
    assert unread(snapshot)["up"] == "could not be read: ValueError: cannot be read on rank 1"
    assert snapshot["down"].value("alpha") == pytest.approx(alone["chain"]["down"].value("alpha"), rel=1e-9)


def test_a_replica_that_cannot_be_read_is_analysed_elsewhere(seen):
    snapshot = seen(2, "broken_layer")[0]
    assert snapshot["there"].status == "ok"
    assert unread(snapshot)["nowhere"].startswith("could not be read: ValueError: cannot be read on rank ")


@pytest.mark.parametrize("layer", ["up", "down"])
def test_a_shard_that_breaks_while_it_is_read_costs_its_row(seen, alone, layer):
    snapshot = seen(2, "late_break")[0]
    assert unread(snapshot)[layer] == "could not be read: ValueError: cannot be read on rank 1"
    assert snapshot["plain"].value("alpha") == pytest.approx(alone["chain"]["plain"].value("alpha"), rel=1e-9)


def test_strict_raises_on_every_rank(seen):
    for error in seen(2, "strict"):
        assert isinstance(error, ww_monitor.errors.LayerError)
        assert "layer 'broken': expected finite weights, got 1 NaN" in str(error)


def test_a_walker_that_fails_is_told_to_the_others(seen):
    other, own = seen(2, "bad_walker")
    assert str(other) == "analysis over 2 ranks: rank 1 could not list its matrices: KeyError: 'of rank 1'"
    assert isinstance(own, KeyError)


# --- ranks that are missing


@pytest.mark.parametrize(
    ("scenario", "waited", "said"),
    [
        ("killed", "the rows of the others", "analysing layer 'expert@rank1'"),
        ("killed_in_shards", "the shards of layer '\\w+'", "reading its shard of layer 'down'"),
        ("killed_while_adding", "the shards of layer '\\w+'", "adding a shard of layer '\\w+'"),
    ],
)
def test_the_others_name_a_rank_that_was_killed(on_ranks, scenario, waited, said):
    found = on_ranks(4, scenario)
    assert sorted(found) == [0, 2, 3]
    for rank, (kind, message, seconds, _, _) in found.items():
        assert kind == "RankFailed"
        assert re.search(f"rank {rank} expected {waited} within 20 s; rank 1 is missing: it was last {said}", message)
        assert seconds < 20


@pytest.mark.parametrize("scenario", ON_THE_WAY)
def test_a_rank_that_was_killed_while_it_waited_is_named_by_all_others(on_ranks, scenario):
    """Also by those that wait for one of the living, and by those that the dead one waited for."""
    found, victim = on_ranks(4, scenario), int(scenario.split("_")[-2])
    assert sorted(found) == [rank for rank in range(4) if rank != victim]
    for kind, message, seconds, _, _ in found.values():
        assert kind == "RankFailed"
        named = re.findall(r"rank (\d) is missing: it was last waiting for the shards of layer", message)
        assert named == [str(victim)]
        assert seconds < 20


def test_if_the_first_rank_takes_the_words_of_all_with_it_that_is_said(on_ranks):
    found = on_ranks(4, "killed_keeper")
    assert sorted(found) == [1, 2, 3]
    said = "; rank 0 of the job may be missing: the store, which it keeps in most jobs, does not answer ("
    for kind, message, seconds, _, _ in found.values():
        assert kind == "RankFailed"
        assert said in message
        assert seconds < 20


def test_a_rank_that_hangs_is_named_after_the_timeout(on_ranks):
    kind, message, seconds, _, _ = on_ranks(2, "hanging")[0]
    assert kind == "RankFailed"
    assert "rank 1 is missing: it was last analysing layer 'expert@rank1'" in message
    assert 2 <= seconds < 4.5


@pytest.mark.parametrize(("world", "scenario"), MISSING)
def test_a_further_call_fails_at_once_with_the_same_message(on_ranks, world, scenario):
    _, first, _, second, seconds = on_ranks(world, scenario)[0]
    assert (first, seconds < 0.1) == (second, True)


# --- what is sent


LARGE = sum(parameter.nbytes for parameter in models.large().parameters())


def sent(found, name=None):
    return sum(bytes if name in (None, key) else 0 for counter, _ in found for key, bytes in counter.items())


@pytest.mark.parametrize(
    ("world", "scenario"),
    [(2, "counted"), (4, "counted"), (2, "counted_whole"), (4, "counted_replicas"), (4, "counted_mixed")],
)
def test_all_that_is_sent_is_little_more_than_the_weights(seen, world, scenario):
    """The lists, the orders and the rows counted too, though they are small for larger models only."""
    assert 0.4 * LARGE < sent(seen(world, scenario)) < 1.1 * LARGE


@pytest.mark.parametrize(("world", "scenario"), [(2, "counted"), (4, "counted")])
def test_the_weights_that_are_sent_are_those_of_the_plan(seen, world, scenario):
    planned = plan_ranks(walk(models.large(), layout=even_shards), world, rates=Rates(1e9, 1e9))
    assert [counter["send"] for counter, _ in seen(world, scenario)] == planned.bytes_sent.tolist()


@pytest.mark.parametrize(
    ("world", "scenario"), [(2, "counted"), (4, "counted"), (4, "counted_replicas"), (4, "counted_mixed")]
)
def test_matrices_of_several_blocks_are_those_of_one_process(seen, world, scenario):
    expected = ww_monitor.analyze(models.large(), min_size=3)
    assert metrics(seen(world, scenario)[0][1]) == pytest.approx(metrics(expected), rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("world", [2, 4])
def test_a_plan_cuts_weights_as_fsdp2_does(seen, world):
    """Also where a rank gets nothing, and where a matrix is a part of its tensor."""
    for one in seen(world, "shares"):
        for found, planned in one.values():
            assert planned == (found if all(map(len, found)) else None)


def test_frozen_weights_are_neither_sent_nor_analysed_again(seen):
    found = seen(2, "frozen")
    for steps, _, _ in found:
        made = [(one["tall"], one["wide"], one["square"]) for one in steps]
        assert made == [(0, 0, 0), (0, 0, 1), (2, 0, 2), (2, 0, 3)]
    first, trained, changed, again = (sum(one[1][look] for one in found) for look in range(4))
    assert trained == again < changed < first


# --- memory


WEIGHTS, GRAM = 24000 * 1000 * 4, 1000 * 1000 * 8


def test_shards_of_rows_take_a_gram_matrix_and_little_more(on_ranks):
    """The Gram matrix, in which the solver works, and blocks."""
    assert max(on_ranks(2, "memory").values()) < GRAM + 14e6


def test_gathered_weights_are_in_memory_once_and_one_at_a_time(on_ranks):
    """Two of the three matrices are one rank's; the engine takes one Gram matrix, blocks, and BLAS its buffers."""
    assert max(on_ranks(2, "memory_wide").values()) < WEIGHTS + GRAM + 10e6
