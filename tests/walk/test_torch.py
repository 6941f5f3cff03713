"""What the PyTorch walker finds, what it calls it, and that it leaves no trace."""

import doctest
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ww_monitor.kind import Kind
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import roles
from ww_monitor.walk import torch as walker
from ww_monitor.walk.torch import walk


def matrices(model):
    """The matrices of a model by name."""
    return {item.name: item for item in walk(model) if isinstance(item, Matrix)}


def reasons(model):
    """The reasons of what was left out, by name."""
    return {item.name: item.reason for item in walk(model) if isinstance(item, Skipped)}


def in_box(module):
    """A model whose only child is `module`, called `box`."""
    return nn.ModuleDict({"box": module})


def state(model):
    """Everything reading must not change: tensors bit for bit, versions, flags, attributes, random stream."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bytes": {name: t.detach().flatten().contiguous().view(torch.uint8).tolist() for name, t in tensors.items()},
        "identities": {name: (id(t), t._version) for name, t in tensors.items()},
        "flags": [(name, module.training) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


class Bare(nn.Module):
    """A custom module that holds its weight itself."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))


class Wrapper(nn.Module):
    """A stand-in for FSDP and for activation checkpointing: a module that holds another under a reserved name."""

    def __init__(self, attribute, module):
        super().__init__()
        self.add_module(attribute, module)


class Restless(nn.Module):
    """A parametrization that draws noise and counts its calls, also in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight + torch.randn_like(weight)


class LowRank(nn.Module):
    """A parametrization W = AB whose factors have other shapes than W."""

    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        return weight[:, :2].contiguous(), torch.ones(2, weight.shape[1])


class Doubled(nn.Module):
    """A parametrization W = 2 X."""

    def forward(self, weight):
        return 2 * weight


class Expensive(Doubled):
    """A parametrization that counts its calls in a plain attribute."""

    calls = 0

    def forward(self, weight):
        Expensive.calls += 1
        return 2 * weight


class Modal(nn.Module):
    """A parametrization that differs between training and evaluation, and counts the calls of `train`."""

    calls = 0

    def forward(self, weight):
        return weight if self.training else 3 * weight

    def train(self, mode=True):
        self.calls += 1
        return super().train(mode)


class Computed(nn.Linear):
    """A Linear that computes its weight at every access."""

    def __init__(self):
        nn.Module.__init__(self)
        self.left, self.right = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    @property
    def weight(self):
        return torch.outer(self.left, self.right)


class Broken(nn.Linear):
    """A Linear that raises when its weight is read."""

    def __init__(self):
        nn.Module.__init__(self)

    @property
    def weight(self):
        raise RuntimeError("gone")


KNOWN = [
    (nn.Linear(7, 5), "dense", {"box": (1, 5, 7)}),
    (nn.Bilinear(3, 4, 5), "dense", {"box": (5, 3, 4)}),
    (nn.Embedding(9, 4), "embedding", {"box": (1, 9, 4)}),
    (nn.EmbeddingBag(9, 4), "embedding", {"box": (1, 9, 4)}),
    (nn.Conv1d(6, 8, 3), "conv", {"box": (3, 8, 6)}),
    (nn.Conv2d(6, 8, (3, 2), groups=2), "conv", {"box": (6, 8, 3)}),
    (nn.Conv3d(2, 3, 2), "conv", {"box": (8, 3, 2)}),
    (nn.ConvTranspose1d(6, 8, 3), "conv", {"box": (3, 6, 8)}),
    (nn.ConvTranspose2d(6, 8, 3), "conv", {"box": (9, 6, 8)}),
    (nn.ConvTranspose3d(2, 3, 2), "conv", {"box": (8, 2, 3)}),
    (nn.RNN(3, 4), "recurrent", {"box.weight_ih_l0": (1, 4, 3), "box.weight_hh_l0": (1, 4, 4)}),
    (nn.RNNCell(3, 4), "recurrent", {"box.weight_ih": (1, 4, 3), "box.weight_hh": (1, 4, 4)}),
    (
        nn.GRUCell(3, 4),
        "recurrent",
        {f"box.weight_{s}.{g}": (1, 4, n) for s, n in (("ih", 3), ("hh", 4)) for g in "rzn"},
    ),
    (
        nn.GRU(3, 4, bidirectional=True),
        "recurrent",
        {
            f"box.weight_{s}_l0{d}.{g}": (1, 4, n)
            for d in ("", "_reverse")
            for s, n in (("ih", 3), ("hh", 4))
            for g in "rzn"
        },
    ),
    (
        nn.LSTMCell(3, 4),
        "recurrent",
        {f"box.weight_{s}.{g}": (1, 4, n) for s, n in (("ih", 3), ("hh", 4)) for g in "ifgo"},
    ),
    (
        nn.LSTM(3, 4, num_layers=2),
        "recurrent",
        {
            f"box.weight_{s}_l{layer}.{g}": (1, 4, n)
            for layer, s, n in ((0, "ih", 3), (0, "hh", 4), (1, "ih", 4), (1, "hh", 4))
            for g in "ifgo"
        },
    ),
    (
        nn.LSTM(3, 4, proj_size=2),
        "recurrent",
        {f"box.weight_{s}_l0.{g}": (1, 4, n) for s, n in (("ih", 3), ("hh", 2)) for g in "ifgo"}
        | {"box.weight_hr_l0": (1, 2, 4)},
    ),
]


@pytest.mark.parametrize(("module", "kind", "shapes"), KNOWN, ids=lambda case: type(case).__name__)
def test_known_modules(module, kind, shapes):
    """Every known module gives its weights in order, and load returns the announced shape."""
    found = matrices(in_box(module))
    assert {name: matrix.shape for name, matrix in found.items()} == shapes
    assert list(found) == list(shapes)
    assert {matrix.kind for matrix in found.values()} == {kind}
    assert {name: tuple(matrix.load().shape) for name, matrix in found.items()} == shapes


def test_biases_are_not_listed():
    """Parameters of fewer than two dimensions are neither matrices nor skipped."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.PReLU(4))
    assert [item.name for item in walk(model)] == ["0"]


