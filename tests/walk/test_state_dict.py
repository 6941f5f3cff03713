"""What named tensors without their modules are taken for."""

import doctest

import pytest
import torch
from torch import nn

from ww_monitor import analyze
from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import state_dict
from ww_monitor.walk.state_dict import walk_state_dict
from ww_monitor.walk.torch import walk


def matrices(tensors, **options):
    return {item.name: item for item in walk_state_dict(tensors, **options) if isinstance(item, Matrix)}


def reasons(tensors, **options):
    return {item.name: item.reason for item in walk_state_dict(tensors, **options) if isinstance(item, Skipped)}


MEANINGS = [  # key, shape, then name → (kind, role, shape)
    ("fc.weight", (4, 8), {"fc": ("dense", "", (1, 4, 8))}),
    ("weight", (4, 8), {"weight": ("dense", "", (1, 4, 8))}),
    ("conv.weight", (4, 8, 5), {"conv": ("conv", "conv", (5, 4, 8))}),
    ("conv.weight", (4, 8, 3, 2), {"conv": ("conv", "conv", (6, 4, 8))}),
    ("conv.weight", (4, 8, 2, 2, 2), {"conv": ("conv", "conv", (8, 4, 8))}),
    ("model.embed_tokens.weight", (9, 8), {"model.embed_tokens": ("embedding", "embed", (1, 9, 8))}),
    ("h.wte.weight", (9, 8), {"h.wte": ("embedding", "embed", (1, 9, 8))}),
    ("h.wpe.weight", (9, 8), {"h.wpe": ("embedding", "embed", (1, 9, 8))}),
    ("e.word_embeddings.weight", (9, 8), {"e.word_embeddings": ("embedding", "embed", (1, 9, 8))}),
    ("emb.weight", (9, 8), {"emb": ("embedding", "embed", (1, 9, 8))}),
    ("embed_out.weight", (9, 8), {"embed_out": ("dense", "head", (1, 9, 8))}),
    ("context_embedder.weight", (9, 8), {"context_embedder": ("dense", "", (1, 9, 8))}),
    ("time_embed.0.weight", (9, 8), {"time_embed.0": ("dense", "", (1, 9, 8))}),
    ("a.in_proj_weight", (12, 4), {f"a.{end}": ("attention", end, (1, 4, 4)) for end in "qkv"}),
    ("in_proj_weight", (12, 4), {end: ("attention", end, (1, 4, 4)) for end in "qkv"}),
    ("a.k_proj_weight", (4, 6), {"a.k": ("attention", "k", (1, 4, 6))}),
    ("rnn.weight_ih_l0", (8, 4), {"rnn.weight_ih_l0": ("recurrent", "", (1, 8, 4))}),
    ("rnn.weight_hh_l1_reverse", (8, 2), {"rnn.weight_hh_l1_reverse": ("recurrent", "", (1, 8, 2))}),
    ("cell.weight_hh", (8, 2), {"cell.weight_hh": ("recurrent", "", (1, 8, 2))}),
    ("h.0.attn.c_attn.weight", (4, 12), {f"h.0.attn.c_attn.{end}": ("dense", end, (1, 4, 4)) for end in "qkv"}),
    ("h.0.attn.c_attn.weight", (12, 4), {f"h.0.attn.c_attn.{end}": ("dense", end, (1, 4, 4)) for end in "qkv"}),
    ("h.0.attn.c_attn.weight", (6, 4), {"h.0.attn.c_attn": ("dense", "qkv", (1, 6, 4))}),
    ("blocks.0.attn.qkv.weight", (12, 4), {f"blocks.0.attn.qkv.{end}": ("dense", end, (1, 4, 4)) for end in "qkv"}),
    ("attention.query_key_value.weight", (12, 4), {"attention.query_key_value": ("dense", "qkv", (1, 12, 4))}),
    ("self_attn.qkv_proj.weight", (12, 4), {"self_attn.qkv_proj": ("dense", "qkv", (1, 12, 4))}),
    ("mixer.in_proj.weight", (12, 4), {"mixer.in_proj": ("dense", "", (1, 12, 4))}),
    ("mlp.gate_up_proj.weight", (12, 4), {f"mlp.gate_up_proj.{e}": ("dense", e, (1, 6, 4)) for e in ("gate", "up")}),
    ("moe.w1", (2, 9, 8), {f"moe.w1.{i}": ("dense", "", (1, 9, 8)) for i in (0, 1)}),
    ("mlp.experts.0.w1.weight", (9, 8), {"mlp.experts.0.w1": ("dense", "gate", (1, 9, 8))}),
]


