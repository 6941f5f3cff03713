"""Fused projections and stacked experts are cut where their layout is certain, and nowhere else."""

import doctest

import pytest
import torch
from torch import nn

from ww_monitor.errors import InvalidArgument, SpectralWarning
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import fused, parts
from ww_monitor.walk.state_dict import walk_state_dict
from ww_monitor.walk.torch import walk

transformers = pytest.importorskip("transformers", reason="the models are theirs")

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}


def matrices(model, **options):
    return {item.name: item for item in walk(model, **options) if isinstance(item, Matrix)}


def reasons(model, **options):
    return {item.name: item.reason for item in walk(model, **options) if isinstance(item, Skipped)}


def gpt2(**more):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **more)
    return transformers.GPT2LMHeadModel(config)


def neox():
    return transformers.GPTNeoXModel(
        transformers.GPTNeoXConfig(**SMALL, num_attention_heads=4, intermediate_size=48, max_position_embeddings=8)
    )


def bloom():
    return transformers.BloomModel(transformers.BloomConfig(**SMALL, n_head=4))


def falcon(**more):
    return transformers.FalconModel(transformers.FalconConfig(**SMALL, num_attention_heads=4, **more))


def bigcode(multi_query):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 8}
    return transformers.GPTBigCodeModel(transformers.GPTBigCodeConfig(**sizes, multi_query=multi_query))


def phi3():
    return transformers.Phi3Model(
        transformers.Phi3Config(
            **SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, pad_token_id=0
        )
    )


def codegen():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 8, "rotary_dim": 4}
    return transformers.CodeGenModel(transformers.CodeGenConfig(**sizes, bos_token_id=0, eos_token_id=0))


def deberta():
    return transformers.DebertaModel(transformers.DebertaConfig(**SMALL, num_attention_heads=4, intermediate_size=48))


def mixtral():
    return transformers.MixtralModel(
        transformers.MixtralConfig(
            **SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, num_local_experts=3
        )
    )


def gpt_oss():
    return transformers.GptOssModel(
        transformers.GptOssConfig(
            **SMALL,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            num_local_experts=3,
            head_dim=8,
            pad_token_id=0,
        )
    )


def vit():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=32, patch_size=8, **sizes))


# --- queries, keys and values


def thirds(weight):
    return weight[:32], weight[32:64], weight[64:]


def per_head(weight):
    """Rows [4 heads, 3, 8]."""
    rows = weight.reshape(4, 3, 8, -1)
    return tuple(rows[:, which].reshape(32, -1) for which in range(3))


def grouped(weight):
    """Rows [2 groups, 2 queries + key + value, 8]."""
    rows = weight.reshape(2, 4, 8, -1)
    return rows[:, :2].reshape(32, -1), rows[:, 2].reshape(16, -1), rows[:, 3].reshape(16, -1)


def one_key(weight):
    return weight[:32], weight[32:40], weight[40:]


QKV = {
    "gpt2": (gpt2, "transformer.h.0.attn.c_attn", lambda weight: tuple(part.T for part in thirds(weight.T))),
    "gpt-neox": (neox, "layers.0.attention.query_key_value", per_head),
    "bloom": (bloom, "h.0.self_attention.query_key_value", per_head),
    "falcon": (lambda: falcon(multi_query=False, alibi=True), "h.0.self_attention.query_key_value", per_head),
    "falcon, one key": (lambda: falcon(multi_query=True), "h.0.self_attention.query_key_value", one_key),
    "falcon, grouped": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        "h.0.self_attention.query_key_value",
        grouped,
    ),
    "bigcode": (lambda: bigcode(True), "h.0.attn.c_attn", one_key),
    "bigcode, all keys": (lambda: bigcode(False), "h.0.attn.c_attn", per_head),
    "phi3": (phi3, "layers.0.self_attn.qkv_proj", lambda weight: (weight[:32], weight[32:48], weight[48:])),
    "deberta": (deberta, "encoder.layer.0.attention.self.in_proj", per_head),
}


@pytest.mark.parametrize("family", QKV)
def test_qkv(family):
    """q, k and v are the rows that the family's forward pass gives to them, and bear these roles."""
    make, name, cut = QKV[family]
    model = make()
    found = matrices(model)
    assert name not in found
    for end, expected in zip("qkv", cut(model.get_submodule(name).weight.detach()), strict=True):
        matrix = found[f"{name}.{end}"]
        assert (matrix.kind, matrix.role, matrix.shape[1:]) == ("dense", end, tuple(expected.shape))
        assert torch.equal(matrix.load()[0], expected)