def test_frozen_layers_are_included():
    """A weight without gradient is a matrix like any other."""
    assert list(matrices(nn.Sequential(nn.Linear(4, 4).requires_grad_(False)))) == ["0"]


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_conv_slices(make, memory):
    """Slice i·kw + j of a kernel is kernel[:, :, i, j]."""
    module = make(3, 4, (2, 5)).to(memory_format=memory)
    stack = matrices(in_box(module))["box"].load()
    for i in range(2):
        for j in range(5):
            assert torch.equal(stack[5 * i + j], module.weight[:, :, i, j])
    assert stack.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()


def test_attention_projections():
    """The stacked projection is cut into q, k and v in this order, and the output projection follows."""
    module = nn.MultiheadAttention(8, 2)
    found = matrices(in_box(module))
    assert {n: (m.kind, m.role) for n, m in found.items()} == {
        "box.q": ("attention", "q"),
        "box.k": ("attention", "k"),
        "box.v": ("attention", "v"),
        "box.out_proj": ("dense", "o"),
    }
    for index, part in enumerate("qkv"):
        assert torch.equal(found[f"box.{part}"].load()[0], module.in_proj_weight[8 * index : 8 * index + 8])


def test_attention_with_separate_projections():
    """Keys and values of other widths have projections of their own, under the same names; 3-D biases are no weight."""
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
    assert {n: m.shape for n, m in matrices(in_box(module)).items()} == {
        "box.q": (1, 8, 8),
        "box.k": (1, 8, 6),
        "box.v": (1, 8, 4),
        "box.out_proj": (1, 8, 8),
    }
    assert reasons(in_box(module)) == {"box.bias_k": "a bias", "box.bias_v": "a bias"}


def test_recurrent_gates():
    """Gate g of an LSTM is the block of rows that torch documents: input, forget, cell, output."""
    module = nn.LSTM(3, 4)
    found = matrices(in_box(module))
    for index, gate in enumerate("ifgo"):
        assert torch.equal(found[f"box.weight_hh_l0.{gate}"].load()[0], module.weight_hh_l0[4 * index : 4 * index + 4])