@pytest.mark.parametrize(("key", "shape", "expected"), MEANINGS, ids=[f"{k}-{len(s)}" for k, s, _ in MEANINGS])
def test_meanings(key, shape, expected):
    """Names and shapes tell kind, role and parts."""
    found = matrices({key: torch.randn(shape)})
    assert {name: (m.kind, m.role, m.shape) for name, m in found.items()} == expected
    assert {name: tuple(m.load().shape) for name, m in found.items()} == {n: s for n, (_, _, s) in expected.items()}


OTHERS = [
    ("embeddings.cls_token", (1, 1, 8), "a vector"),
    ("moe.embeddings.position_embeddings", (1, 9, 8), "a table of positions"),
    ("experts.gate_up_proj_bias", (4, 8), "a bias"),
    (
        "fc.parametrizations.weight.original0",
        (4, 1),
        "stored before pruning or a parametrization, which needs the model",
    ),
    ("deep.weight", (2, 2, 2, 2, 2, 2), "6-dimensional where convolution kernels have 3 to 5"),
    ("none.weight", (0, 4), r"empty: a zero in the shape (0, 4)"),
]


@pytest.mark.parametrize(("key", "shape", "reason"), OTHERS)
def test_others(key, shape, reason):
    """What names and shapes do not explain is left out, with the reason."""
    assert not matrices({key: torch.zeros(shape)})
    assert list(reasons({key: torch.zeros(shape)}).values()) == [reason]


@pytest.mark.parametrize(("dtype", "reason"), [(torch.int8, "integer weights"), (torch.complex64, "complex weights")])
def test_dtypes(dtype, reason):
    """Only real floating-point numbers have a spectrum here."""
    assert reasons({"fc.weight": torch.zeros(4, 8, dtype=dtype)}) == {"fc": reason}


def test_experts():
    """The down projection beside tells how gate and up are stored; a bias beside leaves it open."""
    stack = {"mlp.experts.gate_up_proj": torch.randn(2, 20, 8), "mlp.experts.down_proj": torch.randn(2, 8, 10)}
    found = matrices(stack)
    assert torch.equal(found["mlp.experts.gate_up_proj.up.1"].load()[0], stack["mlp.experts.gate_up_proj"][1, 10:])
    assert [m.role for m in found.values()] == ["gate", "gate", "up", "up", "down", "down"]
    stack["mlp.experts.gate_up_proj_bias"] = torch.randn(2, 20)
    assert matrices(stack)["mlp.experts.gate_up_proj.1"].shape == (1, 20, 8)


PREFIXES = [
    (["module.fc.weight", "module.module.weight"], ["fc", "module"]),
    (["_orig_mod.fc.weight", "_orig_mod.out.weight"], ["fc", "out"]),
    (["module._orig_mod.fc.weight", "module._orig_mod.out.weight"], ["fc", "out"]),
    (["_orig_mod.module.fc.weight", "_orig_mod.module.out.weight"], ["fc", "out"]),
    (["_forward_module.fc.weight", "_forward_module.out.weight"], ["fc", "out"]),
    (["_forward_module.module.fc.weight", "_forward_module.module.out.weight"], ["fc", "out"]),
    (["module._forward_module._orig_mod.module.fc.weight", "module._forward_module.module.out.weight"], ["fc", "out"]),
    (["net._forward_module._orig_mod.fc.weight", "net._forward_module.out.weight"], ["net.fc", "net.out"]),
    (["fc.weight", "module.out.weight"], ["fc", "module.out"]),
    (["fc.base_layer.weight", "out.weight"], ["fc.base_layer", "out"]),
]


@pytest.mark.parametrize(("keys", "names"), PREFIXES)
def test_prefixes(keys, names):
    """Wrappers vanish from the names, `module.` only where every name starts with it."""
    assert list(matrices({key: torch.randn(4, 8) for key in keys})) == names


