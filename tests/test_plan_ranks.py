"""A plan for many ranks says what they would do."""

import json
import os
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ww_monitor.description import Rates, plan_matrices
from ww_monitor.distributed.inventory import Held
from ww_monitor.distributed.orders import Decision
from ww_monitor.engine import Options
from ww_monitor.errors import InvalidArgument, MissingDependency
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.plan import BUILT_IN, configured, models, plan_ranks
from ww_monitor.settings import Select
from ww_monitor.walk.sharded import EvenShards, even_shards
from ww_monitor.walk.torch import walk

RATES = Rates(gram=2e10, solve=8e9)
MIXED = [(1, 40, 24), (1, 24, 40), (1, 16, 16), (1, 9, 30), (1, 100, 8), (9, 12, 10)]
GPT2_48 = [(1, *shape) for shape in [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12]


def matrix(shape, name="w", shards=None):
    return Matrix(name, "dense", shape, lambda: pytest.fail("a weight was read"), shards=shards)


def model(shapes):
    return [matrix(shape, f"w{i}") for i, shape in enumerate(shapes)]


def planned(shapes, world, **options):
    return plan_ranks(model(shapes), world, rates=RATES, **options)


# --- configurations

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TINY = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64, "n_inner": 80},
    "llama": DECODER,
    "qwen2": {**DECODER, "tie_word_embeddings": True},
    "phi3": DECODER,
    "mixtral": {**DECODER, "num_local_experts": 3},
    "qwen3_moe": {
        **DECODER, "num_experts": 9, "moe_intermediate_size": 24, "mlp_only_layers": [0], "decoder_sparse_step": 2,
    },
    "bert": {**DECODER, "num_key_value_heads": 4},
    "vit": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
"""Causal ones, fused, mixtures, tied, one that is none, and one that knows no words."""


def test_a_module_on_the_meta_device_is_planned_as_one_that_is_there():
    def net(device):
        return nn.Sequential(nn.Linear(100, 300, device=device), nn.Conv2d(3, 16, 3, device=device))

    rates = Rates(gram=2e10, solve=8e9)
    here, there = (plan_ranks(net(device), 4, rates=rates) for device in ("cpu", "meta"))
    of_state = plan_ranks(nn.Linear(100, 300, device="meta").state_dict(), 4, rates=rates)
    assert of_state.overall() == plan_ranks(nn.Linear(100, 300), 4, rates=rates).overall()
    wide, named = (plan_ranks(net("meta"), 4, rates=rates, dtype=dtype) for dtype in (torch.float64, "float64"))
    assert wide.overall() == named.overall()
    assert wide.bytes_sent.sum() == 2 * there.bytes_sent.sum()
    assert here.overall() == there.overall()
    assert there.num_matrices.sum() == 2
    assert there.bytes_sent.sum() > 0


def test_what_is_computed_of_shards_is_gathered_by_every_rank():
    with torch.device("meta"):
        normed, plain = nn.utils.parametrizations.weight_norm(nn.Linear(64, 96)), nn.Linear(64, 96)
    gathered, sent = (plan_ranks(net, 4, rates=RATES).bytes_sent.sum() for net in (normed, plain))
    assert (gathered, sent) == (3 * 4 * 64 * 96, 0.75 * 4 * 64 * 96)
    assert plan_ranks(normed, 4, rates=RATES, sharding="ddp").bytes_sent.sum() == 0


def test_a_plan_of_nothing_says_what_was_left_out():
    with torch.device("meta"):
        yielded = list(walk(nn.Linear(100, 300)))
    with pytest.raises(
        InvalidArgument,
        match=r"plan: expected a model with a matrix to analyse; got none \('Linear': on the meta device",
    ):
        plan_ranks(yielded, 4)


@pytest.mark.parametrize("family", TINY)
def test_a_config_file_gives_what_the_walker_yields_of_the_model(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(family, **TINY[family])
        auto = transformers.AutoModel if family == "vit" else transformers.AutoModelForCausalLM
        built = auto.from_config(config)
    config.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    for given_model in (tmp_path, str(tmp_path / "config.json"), {"model_type": family, **TINY[family]}):
        assert configured(given_model) == list(walk(built))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt2", 0.124), ("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("moe-128", 30.5)]
)
def test_a_built_in_model_has_the_weights_it_is_known_for(name, billions):
    pytest.importorskip("transformers")
    weights = sum(one.shape[1] * one.shape[2] for one in configured(name) if isinstance(one, Matrix))
    assert weights / 1e9 == pytest.approx(billions, rel=0.005)