def test_transposed_linear_of_transformers():
    """The Conv1D of transformers is a dense layer although its weight is stored as [in, out]."""
    utils = pytest.importorskip("transformers.pytorch_utils", reason="its Conv1D is what is tested")
    found = matrices(in_box(utils.Conv1D(12, 4)))
    assert {n: (m.kind, m.shape) for n, m in found.items()} == {"box": ("dense", (1, 4, 12))}


def test_gpt2():
    """A GPT-2 gives every projection once with its role, and the tied head is left out."""
    transformers = pytest.importorskip("transformers", reason="the model is theirs")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    )
    assert {n: m.role for n, m in matrices(model).items()} == {
        "transformer.wte": "embed",
        "transformer.wpe": "embed",
        "transformer.h.0.attn.c_attn.q": "q",
        "transformer.h.0.attn.c_attn.k": "k",
        "transformer.h.0.attn.c_attn.v": "v",
        "transformer.h.0.attn.c_proj": "o",
        "transformer.h.0.mlp.c_fc": "up",
        "transformer.h.0.mlp.c_proj": "down",
    }
    assert reasons(model) == {"lm_head": "tied to transformer.wte"}


# --- names


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPED = [
    (compiled(nn.Linear(3, 4)), ["Linear"]),
    (compiled(nn.Sequential(nn.Linear(3, 4))), ["0"]),
    (nn.Sequential(compiled(nn.Linear(3, 4))), ["0"]),
    (nn.DataParallel(nn.Sequential(nn.Linear(3, 4))), ["0"]),
    (nn.DataParallel(compiled(nn.Sequential(nn.Linear(3, 4)))), ["0"]),
    (compiled(nn.DataParallel(nn.Sequential(nn.Linear(3, 4)))), ["0"]),
    (Wrapper("_fsdp_wrapped_module", nn.Sequential(nn.Linear(3, 4))), ["0"]),
    (in_box(Wrapper("_checkpoint_wrapped_module", nn.Sequential(nn.Linear(3, 4)))), ["box.0"]),
    (in_box(Wrapper("_fsdp_wrapped_module", compiled(nn.Sequential(nn.Linear(3, 4))))), ["box.0"]),
    (Wrapper("module", nn.Sequential(nn.Linear(3, 4))), ["module.0"]),
    (in_box(Wrapper("module", nn.Linear(3, 4))), ["box.module"]),
]


@pytest.mark.parametrize(("model", "names"), WRAPPED, ids=range(len(WRAPPED)))
def test_wrappers_leave_no_mark(model, names):
    """Wrappers vanish from the names; `module` does so only where the root is data-parallel."""
    assert list(matrices(model)) == names


def test_distributed_data_parallel(tmp_path):
    """The `module.` of DistributedDataParallel at the root vanishes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 4)))
        assert list(matrices(model)) == ["0"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("root", "names"),
    [
        (nn.Linear(3, 4), ["Linear"]),
        (parametrizations.spectral_norm(nn.Linear(3, 4)), ["Linear"]),
        (nn.LSTMCell(3, 4), [f"weight_{stem}.{gate}" for stem in ("ih", "hh") for gate in "ifgo"]),
        (nn.MultiheadAttention(4, 2), ["q", "k", "v", "out_proj"]),
    ],
    ids=["Linear", "parametrized", "LSTMCell", "MultiheadAttention"],
)
def test_root_names(root, names):
    """A root that is a layer itself is named by its class, its parts by themselves."""
    assert list(matrices(root)) == names


def test_module_called_weight():
    """Only the parameter's own `weight` is dropped, not a module of that name."""
    assert list(matrices(nn.ModuleDict({"weight": nn.Linear(3, 4)}))) == ["weight"]


def test_names_are_unique():
    """Where cleaning makes two names equal, the second is numbered."""
    model = nn.Module()
    model.a = Wrapper("_fsdp_wrapped_module", nn.ModuleDict({"b": nn.Linear(3, 4)}))
    model.a.b = nn.Linear(5, 6)
    assert {n: m.shape for n, m in matrices(model).items()} == {"a.b": (1, 4, 3), "a.b#2": (1, 6, 5)}


# --- tied and shared