def test_tied():
    """A tensor that stands under two names is listed once."""
    weight = torch.randn(9, 8)
    tensors = {"wte.weight": weight, "lm_head.weight": weight, "copy.weight": weight.clone()}
    assert list(matrices(tensors)) == ["wte", "copy"]
    assert reasons(tensors) == {"lm_head": "tied to wte"}


def test_split():
    """The caller's cuts go along the first axis, and 1 keeps a fused weight whole."""
    tensors = {"fc.weight": torch.randn(6, 8), "attn.qkv.weight": torch.randn(12, 4)}
    found = matrices(tensors, split={"fc": (2, 4), "*.qkv": 1})
    assert {name: matrix.shape for name, matrix in found.items()} == {
        "fc.0": (1, 2, 8),
        "fc.1": (1, 4, 8),
        "attn.qkv": (1, 12, 4),
    }
    with pytest.raises(InvalidArgument, match="must be a number of parts"):
        walk_state_dict(tensors, split={"fc": 0})


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_costs_itself(layout):
    rows = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout)
    tensors = {"a.weight": rows, "b.weight": torch.randn(8, 8)}
    assert list(matrices(tensors)) == ["b"]
    assert reasons(tensors) == {"a": "nested weights, whose rows differ in length"}


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_lora_factors(adapter):
    """The two factors of an adapter make one delta, also if one is tied elsewhere; a lone factor makes none."""
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    tensors = {f"fc.lora_A{adapter}.weight": a, f"fc.lora_B{adapter}.weight": b, "x.lora_A.weight": a}
    tensors |= {f"tied.lora_A{adapter}.weight": a, f"tied.lora_B{adapter}.weight": torch.randn(4, 2)}
    delta, tied = matrices(tensors).values()
    assert (tied.name, tied.shape) == ("tied.lora[default]", (1, 4, 8))
    assert (delta.name, delta.kind, delta.shape) == ("fc.lora[default]", "dense", (1, 6, 8))
    assert torch.equal(delta.load()[0], b @ a)
    assert set(reasons(tensors).values()) == {"factor of lora[default]"}
    assert len(reasons(tensors)) == 5


class Net(nn.Module):
    """Layers whose tensors tell what they are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.convolution = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(16, 48)})
        self.fc = nn.Linear(16, 20)


def test_as_the_module():
    """A state dict gives the same matrices as its module, number for number, and `analyze` the same metrics."""
    torch.manual_seed(0)
    net = Net()
    of_module, of_tensors = {m.name: m for m in walk(net)}, matrices(net.state_dict())
    assert of_tensors == of_module
    assert all(torch.equal(of_tensors[name].load(), of_module[name].load()) for name in of_module)
    assert repr(analyze(net.state_dict()).layers) == repr(analyze(net).layers)  # as text, where NaN equals NaN


def test_wrong_values():
    """A mapping of something else is an error that says what is in it; extra state is no error."""
    with pytest.raises(InvalidArgument, match=r"expected tensors of two or more.*; got {'state_dict': dict}"):
        walk_state_dict({"state_dict": {}})
    with pytest.raises(InvalidArgument, match="tensors must be a mapping; got list"):
        walk_state_dict([torch.zeros(2)])
    assert list(matrices({"fc.weight": torch.zeros(4, 4), "fc._extra_state": None})) == ["fc"]
    with pytest.raises(InvalidArgument, match=r"analyze: model must be .*, a mapping .*, or a path; got int"):
        analyze(3)


def test_examples():
    """The examples in the docstrings run."""
    results = doctest.testmod(state_dict)
    assert results.attempted
    assert not results.failed


def test_every_name_is_there_once():
    """Two tensors of one name are told apart, and none is lost where a wrapper's name goes."""
    weights = [torch.full((9, 9), float(value)) for value in range(4)]
    tensors = dict(zip(["fc", "fc.weight", "_orig_mod.a.weight", "a.weight"], weights, strict=True))
    found = {item.name: float(item.load()[0, 0, 0]) for item in walk_state_dict(tensors)}
    assert found == {"fc": 0.0, "fc#2": 1.0, "_orig_mod.a": 2.0, "a": 3.0}