def test_the_cut_computes_what_the_model_computes():
    """The attention scores from the q and k of the walk are those inside GPT-NeoX: a wrong order of rows would show."""
    model = neox().eval()
    layer = model.layers[0]
    seen = {}

    def watch(_module, inputs, outputs):
        seen["input"], seen["output"] = inputs[0].detach(), outputs.detach()

    layer.attention.query_key_value.register_forward_hook(watch)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    found = matrices(model)
    states = seen["output"].view(1, 3, 4, 24) - layer.attention.query_key_value.bias.detach().view(4, 24)
    for index, end in enumerate("qkv"):  # forward: .view(…, heads, 3 · head_dim).chunk(3, dim=-1)
        rows = found[f"layers.0.attention.query_key_value.{end}"].load()[0]
        expected = states.chunk(3, dim=-1)[index].reshape(1, 3, 32)
        assert torch.allclose(seen["input"] @ rows.T, expected, atol=1e-5)


class Attention(nn.Module):
    """An attention in the style of timm, with or without its number of heads."""

    def __init__(self, name="qkv", outputs=96, **attributes):
        super().__init__()
        self.add_module(name, nn.Linear(32, outputs))
        for attribute, value in attributes.items():
            setattr(self, attribute, value)


CERTAIN = [
    (Attention(), ["qkv.q", "qkv.k", "qkv.v"]),
    (Attention("Wqkv"), ["Wqkv.q", "Wqkv.k", "Wqkv.v"]),
    (Attention(outputs=48, num_heads=2), ["qkv.q", "qkv.k", "qkv.v"]),
    (Attention("in_proj", num_heads=4), ["in_proj.q", "in_proj.k", "in_proj.v"]),
    (Attention("gate_up_proj"), ["gate_up_proj.gate", "gate_up_proj.up"]),
]
UNCERTAIN = [
    Attention(outputs=64),
    Attention(outputs=80, num_heads=4, num_key_value_heads=2, head_dim=8),
    Attention(num_heads=5),
    Attention("in_proj"),  # as in Mamba and LFM2, where it is no attention
    Attention("in_proj", outputs=48, num_heads=4),
    Attention("query_key_value"),
    Attention("gate_up_proj", outputs=65),
    Attention("projection"),
]


@pytest.mark.parametrize(("module", "names"), CERTAIN, ids=range(len(CERTAIN)))
def test_certain(module, names):
    """A known name is cut when the sizes follow from the shape or from the heads."""
    assert list(matrices(module)) == names


@pytest.mark.parametrize("module", UNCERTAIN, ids=range(len(UNCERTAIN)))
def test_uncertain(module):
    """Without certain sizes a weight stays whole."""
    assert len(matrices(module)) == 1


def test_unknown_order():
    """CodeGen orders its rows by device, so its weight stays whole and says that it is all three."""
    matrix = matrices(codegen())["h.0.attn.qkv_proj"]
    assert (matrix.shape, matrix.role) == ((1, 96, 32), "qkv")


def test_cross_attention():
    """The cross-attention of GPT-2 fuses keys and values only."""
    model = gpt2(add_cross_attention=True)
    found = matrices(model)
    weight = model.transformer.h[0].crossattention.c_attn.weight
    for start, end in ((0, "k"), (32, "v")):
        loaded = found[f"transformer.h.0.crossattention.c_attn.{end}"].load()[0]
        assert torch.equal(loaded, weight[:, start : start + 32])


def test_separate_projections_stay():
    """A Llama has nothing to cut."""
    config = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    found = matrices(transformers.LlamaModel(config))
    assert {matrix.role for matrix in found.values()} == {"embed", "q", "k", "v", "o", "gate", "up", "down"}
    assert len(found) == 8


def test_gate_up():
    """The fused MLP of Phi-3 holds the gate first, then the up projection."""
    model = phi3()
    found = matrices(model)
    weight = model.layers[0].mlp.gate_up_proj.weight
    for start, end in ((0, "gate"), (48, "up")):
        matrix = found[f"layers.0.mlp.gate_up_proj.{end}"]
        assert matrix.role == end
        assert torch.equal(matrix.load()[0], weight[start : start + 48])


