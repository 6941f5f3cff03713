"""A plan for many ranks says what they would do."""

import json
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ww_monitor
from ww_monitor.distributed import deal, run
from ww_monitor.distributed.inventory import Held, Job
from ww_monitor.engine import Options, analyze_matrices
from ww_monitor.engine import run as engine
from ww_monitor.engine.measure import Loaded
from ww_monitor.errors import InvalidArgument
from ww_monitor.matrices import Matrix, Skipped
from ww_monitor.plan import BUILT_IN, Laid, Rates, architecture, plan_ranks, ranks, tables
from ww_monitor.walk.torch import walk

RATES = Rates(gram=2e10, solve=8e9)
MIXED = [((1, 40, 24), None), ((1, 24, 40), None), ((1, 16, 16), None), ((1, 9, 30), None), ((1, 100, 8), None)]
EXPERTS = [((1, 24, 16), (place, 6)) for place in range(6)] + [((1, 16, 24), (place, 6)) for place in range(6)]
GPT2_48 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


def laid(shape, stack=None, name="w"):
    return Laid(Matrix(name, "dense", shape, lambda: pytest.fail("a weight was read")), stack)


def model(shapes):
    return [laid(shape, stack, f"w{i}") for i, (shape, stack) in enumerate(shapes)]


def planned(shapes, world, **options):
    return plan_ranks(model(shapes), world, rates=RATES, min_size=1, **options)


# --- configurations

TINY = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64, "n_inner": 80},
    "llama": {},
    "mistral": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 9, "moe_intermediate_size": 24, "mlp_only_layers": [0], "decoder_sparse_step": 2},
}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize("family", TINY)
def test_a_config_file_gives_what_the_walker_yields_of_the_model(family, tmp_path):
    """Also where the file leaves defaults out, as one from the hub may."""
    transformers = pytest.importorskip("transformers")
    options = TINY[family] if family == "gpt2" else {**DECODER, **TINY[family]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, **options)
        built = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    found = [(m.name, m.kind, m.shape, m.role) for m in walk(built) if isinstance(m, Matrix)]
    for given_model in (tmp_path, str(tmp_path / "config.json"), {"model_type": family, **options}):
        listed = [one.matrix for one in architecture(given_model)]
        assert [(m.name, m.kind, m.shape, m.role) for m in listed] == found


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt2", 0.124), ("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("moe-128", 30.5)]
)
def test_a_built_in_model_has_the_weights_it_is_known_for(name, billions):
    weights = sum(one.matrix.shape[1] * one.matrix.shape[2] for one in architecture(name))
    assert weights / 1e9 == pytest.approx(billions, rel=0.005)


WRONG = {
    "no such file": ("nowhere", r"one of 'gpt2', .*'moe-128'; got 'nowhere' \(FileNotFoundError\)"),
    "family": ({"model_type": "bert"}, r"model_type must be one of 'gpt2', 'llama', .*; got 'bert'; for another"),
    "missing": ({"model_type": "gpt2", "n_embd": 8, "n_layer": 1}, "vocab_size of the .* an integer >= 1; got None"),
    "zero": ({**BUILT_IN["llama-3-8b"], "num_hidden_layers": 0}, "num_hidden_layers .* integer >= 1; got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_is_none_is_named(case):
    given_model, message = WRONG[case]
    with pytest.raises(InvalidArgument, match=message):
        architecture(given_model)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgument, match=r"JSONDecodeError|config.json must hold an object; got list"):
        architecture(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "world_size must be an integer >= 1; got 0"),
        ({"world_size": 2, "sharding": "zero"}, "sharding must be one of 'fsdp', 'ddp'; got 'zero'"),
        ({"world_size": 2, "dtype": "int8"}, "dtype must be one of 'float32', .*; got 'int8'"),
        ({"world_size": 2, "min_size": 0}, "min_size must be an integer >= 1; got 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(InvalidArgument, match=message):
        plan_ranks("gpt2", rates=RATES, **options)


# --- what the ranks would do: the twin is the package's own reasoning on what each rank would say


def held(one, world, rank):
    """What a rank of FSDP2 says of a matrix with harmless entries."""
    slices, rows, columns = one.matrix.shape
    place, count = one.stack or (0, rows)
    chunks = dict(enumerate(chunk.tolist() for chunk in torch.arange(count).chunk(world)))
    mine = chunks.get(rank, [])
    places = tuple(mine) if one.stack is None else tuple(range(rows if place in mine else 0))
    entries = len(places) * columns
    return Held(
        one.matrix.name, "dense", one.matrix.shape, ranks=tuple(range(world)), sharded=True, content=1,
        index=(tuple(range(slices)), places, tuple(range(columns))), split=(world, 1),
        sums=tuple((float(value),) * slices for value in (0, entries, -1, 1, 0)),
    )  # fmt: skip


def jobs(shapes, world):
    return [
        Job(
            one.matrix.name, one.matrix, (tuple(range(world)),),
            {rank: held(one, world, rank) for rank in range(world)}, dict.fromkeys(range(world), 0),
        )
        for one in model(shapes)
    ]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("shapes", [MIXED, EXPERTS], ids=["mixed", "experts"])
def test_the_plan_is_what_the_ranks_would_conclude(shapes, world):
    """The cost of each rank and the rounds are those of `distributed.run`."""
    listed = jobs(shapes, world)
    costs = [run.work(job, Options()) for job in listed]
    owners = deal(costs, [job.holders for job in listed], world)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world)]
    assert [share.cost for share in planned(shapes, world).shares] == loads
    items = [ranks._Item(one, world, True, 4, RATES) for one in model(shapes)]
    together = [[item.matrix.name for item in one] for one in ranks._rounds(items, owners)]
    assert together == [[job.name for job, _ in one] for one in run.rounds(zip(listed, owners, strict=True), Options())]