def test_tied_parameter():
    """A parameter at two places is a matrix under its first name and a Skipped under the second."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model[1].weight = model[0].weight
    assert list(matrices(model)) == ["0"]
    assert reasons(model) == {"1": "tied to 0"}


def test_tied_storage():
    """Two parameters on one storage are tied; other rows of it, or equal numbers elsewhere, are not."""
    numbers = torch.randn(8, 4)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for layer, data in zip(model, (numbers[:4], numbers[:4], numbers[4:], numbers[:4].clone()), strict=True):
        layer.weight = nn.Parameter(data)
    assert model[0].weight is not model[1].weight
    assert list(matrices(model)) == ["0", "2", "3"]
    assert reasons(model) == {"1": "tied to 0"}


def test_tied_to_a_bare_parameter():
    """A custom module that borrows a known weight is called tied, not unknown."""
    model = nn.ModuleDict({"known": nn.Linear(4, 5), "bare": Bare()})
    model["bare"].kernel = model["known"].weight
    assert reasons(model) == {"bare.kernel": "tied to known"}


def test_bare_parameter_takes_no_name():
    """A known weight is a matrix also where a custom module before it holds the same parameter."""
    model = nn.ModuleDict({"bare": Bare(), "known": nn.Linear(4, 5)})
    model["known"].weight = model["bare"].kernel
    assert list(matrices(model)) == ["known"]


def test_tied_but_pruned():
    """A tied weight that is pruned at one place computes something else there, so both are matrices."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    found = matrices(model)
    assert list(found) == ["0", "1"]
    assert int((found["1"].load() == 0).sum()) == 8
    assert int((found["0"].load() == 0).sum()) == 0


def test_computed_weights_are_not_tied():
    """Weights computed at every access are never taken for tied because memory was used again."""
    assert list(matrices(nn.Sequential(*(Computed() for _ in range(6))))) == [str(index) for index in range(6)]


def test_shared_module():
    """A module at two places is walked once."""
    layer = nn.Linear(4, 4)
    assert [item.name for item in walk(nn.ModuleDict({"a": layer, "b": in_box(layer)}))] == ["a"]


# --- left out, with a reason


def with_weight(weight):
    layer = nn.Linear(4, 4)
    layer.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
    return layer


LEFT_OUT = [
    (nn.Linear(4, 4, device="meta"), "on the meta device: no data", (4, 4)),
    (with_weight(torch.eye(4).to_sparse()), "sparse weights (layout torch.sparse_coo)", (4, 4)),
    (with_weight(torch.ones(4, 4, dtype=torch.int8)), "integer weights", (4, 4)),
    (with_weight(torch.ones(4, 4, dtype=torch.bool)), "integer weights", (4, 4)),
    (nn.Linear(4, 4, dtype=torch.complex64), "complex weights", (4, 4)),
    (nn.LazyLinear(4), "not initialised: a lazy module before its first forward pass", ()),
    (nn.LazyConv2d(4, 3), "not initialised: a lazy module before its first forward pass", ()),
    (with_weight(torch.ones(0, 4)), "empty: a zero in the shape (0, 4)", (0, 4)),
    (with_weight(torch.ones(16)), "1-dimensional where dense weights have 2 to 3", (16,)),
    (with_weight(None), "no weight tensor in the module: packed or sharded elsewhere", ()),
    (Broken(), "could not be read: RuntimeError: gone", ()),
]


@pytest.mark.parametrize(("module", "reason", "shape"), LEFT_OUT, ids=[case[1] for case in LEFT_OUT])
def test_reasons(module, reason, shape):
    """A weight without a spectrum is left out with the reason, and its neighbours stay."""
    model = nn.ModuleDict({"box": module, "healthy": nn.Linear(4, 4)})
    skipped = [item for item in walk(model) if isinstance(item, Skipped)]
    assert skipped == [Skipped("box", skipped[0].kind, shape, reason)]
    assert list(matrices(model)) == ["healthy"]


def test_stacked_weights_are_left_out_whole():
    """A recurrent weight without data is one Skipped, not one a gate."""
    assert reasons(in_box(nn.LSTMCell(3, 4, device="meta"))) == {
        "box.weight_ih": "on the meta device: no data",
        "box.weight_hh": "on the meta device: no data",
    }


