"""What no known layer owns: parameters are read by name and shape, as in a state dict, whatever holds them."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ww_monitor
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import names
from ww_monitor.walk.state_dict import walk_state_dict
from ww_monitor.walk.torch import walk


def matrices(model):
    return {item.name: item for item in walk(model) if isinstance(item, Matrix)}


def reasons(model):
    return {item.name: item.reason for item in walk(model) if isinstance(item, Skipped)}


class Linear(nn.Module):
    """A linear layer of a class that torch does not know, as graph networks and parallel layers have."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class EqualConv(nn.Module):
    """A convolution with an equalised learning rate."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


class Relations(nn.Module):
    """A matrix a relation, of a graph network."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 40, 30))
        self.root = nn.Parameter(torch.randn(40, 30))


class Tables(nn.Module):
    """Parameters and buffers that are no weight."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 30, 20))
        self.relative_position_bias_table = nn.Parameter(torch.randn(30, 20))
        self.attn_mask = nn.Parameter(torch.ones(20, 20), requires_grad=False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 20))
        self.weight_scale_inv = nn.Parameter(torch.ones(20, 20))
        self.deep = nn.Parameter(torch.randn(20, 20, 20, 20))
        self.register_buffer("average", torch.randn(20, 20))


def weighted(owner):
    return {name: value.detach().double() for name, value in owner.state_dict().items() if value.ndim > 1}


CASES = {
    "linear": (Linear(40, 30), {"": lambda w: w["weight"]}),
    "kernel": (EqualConv(24, 16, 3, 3), {"": lambda w: w["weight"].permute(2, 3, 0, 1).reshape(9, 24, 16)}),
    "modulated": (EqualConv(1, 24, 16, 3, 3), {"": lambda w: w["weight"][0].permute(2, 3, 0, 1).reshape(9, 24, 16)}),
    "relations": (Relations(), {"": lambda w: w["weight"], ".root": lambda w: w["root"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_live_module_of_an_unknown_class_gives_the_numbers_of_its_weights(name):
    """Alpha and norm are those of the plain weights in float64, with a kernel's slices pooled and halved."""
    owner, expected = CASES[name]
    before = {key: value.clone() for key, value in owner.state_dict().items()}
    attributes = dict(vars(owner))
    snapshot = ww_monitor.analyze(nn.ModuleDict({"own": owner}))
    assert {layer.name: layer.kind for layer in snapshot.layers} == {f"own{end}": "parameter" for end in expected}
    for end, take in expected.items():
        plain = take(weighted(owner)).reshape(-1, *take(weighted(owner)).shape[-2:])
        factor = 0.5 if snapshot[f"own{end}"].role == "conv" else 1.0
        eigenvalues = np.concatenate([np.linalg.svd(one.numpy(), compute_uv=False) ** 2 for one in plain]) * factor
        alone = ww_monitor.analyze({"x.weight": plain[0]})["x"] if len(plain) == 1 else None
        assert np.allclose(np.sort(snapshot[f"own{end}"].eigenvalues), np.sort(eigenvalues), rtol=1e-5)
        if alone is not None:
            assert snapshot[f"own{end}"].value("alpha") == pytest.approx(alone.value("alpha"), rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in owner.state_dict().items())
    assert dict(vars(owner)) == attributes


@pytest.mark.parametrize("name", CASES)
def test_a_live_module_and_its_state_dict_give_the_same_numbers(name):
    owner = nn.ModuleDict({"own": CASES[name][0]})
    live, stored = ww_monitor.analyze(owner), ww_monitor.analyze(owner.state_dict())
    assert [(layer.name, layer.role) for layer in live.layers] == [(layer.name, layer.role) for layer in stored.layers]
    for a, b in zip(live.layers, stored.layers, strict=True):
        assert dict(a.metrics) == pytest.approx(dict(b.metrics), nan_ok=True, rel=1e-12)


def test_tables_masks_and_buffers_stay_out_with_the_reason():
    assert not matrices(Tables())
    assert reasons(Tables()) == {
        "pos_embed": "a table of positions",
        "relative_position_bias_table": "a table of positions",
        "attn_mask": "a mask",
        "mask_token": "a vector",
        "weight_scale_inv": "numbers of a quantisation",
        "deep": "4-dimensional: which sides make its matrix is not known",
        "average": "a buffer, which training does not change",
    }


def net():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), Linear(16, 20))


def scripted():
    return torch.jit.script(net())


def traced():
    return torch.jit.trace(net(), torch.zeros(2, 24))


def exported():
    return torch.export.export(net(), (torch.zeros(2, 24),)).module()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [scripted, traced, exported], ids=lambda make: make.__name__)