@given(st.integers(1, 60), st.integers(1, 12))
def test_rows_are_cut_as_torch_cuts_them(rows, world):
    parts = ranks._Item(laid((1, rows, 5)), world, True, 4, RATES).parts
    cut = [len(part) for part in torch.arange(rows).chunk(world)]
    assert parts.tolist() == cut + [0] * (world - len(cut))


shapes_of_matrices = st.lists(
    st.tuples(st.tuples(st.just(1), st.integers(1, 50), st.integers(1, 50)), st.none()), min_size=1, max_size=12
)


@settings(max_examples=50)
@given(shapes_of_matrices, st.integers(1, 9))
def test_replicas_together_do_the_work_of_one_process_and_move_nothing(shapes, world):
    plan, alone = planned(shapes, world, sharding="ddp"), planned(shapes, 1)
    assert sum(share.cost for share in plan.shares) == pytest.approx(alone.cost)
    assert sum(share.seconds for share in plan.shares) == pytest.approx(alone.seconds)
    assert plan.seconds == max(share.seconds for share in plan.shares)
    assert plan.bytes_moved == 0


@settings(max_examples=50)
@given(shapes_of_matrices, st.integers(1, 9))
def test_shards_change_who_works_and_not_how_much(shapes, world):
    plan, alone = planned(shapes, world), planned(shapes, 1)
    assert sum(share.seconds for share in plan.shares) == pytest.approx(alone.seconds)
    assert plan.seconds >= max(share.seconds for share in plan.shares) * (1 - 1e-9)
    assert plan.seconds <= alone.seconds * (1 + 1e-9)


def test_one_process_moves_nothing_and_is_even():
    plan = planned(MIXED, 1)
    assert (plan.bytes_moved, plan.bytes_told, plan.balance, plan.num_idle) == (0, 0, 1, 0)


def test_a_tall_matrix_moves_its_gram_matrix_and_a_wide_one_its_parts():
    tall, wide = planned([((1, 100, 8), None)], 4), planned([((1, 8, 100), None)], 4, dtype="bfloat16")
    assert [share.bytes_sent for share in tall.shares] == [0, *[8 * 8 * 8] * 3]
    assert [share.bytes_sent for share in wide.shares] == [0, *[2 * 100 * 2] * 3]
    assert (tall.cost * 4, wide.cost * 4) == (8**3, 8 * 8 * 100 + 8**3)


def test_an_expert_lies_on_one_rank_and_its_gram_matrix_travels():
    plan = planned([((1, 8, 100), (5, 6))], 3)
    assert [share.bytes_sent for share in plan.shares] == [0, 512, 512]
    assert plan.shares[2].seconds == pytest.approx(8 * 8 * 100 / RATES.gram)


def test_seconds_are_those_of_the_shared_product_and_then_of_the_owners():
    gram, solve = 8 * 8 * 100 / RATES.gram, 4 / 3 * 8**3 / RATES.solve
    assert planned([((1, 100, 8), None)] * 2, 2).seconds == pytest.approx(2 * gram / 2 + solve)
    assert planned([((1, 8, 100), None)] * 3, 2).seconds == pytest.approx(2 * (gram + solve))