def test_the_gains_of_a_normalisation_are_no_matrix():
    reason = "parameters of LayerNorm are not a known weight"
    assert reasons(in_box(nn.LayerNorm((2, 3)))) == {"box": reason, "box.bias": reason}


def test_parametrized_unknown_parameter():
    """A parametrized weight of an unknown class is listed once, under its own name, as the class computes with it."""
    model = in_box(Bare())
    before = model["box"].kernel.detach().clone()
    parametrize.register_parametrization(model["box"], "kernel", Doubled())
    found = matrices(model)
    assert list(found) == ["box.kernel"]
    assert torch.equal(found["box.kernel"].load()[0], 2 * before)
    assert not reasons(model)


def test_quantized_modules():
    """Quantized modules are left out without an exception, whether they pack the weight or hold it as integers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated, but models with it exist
        packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)))
    reason = "a quantized module: no floating-point weight"
    assert reasons(packed) == {"0": reason, "1": reason}
    held = nn.Module()
    held.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
    held.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    assert reasons(in_box(held)) == {"box.qweight": "packed codes (GPTQ or AWQ), which are not read"}


# --- loading


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_storage_precision(dtype):
    """Every floating-point precision is kept as it is stored."""
    layer = with_weight(torch.randn(4, 4).to(dtype))
    loaded = matrices(in_box(layer))["box"].load()
    assert loaded.dtype == dtype
    assert torch.equal(loaded[0].view(torch.uint8), layer.weight.view(torch.uint8))


@pytest.mark.parametrize(("module", "kind", "shapes"), KNOWN, ids=lambda case: type(case).__name__)
def test_views(module, kind, shapes):
    """Loading copies nothing: the result lies in the parameter's storage, detached."""
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for matrix in matrices(in_box(module)).values():
        loaded = matrix.load()
        assert loaded.untyped_storage().data_ptr() in storages
        assert not loaded.requires_grad
        assert loaded.grad_fn is None


def test_load_reads_the_present():
    """A matrix keeps no numbers: load returns the weight of now, also after an assignment or a later pruning."""
    model = in_box(nn.Linear(4, 4))
    matrix = matrices(model)["box"]
    model["box"].weight = nn.Parameter(torch.full((4, 4), 3.0))
    assert torch.equal(matrix.load(), torch.full((1, 4, 4), 3.0))
    prune.identity(model["box"], "weight")
    model["box"].weight_mask[0] = 0
    assert matrix.load()[0, :, 0].tolist() == [0, 3, 3, 3]


def test_grad_mode_is_not_leaked():
    """While the walk is suspended between two items the caller's grad mode is untouched."""
    for item in walk(nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4)), Bare())):
        assert torch.is_grad_enabled(), item.name


def old_style(norm, *args):
    def apply(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but models with it exist
            return norm(layer, *args)

    return apply


def random_prune(layer):
    return prune.random_unstructured(layer, "weight", amount=0.5)


def custom(function):
    def apply(layer):
        return parametrize.register_parametrization(layer, "weight", function())

    return apply


COMPUTED = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "cayley": functools.partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "householder": functools.partial(parametrizations.orthogonal, orthogonal_map="householder"),
    "doubled": custom(Doubled),
    "low rank": custom(LowRank),
    "two": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "pruned": random_prune,
    "pruned twice": lambda layer: random_prune(random_prune(layer)),
    "old spectral_norm": old_style(nn.utils.spectral_norm),
    "old weight_norm": old_style(nn.utils.weight_norm),
}
LAYERS = {"wide": lambda: nn.Linear(9, 6), "tall": lambda: nn.Linear(6, 9), "conv": lambda: nn.Conv2d(4, 6, 3)}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("change", [name for name in COMPUTED if name != "low rank"])
def test_computed_weight(layer, change):
    """A computed weight is what the layer computes with in evaluation mode, and its own tensors are not listed."""
    model = in_box(COMPUTED[change](LAYERS[layer]()))
    (item,) = walk(model)
    loaded = item.load()
    used = model["box"].eval()
    used(torch.randn(1, 4, 5, 5) if layer == "conv" else torch.randn(2, used.in_features))
    expected = used.weight.detach()
    expected = expected.flatten(2).permute(2, 0, 1) if layer == "conv" else expected[None]
    assert item.name == "box"
    assert item.shape == tuple(expected.shape)
    assert torch.equal(loaded, expected)