WRONG = {
    "no such file": ("nowhere", r"one of 'gpt2', .*'moe-128'; got 'nowhere' \(FileNotFoundError\)"),
    "family": ({"model_type": "gpt17"}, r"got model_type='gpt17': .*; of another model give plan_ranks what a walker"),
    "no family": ({}, "got model_type=None"),
    "nonsense": (
        {"model_type": "gpt2", "n_embd": -8},
        "must be able to build the configuration; got model_type='gpt2'",
    ),
    "layers": (
        {"model_type": "llama", "num_hidden_layers": 10**9},
        "at most 2,000 layers .*; got 1,000,000,000 layers",
    ),
    "nested layers": ({"model_type": "llava", "text_config": {"num_hidden_layers": 10**9}}, "got 1,000,000,000 layers"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 10**9}, "with 1,000,000,000 experts"),
    "stages": ({"model_type": "resnet", "depths": [3] * 10**5, "hidden_sizes": [8] * 10**5}, "got 300,000 layers"),
    "blocks": ({"model_type": "xlstm", "num_blocks": 10**6}, "got 1,000,000 layers"),
    "labels": ({"model_type": "bert", "num_labels": 10**8}, "and 100,000,000 labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_is_none_is_named_at_once(case):
    pytest.importorskip("transformers")
    start = time.perf_counter()
    with pytest.raises(InvalidArgument, match=WRONG[case][1]):
        configured(WRONG[case][0])
    assert time.perf_counter() - start < 20


def test_layers_that_a_configuration_names_by_their_places_are_no_more_layers():
    pytest.importorskip("transformers")
    config = {"model_type": "qwen3_moe", **TINY["qwen3_moe"]}
    assert configured({**config, "mlp_only_layers": [0, *range(4, 100)]}) == configured(config)


@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "long"])
def test_what_is_no_configuration_is_refused_unread(tmp_path, kind, monkeypatch):
    file = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_text('{"a":' * 5000 + "1" + "}" * 5000)
        monkeypatch.setattr(models, "_MOST_BYTES", 100 if kind == "long" else 10**9)
    with pytest.raises(
        InvalidArgument, match=r"plan: model must be a config\.json, its folder, .*; got '.*' \(\w+Error\)"
    ):
        configured(tmp_path)


def test_a_model_of_too_many_matrices_is_not_walked_to_its_end(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "_MOST", 70)
    with pytest.raises(InvalidArgument, match="at most 70 matrices; got more"):
        configured("gpt2")