def test_ranks_wait_for_the_slowest_of_a_round():
    """Two small matrices at one owner are two rounds, the second beside nothing."""
    shapes = [((1, 20, 20), None), ((1, 12, 12), None), ((1, 12, 12), None)]
    solve = [4 / 3 * side**3 / RATES.solve for side in (20, 12)]
    gram = [side**3 / RATES.gram / 2 for side in (20, 12, 12)]
    assert planned(shapes, 2).seconds == pytest.approx(sum(gram) + solve[0] + solve[1])


def test_the_workspace_is_what_the_engine_sets_aside():
    weights = torch.zeros(1, 1, 300, 200)
    matrix = Matrix("w", "dense", (1, 300, 200), lambda: weights[0])
    assert plan_ranks([matrix], 1, rates=RATES).peak_bytes == engine._workspace(Loaded([matrix], weights))


def test_the_workspace_in_shards_is_the_gram_matrix_or_the_weights_too():
    blocks = 16 * 2**20
    assert planned([((1, 3000, 800), None)], 4).peak_bytes == 8 * 800**2 + blocks
    assert planned([((1, 800, 3000), None)], 4).peak_bytes == 4 * 800 * 3000 * (1 + 1 / 4 + 1) + 8 * 800**2


def test_a_row_takes_the_bytes_that_are_counted_for_it():
    layers = analyze_matrices(walk(nn.Sequential(*(nn.Linear(90, 60) for _ in range(6)))), Options()).layers
    said = pickle.dumps({layer.name: layer for layer in layers})
    assert len(said) / 6 == pytest.approx(ranks.ROW_BYTES, rel=0.2)


def test_what_is_told_grows_with_the_ranks_and_their_lists():
    listed = len(pickle.dumps([ranks._held(ranks._Item(one, 4, False, 4, RATES)) for one in model(MIXED)], protocol=4))
    assert planned(MIXED, 4, sharding="ddp").bytes_told == 3 * (listed + 2 * ranks.ROW_BYTES)


def test_what_is_left_out_costs_nothing():
    items = [laid((1, 40, 24)), laid((1, 3, 50)), Skipped("x", "other", (3, 4), "integer weights")]
    plan = plan_ranks(items, 2, rates=RATES)
    assert (plan.num_matrices, plan.num_skipped) == (1, 2)
    assert plan_ranks(items[1:], 2, rates=RATES).balance == 1
    assert plan_ranks("gpt2", 2, rates=RATES, include=["*.mlp.*"], exclude=["*.c_fc"]).num_matrices == 12


def test_a_model_without_a_known_configuration_is_planned_from_its_walker():
    net = nn.Sequential(nn.Linear(40, 60), nn.Conv2d(3, 8, 3), nn.Linear(60, 50))
    plan = plan_ranks(walk(net), 1, rates=RATES)
    assert plan.seconds == pytest.approx(
        sum(row.seconds for row in ww_monitor.plan.plan_matrices(walk(net), rates=RATES).rows)
    )


@pytest.mark.parametrize("sharding", ranks.SHARDINGS)
def test_the_work_is_even_where_it_must_be(sharding):
    gpt2 = plan_ranks([laid((1, *shape)) for shape in GPT2_48], 4, sharding=sharding, rates=RATES)
    assert gpt2.num_matrices == 48
    assert gpt2.balance <= 1.1
    assert plan_ranks("llama-3-70b", 64, sharding=sharding, rates=RATES).balance <= 1.2


def test_a_plan_is_the_same_each_time():
    assert planned(MIXED, 3) == planned(MIXED, 3)


def test_a_configuration_can_be_read_from_any_path(tmp_path):
    file = tmp_path / "my model.json"
    file.write_text(json.dumps(BUILT_IN["gpt2"]))
    assert plan_ranks(file, 2, rates=RATES) == plan_ranks("gpt2", 2, rates=RATES)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (tables.in_bytes(999), "1 kB"),
        (tables.in_bytes(12.6e6), "13 MB"),
        (tables.in_bytes(4e18), "4e+06 TB"),
        (tables.in_words(59.4), "59 s"),
        (tables.in_words(5400), "1.5 h"),
    ],
)
def test_figures_are_short(found, text):
    assert found == text