def test_factored_weight():
    """A parametrization from factors of other shapes is announced with the shape of the product."""
    (item,) = walk(in_box(COMPUTED["low rank"](nn.Linear(9, 6))))
    assert item.shape == (1, 6, 9)
    assert torch.linalg.matrix_rank(item.load()[0]) <= 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", COMPUTED)
def test_no_trace(change, training):
    """Walking and loading leave tensors, versions, flags, attributes and the random stream as they were."""
    model = in_box(COMPUTED[change](nn.Linear(9, 6))).train(training)
    if change == "two":
        model["box"].parametrizations.weight[0].training = False  # an uneven pattern of flags is restored too
    before = state(model)
    for matrix in matrices(model).values():
        matrix.load()
    assert state(model) == before


def test_a_naive_read_leaves_a_trace():
    """The check above can fail: reading `.weight` of a spectral norm in training mode moves its buffers."""
    model = in_box(parametrizations.spectral_norm(nn.Linear(9, 6)))
    before = state(model)
    _ = model["box"].weight
    assert state(model)["bytes"] != before["bytes"]


def test_restless_parametrization():
    """Noise and buffer updates of a parametrization reach neither the random stream nor the buffer."""
    model = in_box(nn.Linear(9, 6))
    parametrize.register_parametrization(model["box"], "weight", Restless())
    before = state(model)
    (item,) = walk(model)
    item.load()
    assert state(model) == before


def test_flags_are_restored_after_an_error():
    """A parametrization that raises is reported by load, and its training flag is as before."""
    model = in_box(nn.Linear(4, 4))
    parametrize.register_parametrization(model["box"], "weight", Doubled())
    (item,) = walk(model)
    function = model["box"].parametrizations.weight[0]
    function.forward = None
    with pytest.raises(TypeError, match="not callable"):
        item.load()
    assert function.training


def test_train_is_not_called():
    """The flags are switched without `train()` or `eval()`, which a class may override to do more."""
    model = in_box(nn.Linear(4, 4))
    function = Modal()
    parametrize.register_parametrization(model["box"], "weight", function)
    before = function.calls
    (item,) = walk(model)
    assert torch.equal(item.load()[0], 3 * model["box"].parametrizations.weight.original)
    assert function.training
    assert function.calls == before


def test_no_graph_is_built(monkeypatch):
    """A parametrization is evaluated without grad, by the walk where the shape needs it and by load."""
    model = in_box(COMPUTED["low rank"](nn.Linear(9, 6)))
    modes = []
    monkeypatch.setattr(LowRank, "forward", lambda self, a, b: modes.append(torch.is_grad_enabled()) or a @ b)
    (item,) = walk(model)
    item.load()
    assert modes == [False, False]


def test_walk_does_not_evaluate():
    """The shape of an ordinary custom parametrization is known without computing it."""
    model = in_box(nn.Linear(4, 4))
    parametrize.register_parametrization(model["box"], "weight", Expensive())
    before = Expensive.calls
    (item,) = walk(model)
    assert Expensive.calls == before
    item.load()
    assert Expensive.calls == before + 1


def test_parametrization_cache_is_left_alone():
    """Loading inside `parametrize.cached()` does not cut the weight off from its gradient."""
    model = in_box(nn.Linear(4, 4))
    parametrize.register_parametrization(model["box"], "weight", Doubled())
    with parametrize.cached():
        matrices(model)["box"].load()
        model["box"](torch.ones(1, 4)).sum().backward()
    assert model["box"].parametrizations.weight.original.grad is not None


def test_pruned_weight_is_current():
    """A pruned weight is mask times the stored weight of now, not the product of the last forward pass."""
    layer = random_prune(nn.Linear(4, 4))
    with torch.no_grad():
        layer.weight_orig.fill_(2.0)
    (item,) = walk(in_box(layer))
    assert torch.equal(item.load()[0], 2 * layer.weight_mask)