def test_a_compiled_module_has_the_matrices_of_the_one_it_was_made_of(make):
    model = make()
    found = matrices(model)
    assert {name: item.shape for name, item in found.items()} == {
        "0": (1, 32, 24), "2": (1, 16, 32), "3": (1, 20, 16)
    }  # fmt: skip
    for name, item in found.items():
        assert torch.equal(item.load()[0], model.state_dict()[f"{name}.weight"])


def equalise(module):
    """As in StyleGAN's training code: the weight is made of `weight_orig` before every forward pass."""
    weight = module.weight
    del module._parameters["weight"]
    module.register_parameter("weight_orig", nn.Parameter(weight.detach()))
    module.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_orig * 2.0))
    return module


@pytest.mark.parametrize("ran", [False, True], ids=["before", "after"])
def test_what_a_hook_makes_a_weight_of_is_read_before_and_after_a_forward_pass(ran):
    model = nn.Sequential(equalise(nn.Linear(12, 10)))
    if ran:
        model(torch.zeros(1, 12))
        with torch.no_grad():
            model[0].weight_orig.add_(1.0)
    found = matrices(model)
    assert {name: item.kind for name, item in found.items()} == {"0": "dense"}
    assert torch.equal(found["0"].load()[0], model[0].weight_orig.detach())
    assert not reasons(model)


def test_a_parameter_that_a_layer_owns_too_is_listed_once():
    own = Linear(24, 32)
    model = nn.ModuleDict({"own": own, "known": nn.Linear(24, 32)})
    model["known"].weight = own.weight
    assert list(matrices(model)) == ["known"]
    assert reasons(model) == {"own": "tied to known"}


@pytest.mark.parametrize("name", ["XLNet", "IBert"])
def test_models_whose_layers_are_their_own_are_followed(name):
    """Of XLNet all projections, each as one matrix; of I-BERT its quantised layers."""
    transformers = pytest.importorskip("transformers", reason="the models are theirs")
    small = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48)
    config = config if name == "XLNet" else transformers.IBertConfig(vocab_size=50, max_position_embeddings=40, **small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{name}Model")(config)
    found = matrices(model)
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert sum(np.prod(item.shape) for item in found.values()) > 0.97 * whole
    if name == "XLNet":
        q = found["layer.0.rel_attn.q"]
        assert (q.kind, q.role, q.shape) == ("parameter", "q", (1, 32, 32))
        assert torch.equal(q.load()[0], model.layer[0].rel_attn.q.detach().reshape(32, 32))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(9, 4)), nn.LayerNorm(9)], ids=["small", "vectors"])
def test_a_monitor_that_watches_nothing_says_once_what_it_found_and_what_to_do(model):
    monitor = ww_monitor.Monitor(every_n_steps=1)
    with pytest.warns(ww_monitor.SpectralWarning, match="no matrix to watch.*found: .*; change include") as warned:
        _ = [monitor.observe(walk(model), step=step) for step in range(3)]
    assert len(warned) == 1
    reason = "no weight of two" if isinstance(model, nn.LayerNorm) else "1 × 4 eigenvalues, fewer than min_size=8"
    assert reason in str(warned[0].message)


def test_the_examples_in_the_docstrings_run():
    import doctest

    assert doctest.testmod(names).attempted
    assert not doctest.testmod(names).failed


class Conditional(nn.Module):
    """Experts of a convolution, each a row, whose shape the module says."""

    def __init__(self, declared):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 24 * 12 * 9))
        self.weight_shape = declared


def test_rows_whose_shape_a_module_says_are_kernels_of_that_shape():
    module = Conditional((24, 12, 3, 3))
    found = matrices(nn.ModuleDict({"conv": module}))
    assert {name: (item.shape, item.role) for name, item in found.items()} == {
        f"conv.{expert}": ((9, 24, 12), "conv") for expert in range(4)
    }
    kernel = module.weight[2].view(24, 12, 3, 3)
    assert torch.equal(found["conv.2"].load(), kernel.permute(2, 3, 0, 1).reshape(9, 24, 12))
    for other in (None, "24, 12, 3, 3", (24, 12, 3, 2), (24, 108)):
        assert matrices(Conditional(other))["Conditional"].shape == (1, 4, 24 * 12 * 9)