# --- the caller's cuts


def test_split():
    """A glob cuts a weight into equal parts or into given sizes, along its outputs."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12))
    found = matrices(model, split={"0": 3, "[1]": (8, 4), "*": 1})
    assert {name: matrix.shape for name, matrix in found.items()} == {
        "0.0": (1, 4, 8),
        "0.1": (1, 4, 8),
        "0.2": (1, 4, 8),
        "1.0": (1, 8, 8),
        "1.1": (1, 4, 8),
        "2": (1, 12, 8),
    }
    assert torch.equal(found["1.1"].load()[0], model[1].weight[8:])
    assert {matrix.role for matrix in found.values()} == {""}


@pytest.mark.parametrize("kind", ["module", "state dict"])
def test_a_name_in_split_cuts_itself_and_one_that_is_not_there_warns(kind):
    model = nn.ModuleDict({name: nn.Linear(8, 12) for name in ("a[0]", "a0", "b*", "bc")})
    split = {"a[0]": 2, "b*": 3, "gone": 2}
    with pytest.warns(SpectralWarning, match="split='gone' matches no layer; the first are"):
        items = list(walk(model, split=split) if kind == "module" else walk_state_dict(model.state_dict(), split=split))
    names = {item.name for item in items if isinstance(item, Matrix)}
    assert names == {"a[0].0", "a[0].1", "a0", "b*.0", "b*.1", "b*.2", "bc"}


def test_split_of_a_transposed_layer():
    """The outputs of GPT-2's layers are columns."""
    model = gpt2()
    found = matrices(model, split={"*.c_fc": 2, "*.c_attn": 1})
    assert found["transformer.h.0.mlp.c_fc.1"].shape == (1, 32, 64)
    assert torch.equal(
        found["transformer.h.0.mlp.c_fc.1"].load()[0], model.transformer.h[0].mlp.c_fc.weight[:, 64:].detach()
    )
    assert found["transformer.h.0.attn.c_attn"].role == "qkv"


def test_split_leaves_other_kinds():
    """A glob that matches kernels, embeddings and gates cuts dense weights only."""
    model = nn.ModuleDict({"a": nn.Conv1d(4, 4, 3), "b": nn.Embedding(4, 4), "c": nn.RNN(4, 4), "d": nn.Linear(4, 4)})
    assert list(matrices(model, split={"*": 2})) == ["a", "b", "c.weight_ih_l0", "c.weight_hh_l0", "d.0", "d.1"]


@pytest.mark.parametrize("split", [{"a": 0}, {"a": ()}, {"a": (1, 0)}, {"a": True}, {"a": "12"}, {"a": 1.5}])
def test_malformed_split(split):
    """Sizes are positive integers; the error comes at once and names the glob."""
    with pytest.raises(InvalidArgument, match=r"walk: split\['a'\] must be a number of parts"):
        walk(nn.Linear(4, 4), split=split)


def test_split_is_a_mapping():
    """A list is refused at once."""
    with pytest.raises(InvalidArgument, match="walk: split must be a mapping from globs; got list"):
        walk(nn.Linear(4, 4), split=["a"])


@pytest.mark.parametrize("sizes", [3, (1, 2)])
def test_split_that_does_not_add_up(sizes):
    """Parts that do not make up the outputs are an error that names the weight."""
    with pytest.raises(InvalidArgument, match="walk: the sizes in split must add up to the 4 outputs of '0'"):
        list(walk(nn.Sequential(nn.Linear(4, 4)), split={"0": sizes}))


# --- experts


def test_experts():
    """Mixtral's stacked experts give one matrix an expert, with gate and up apart, and the router is dense."""
    model = mixtral()
    found = matrices(model)
    stack = model.layers[0].mlp.experts
    for index in range(3):
        gate_up, down = stack.gate_up_proj[index].detach(), stack.down_proj[index].detach()
        for end, role, expected in (
            (f"gate_up_proj.gate.{index}", "gate", gate_up[:24]),
            (f"gate_up_proj.up.{index}", "up", gate_up[24:]),
            (f"down_proj.{index}", "down", down),
        ):
            matrix = found[f"layers.0.mlp.experts.{end}"]
            assert (matrix.kind, matrix.role) == ("dense", role)
            assert torch.equal(matrix.load(), expected[None])
    router = found["layers.0.mlp.gate"]
    assert (router.kind, router.shape) == ("dense", (1, 3, 32))
    assert torch.equal(router.load()[0], model.layers[0].mlp.gate.weight)
    assert not reasons(model)