def test_pruned_gates():
    """A pruned recurrent weight is cut into gates like any other."""
    layer = prune.l1_unstructured(nn.LSTM(3, 4), "weight_hh_l0", amount=0.5)
    found = matrices(in_box(layer))
    assert len(found) == 8
    assert not reasons(in_box(layer))
    assert torch.equal(found["box.weight_hh_l0.g"].load()[0], (layer.weight_hh_l0_orig * layer.weight_hh_l0_mask)[8:12])


# --- roles

ROLES = [
    ("transformer.h.0.attn.c_attn", "dense", "qkv"),
    ("transformer.h.0.crossattention.c_attn", "dense", ""),
    ("transformer.h.0.attn.c_proj", "dense", "o"),
    ("transformer.h.0.mlp.c_fc", "dense", "up"),
    ("transformer.h.0.mlp.c_proj", "dense", "down"),
    ("transformer.wte", "embedding", "embed"),
    ("model.layers.3.self_attn.q_proj", "dense", "q"),
    ("model.layers.3.self_attn.k_proj", "dense", "k"),
    ("model.layers.3.self_attn.v_proj", "dense", "v"),
    ("model.layers.3.self_attn.o_proj", "dense", "o"),
    ("model.layers.3.mlp.gate_proj", "dense", "gate"),
    ("model.layers.3.mlp.up_proj", "dense", "up"),
    ("model.layers.3.mlp.down_proj", "dense", "down"),
    ("model.embed_tokens", "dense", "embed"),
    ("lm_head", "dense", "head"),
    ("encoder.layer.1.attention.self.query", "dense", "q"),
    ("encoder.layer.1.attention.self.key", "dense", "k"),
    ("encoder.layer.1.attention.self.value", "dense", "v"),
    ("encoder.layer.1.attention.output.dense", "dense", "o"),
    ("encoder.layer.1.intermediate.dense", "dense", "up"),
    ("encoder.layer.1.output.dense", "dense", "down"),
    ("pooler.dense", "dense", ""),
    ("layers.0.self_attn.q", "attention", "q"),
    ("mixer.v", "attention", "v"),
    ("v", "attention", "v"),
    ("layers.0.self_attn.out_proj", "dense", "o"),
    ("layers.0.linear1", "dense", "up"),
    ("layers.0.linear2", "dense", "down"),
    ("decoder.block.0.layer.0.SelfAttention.q", "dense", "q"),
    ("decoder.block.0.layer.2.DenseReluDense.wo", "dense", "down"),
    ("h.0.self_attention.query_key_value", "dense", "qkv"),
    ("h.0.self_attention.dense", "dense", "o"),
    ("stem.q_proj", "conv", "conv"),
    ("lstm.weight_ih_l0.o", "recurrent", ""),
    ("fc1", "dense", ""),
    ("value", "dense", ""),
    ("policy.q", "dense", ""),
    ("overhead", "dense", ""),
    ("0", "dense", ""),
]


@pytest.mark.parametrize(("name", "kind", "role"), ROLES)
def test_roles(name, kind, role):
    """The role follows from how common families name their layers, and is empty where the name does not tell."""
    assert roles.infer_role(name, Kind(kind)) == role


def test_examples():
    """The examples in the docstrings run."""
    for module in (walker, roles):
        results = doctest.testmod(module)
        assert results.attempted
        assert not results.failed


class Forwarded(nn.Module):
    """As Lightning's Fabric wraps a module."""

    def __init__(self, module: nn.Module, original: nn.Module | None = None) -> None:
        super().__init__()
        self._forward_module = module
        self._original_module = original or module


@pytest.mark.parametrize(
    "wrap",
    [
        Forwarded,
        lambda net: Forwarded(nn.DataParallel(net), net),
        lambda net: nn.DataParallel(Forwarded(net)),
        lambda net: Forwarded(Forwarded(net)),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_fabrics_wrapper_leaves_no_mark_on_the_names(wrap, inside):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.ModuleDict({"net": wrap(net)}) if inside else wrap(net)
    start = "net." if inside else ""
    assert [item.name for item in walk(model)] == [f"{start}0", f"{start}1"]