@pytest.mark.parametrize("made", ["weight norm", "spectral norm", "pruned"])
def test_a_weight_that_a_hook_makes_in_a_class_of_its_own_is_followed(made):
    make = {
        "weight norm": nn.utils.weight_norm,
        "spectral norm": nn.utils.spectral_norm,
        "pruned": lambda module: prune.random_unstructured(module, "weight", 0.5),
    }[made]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = nn.ModuleDict({"own": make(Linear(40, 30)).eval()})
    found = matrices(module)
    module["own"](torch.ones(40))  # the hook writes the weight
    assert (list(found), reasons(module)) == (["own"], {})
    assert torch.equal(found["own"].load()[0], module["own"].weight)


class Drawn(nn.Linear):
    """A layer whose weight is a property that draws numbers and counts."""

    def __init__(self):
        super().__init__(40, 30)
        del self.weight
        self.factors = nn.ParameterList([torch.randn(30, 5), torch.randn(5, 40)])
        self.register_buffer("calls", torch.zeros(()))

    @property
    def weight(self):
        if not hasattr(self, "factors"):
            raise AttributeError
        self.calls.add_(1)
        noise = torch.rand(()) * self.training
        return self.factors[0] @ self.factors[1] + noise


def test_a_weight_that_is_a_property_is_read_without_a_trace():
    module = nn.Sequential(Drawn())
    before = torch.get_rng_state()
    weights = matrices(module)["0"].load()[0]
    assert torch.equal(weights, module[0].factors[0] @ module[0].factors[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert (float(module[0].calls), module[0].training) == (0, True)


class Reticent(nn.Module):
    """A model with properties that fail and methods that take nothing, as models of a user's own have."""

    def __init__(self):
        super().__init__()
        self.qkv, self.weight_raw = nn.Linear(16, 48), nn.Parameter(torch.randn(12, 16))

    @property
    def num_heads(self):
        raise ValueError

    weight = down_proj = config = gate_up_proj = num_attention_heads = num_heads

    def named_parameters(self):
        return iter(())

    parameters = named_buffers = named_parameters


def test_what_a_model_does_not_tell_costs_no_weight():
    found = matrices(nn.ModuleDict({"a": Reticent()}))
    assert [(name, item.frozen) for name, item in found.items()] == [
        ("a.weight_raw", False),
        *((f"a.qkv.{e}", False) for e in "qkv"),
    ]
    assert ww_monitor.describe(Reticent()).parameters == 16 * 48 + 48 + 12 * 16


class Projections(nn.Module):
    """Matrices whose names end as those of a weight norm, of packed codes, or mention what they act on."""

    def __init__(self):
        super().__init__()
        for name in NAMES_OF_WEIGHTS:
            self.register_parameter(name, nn.Parameter(torch.randn(32, 24)))
        self.register_buffer("indices", torch.zeros(2, 500, dtype=torch.int64))


NAMES_OF_WEIGHTS = [
    "weight_q", "weight_k", "weight_v", "weight_g", "weights_v", "weight_orig", "W_q", "qweight", "pos_proj", "rope_w",
    "rel_pos_proj", "pe_kernel", "mask_proj", "bias_proj", "weight_bias_proj", "offset_kernel", "scale_net",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["module", "state dict"])
def test_a_matrix_is_a_weight_whatever_else_its_name_may_mean(kind):
    module = nn.ModuleDict({"own": Projections()})
    found = list(walk(module) if kind == "module" else walk_state_dict(module.state_dict()))
    assert [item.name for item in found if isinstance(item, Matrix)] == [f"own.{name}" for name in NAMES_OF_WEIGHTS]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "made_of"),
    [
        (lambda: nn.utils.weight_norm(nn.Linear(9, 12)), "weight_v"),
        (lambda: nn.utils.weight_norm(nn.Linear(9, 12), dim=None), "weight_v"),
        (lambda: nn.utils.weight_norm(nn.Conv2d(9, 12, 3)), "weight_v"),
        (lambda: nn.utils.spectral_norm(nn.Linear(9, 12)), "weight_orig"),
        (lambda: prune.l1_unstructured(nn.MultiheadAttention(16, 2), "in_proj_weight", 0.5), "in_proj_weight_orig"),
    ],
)
def test_what_a_weight_is_made_of_is_none_in_a_state_dict(make, made_of):
    reasons = {item.name: item.reason for item in walk_state_dict(make().state_dict()) if isinstance(item, Skipped)}
    assert reasons[made_of] == "stored before pruning or a parametrization, which needs the model"


def test_a_frozen_script_lists_its_constants():
    """Their numbers are part of the code, and none of them learns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(32, 24), nn.ReLU()).eval()))
    assert (matrices(frozen), reasons(nn.ModuleDict({"a": frozen}))) == (
        {},
        {"a": "a frozen script: its weights are constants"},
    )