def test_pooled_experts():
    """Pooled experts are slices of one dense matrix, whose eigenvalues are not halved as those of a kernel are."""
    found = matrices(mixtral(), experts="pooled")
    stacks = {name: matrix.shape for name, matrix in found.items() if "experts" in name}
    assert stacks == {
        "layers.0.mlp.experts.gate_up_proj.gate": (3, 24, 32),
        "layers.0.mlp.experts.gate_up_proj.up": (3, 24, 32),
        "layers.0.mlp.experts.down_proj": (3, 32, 24),
    }
    assert {found[name].eigenvalue_factor for name in stacks} == {1.0}
    assert {name: tuple(found[name].load().shape) for name in stacks} == stacks


def test_alternating_experts():
    """GPT-OSS stores its experts transposed and with gate and up in turn; the biases are no weights."""
    model = gpt_oss()
    found = matrices(model)
    stack = model.layers[0].mlp.experts.gate_up_proj.detach()
    assert torch.equal(found["layers.0.mlp.experts.gate_up_proj.gate.1"].load()[0], stack[1, :, 0::2])
    assert torch.equal(found["layers.0.mlp.experts.gate_up_proj.up.1"].load()[0], stack[1, :, 1::2])
    assert reasons(model)["layers.0.mlp.experts.gate_up_proj_bias"] == "a bias"


class MoE(nn.Module):
    """A mixture of experts of a user."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def cut(*shape):
    return {"gate_up_proj.gate": shape, "gate_up_proj.up": shape}


EXPERTS = [
    (MoE(gate_up_proj=(3, 20, 8), down_proj=(3, 8, 10)), cut(3, 10, 8)),
    (MoE(gate_up_proj=(3, 8, 20), down_proj=(3, 10, 8)), cut(3, 8, 10)),
    (MoE(gate_up_proj=(3, 8, 20), down_proj=(3, 9, 8)), {"gate_up_proj": (3, 8, 20)}),
    (MoE(gate_up_proj=(3, 8, 20)), {"gate_up_proj": (3, 8, 20)}),
    (MoE(w1=(3, 8, 20)), {"w1": (3, 8, 20)}),
]


@pytest.mark.parametrize(("module", "expected"), EXPERTS, ids=range(len(EXPERTS)))
def test_layout_of_experts(module, expected):
    """Without a declared layout the down projection beside tells it, and otherwise the stack is not cut further."""
    found = matrices(module, experts="pooled")
    assert {name: matrix.shape for name, matrix in found.items() if name != "down_proj"} == expected


def test_what_is_no_expert():
    """Small tables, single slices and stacks of other modules are parameters like any other."""
    module = MoE(scale=(3, 4, 20), token=(1, 9, 9), flat=(9, 9), deep=(2, 3, 9, 9))
    assert not reasons(module)
    shapes = {"scale": (3, 4, 20), "token": (1, 9, 9), "flat": (1, 9, 9), "deep": (81, 2, 3)}
    assert {name: (item.kind, item.shape) for name, item in matrices(module).items()} == {
        name: ("parameter", shape) for name, shape in shapes.items()
    }
    model = vit()
    assert set(reasons(model)) == {"embeddings.cls_token", "embeddings.position_embeddings"}


def test_unknown_choice_for_experts():
    """The error names the choices, at once."""
    with pytest.raises(InvalidArgument, match="walk: experts must be one of 'separate', 'pooled'; got 'each'"):
        walk(nn.Linear(4, 4), experts="each")


class TopKGate(nn.Module):
    """A router with a bare weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 9))


class Aggregate(TopKGate):
    """No router, although "gate" is in its name."""


def test_router():
    """The weight of a router or gate is a dense matrix, that of another unknown class a parameter."""
    kinds = [matrices(nn.Sequential(module))["0"].kind for module in (TopKGate(), Aggregate())]
    assert kinds == ["dense", "parameter"]


def test_examples():
    """The examples in the docstrings run."""
    for module in (fused, parts):
        results = doctest.testmod(module)
        assert results.attempted
        assert not results.failed