@pytest.mark.parametrize("text", ["{", "[1]", "7"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgument, match=r"model must be a config.json, .* \((JSONDecodeError|TypeError)\)"):
        configured(tmp_path)


def test_without_transformers_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"ww-monitor\[huggingface\]"):
        configured("gpt2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "world_size must be an integer >= 1; got 0"),
        ({"world_size": 10**9}, "world_size must be at most 16384; got 1000000000"),
        ({"world_size": 2, "sharding": "zero"}, "sharding must be one of 'fsdp', 'ddp'; got 'zero'"),
        ({"world_size": 2, "dtype": "int8"}, "dtype must be one of 'float32', .*; got 'int8'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(InvalidArgument, match=message):
        plan_ranks([], rates=RATES, **options)


# --- what the ranks would do


def held(one, world, rank):
    """What a rank of FSDP2 says of a matrix with harmless entries."""
    rows = EvenShards((), axis=1, places=range(one.shape[1]), size=one.shape[1])
    index = rows.parts(one.shape, world).get(rank, (range(one.shape[0]), (), range(one.shape[2])))
    entries = len(index[1]) * one.shape[2]
    return Held(
        one.name, "dense", one.shape, ranks=tuple(range(world)), sharded=True, content=1, index=index,
        sums=tuple((float(value),) * one.shape[0] for value in (0, entries, -1, 1, 0)),
    )  # fmt: skip


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
def test_the_plan_is_what_the_first_rank_would_order(world):
    """Who owns what and what is sent, also where ranks hold nothing."""
    items = [one for one in model(MIXED) if not Select().reason_to_skip(one)]
    orders = Decision([[held(one, world, rank) for one in items] for rank in range(world)], Options(), None, 0).orders()
    plan = planned(MIXED, world)
    for rank, ordered in enumerate(orders):
        tasks = [task for together in ordered.rounds for task in together]
        assert plan.num_matrices[rank] == sum(task.owner == rank for task in tasks)
        assert plan.bytes_sent[rank] == sum(task.delivery.bytes_sent(rank, 4) for task in tasks)


shapes_of_matrices = st.lists(st.tuples(st.just(1), st.integers(8, 50), st.integers(8, 50)), min_size=1, max_size=12)


@settings(max_examples=50)
@given(shapes_of_matrices, st.integers(1, 9))
def test_replicas_together_do_the_work_of_one_process_and_move_nothing(shapes, world):
    plan, alone = planned(shapes, world, sharding="ddp"), planned(shapes, 1)
    assert plan.costs.sum() == pytest.approx(alone.costs.sum())
    assert plan.seconds.sum() == pytest.approx(alone.total_seconds)
    assert plan.total_seconds == plan.seconds.max()
    assert plan.bytes_sent.sum() == 0


@settings(max_examples=50)
@given(shapes_of_matrices, st.integers(2, 9), st.sampled_from(["float32", "bfloat16"]))
def test_shards_change_when_is_worked_and_move_less_than_the_weights(shapes, world, dtype):
    plan, alone = planned(shapes, world, dtype=dtype), planned(shapes, 1)
    assert plan.seconds.sum() == pytest.approx(alone.total_seconds)
    assert plan.seconds.max() * (1 - 1e-9) <= plan.total_seconds <= alone.total_seconds * (1 + 1e-9)
    weights = sum(rows * columns for _, rows, columns in shapes) * (4 if dtype == "float32" else 2)
    assert 0 < plan.bytes_sent.sum() <= weights


def test_one_process_moves_nothing_and_is_even():
    plan = planned(MIXED, 1)
    assert (plan.bytes_sent.sum(), plan.balance, plan.num_matrices.tolist()) == (0, 1, [len(MIXED)])


def test_ranks_wait_for_the_slowest_of_a_round():
    """Two small matrices at one owner are two rounds, the second beside nothing."""
    large, small = ((side**3 / RATES.gram + 4 / 3 * side**3 / RATES.solve) for side in (20, 12))
    assert planned([(1, 20, 20), (1, 12, 12), (1, 12, 12)], 2).total_seconds == pytest.approx(large + small)


def test_a_part_of_a_tensor_lies_where_its_rows_do():
    """Of three experts or of a fused projection a rank may hold one whole, which does not travel where it owns it."""
    expert = matrix((1, 16, 24), shards=EvenShards((), axis=0, places=range(2, 3), size=3))
    assert plan_ranks([expert], 3, rates=RATES).bytes_sent.tolist() == [0, 0, 16 * 24 * 4]
    net = nn.MultiheadAttention(24, 2)
    found = [one for one in walk(net, layout=even_shards) if isinstance(one, Matrix)]
    assert [(one.name, one.shards.parts(one.shape, 3).keys()) for one in found[:3]] == [
        ("q", {0}),
        ("k", {1}),
        ("v", {2}),
    ]


def test_the_workspace_is_a_gram_matrix_and_a_block_or_the_weights_and_what_the_engine_sets_aside():
    tall, wide, block = planned([(1, 3000, 800)], 4), planned([(1, 800, 3000)], 4), 2**18
    alone = plan_ranks(model([(1, 800, 3000)]), 1, rates=RATES)
    assert alone.peak_bytes.tolist() == [8 * 800**2 + 4 * 800 * 3000]
    assert tall.peak_bytes.tolist() == [8 * 800**2 + 12 * block, *[4 * block] * 3]
    assert wide.peak_bytes.tolist() == [alone.peak_bytes[0] + 4 * 800 * 3000 + 4 * block, *[4 * block] * 3]


def test_what_is_left_out_costs_nothing():
    items = [matrix((1, 40, 24)), matrix((1, 3, 50)), Skipped("x", "other", (3, 4), "integer weights")]
    plan = plan_ranks(items, 2, rates=RATES)
    assert (plan.num_matrices.tolist(), len(plan.description.skipped)) == ([1, 0], 2)
    with pytest.raises(
        InvalidArgument, match=r"got none \('w': 3 eigenvalues, fewer than min_size=8; 'x': integer weights"
    ):
        plan_ranks(items[1:], 2, rates=RATES)


def test_a_model_without_a_configuration_is_planned_from_its_walker():
    net = nn.Sequential(nn.Linear(40, 60), nn.Conv2d(3, 8, 3), nn.Linear(60, 50))
    plan = plan_ranks(walk(net), 1, rates=RATES)
    assert plan.description == plan_matrices(walk(net), rates=RATES)
    assert plan.total_seconds == pytest.approx(plan.description.seconds)


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_the_work_is_even_where_it_must_be(sharding):
    pytest.importorskip("transformers")
    assert planned(GPT2_48, 4, sharding=sharding).balance <= 1.1
    assert plan_ranks("llama-3-70b", 64, sharding=sharding, rates=RATES).balance <= 1.2


@pytest.mark.parametrize(("world", "gigabytes"), [(8, 28.1), (1024, 32.1)])
def test_llama_moves_its_weights_once(world, gigabytes):
    pytest.importorskip("transformers")
    assert plan_ranks("llama-3-8b", world, rates=RATES).bytes_sent.sum() / 1e9 == pytest.approx(gigabytes, rel=0.002)


def test_a_configuration_can_be_read_from_any_path(tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "my model.json"
    file.write_text(json.dumps(BUILT_IN["gpt2"]))
    assert configured(file) == configured("gpt2")
