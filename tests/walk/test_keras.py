"""Keras models: which weights are listed, in which shape, and that their numbers are those of the Keras arrays."""

import doctest
import os

import numpy as np
import pytest
import torch
from torch import nn

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported

keras = pytest.importorskip("keras", reason="the models are theirs")

from tests.processes import run_python  # noqa: E402
from ww_monitor import analyze  # noqa: E402
from ww_monitor.errors import InvalidArgument, MissingDependency, WWMonitorError  # noqa: E402
from ww_monitor.matrix import Matrix, Skipped  # noqa: E402
from ww_monitor.walk import keras as walker  # noqa: E402
from ww_monitor.walk.keras import load_keras_file, walk_keras  # noqa: E402
from ww_monitor.walk.sources import walk_source  # noqa: E402

layers = keras.layers

pytestmark = [
    # Keras turns torch parameters into arrays with `copy=False`, which torch's `__array__` does not take yet
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    # Keras tells that an input layer is not quantized
    pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method.*:UserWarning"),
    pytest.mark.skipif(keras.backend.backend() != "torch", reason="values are compared with torch tensors"),
]


def matrices(model, **options):
    return {item.name: item for item in walk_source(model, **options) if isinstance(item, Matrix)}


def skipped(model):
    return {item.name: item.reason for item in walk_source(model) if isinstance(item, Skipped)}


def build():
    """A functional model with one of most kinds, a shared layer and a nested model."""
    tokens = keras.Input((12,))
    x = layers.Embedding(30, 16, name="tok")(tokens)
    x = layers.MultiHeadAttention(2, 8, name="mha")(x, x)
    x = layers.Bidirectional(layers.LSTM(9, return_sequences=True, name="lstm"), name="both")(x)
    x = layers.GRU(10, return_sequences=True, name="gru")(x)
    x = layers.SimpleRNN(5, return_sequences=True, name="rnn")(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Reshape((12, 5, 1))(x)
    x = layers.Conv2D(8, 3, name="conv")(x)
    x = layers.SeparableConv2D(6, (3, 1), depth_multiplier=2, name="sep")(x)
    x = layers.Conv2DTranspose(4, (2, 3), name="up")(x)
    x = layers.DepthwiseConv2D((2, 1), depth_multiplier=3, name="deep")(x)
    x = layers.Flatten()(x)
    inner = keras.Sequential([layers.Dense(10, name="a"), layers.Dense(10, name="b")], name="inner")
    shared = layers.Dense(10, name="shared")
    return keras.Model(tokens, layers.Dense(3, name="head")(shared(shared(inner(x)))))


@pytest.fixture(scope="module")
def model():
    return build()


def gates(path, letters, units, rows, recurrent):
    """Name → kind, role, and how a recurrent kernel is cut."""
    for attribute, inputs in (("kernel", rows), ("recurrent_kernel", recurrent)):
        for i, letter in enumerate(letters):
            columns = slice(i * units, (i + 1) * units)
            name = f"{path}.{attribute}".replace("/", ".")
            yield (
                f"{name}.{letter}",
                ("recurrent", "", f"{path}/{attribute}", lambda w, c=columns: w[None, :, c], (1, inputs, units)),
            )


def heads(w):
    return w.reshape(1, 16, 16)


def slices(w):
    return w.reshape(-1, *w.shape[-2:])


def whole(w):
    return w[None]


EXPECTED = {  # name → kind, role, path of the variable, its numbers as they are listed, shape
    "tok": ("embedding", "embed", "tok/embeddings", whole, (1, 30, 16)),
    "mha.query": ("attention", "q", "mha/query/kernel", heads, (1, 16, 16)),
    "mha.key": ("attention", "k", "mha/key/kernel", heads, (1, 16, 16)),
    "mha.value": ("attention", "v", "mha/value/kernel", heads, (1, 16, 16)),
    "mha.attention_output": ("dense", "o", "mha/attention_output/kernel", heads, (1, 16, 16)),
    **dict(gates("both/forward_lstm/lstm_cell", "ifco", 9, 16, 9)),
    **dict(gates("both/backward_lstm/lstm_cell", "ifco", 9, 16, 9)),
    **dict(gates("gru/gru_cell", "zrh", 10, 18, 10)),
    "rnn.simple_rnn_cell.kernel": ("recurrent", "", "rnn/simple_rnn_cell/kernel", whole, (1, 10, 5)),
    "rnn.simple_rnn_cell.recurrent_kernel": ("recurrent", "", "rnn/simple_rnn_cell/recurrent_kernel", whole, (1, 5, 5)),
    "conv": ("conv", "conv", "conv/kernel", slices, (9, 1, 8)),
    "sep.depthwise_kernel": ("conv", "conv", "sep/depthwise_kernel", slices, (3, 8, 2)),
    "sep.pointwise_kernel": ("conv", "conv", "sep/pointwise_kernel", slices, (1, 16, 6)),
    "up": ("conv", "conv", "up/kernel", slices, (6, 4, 6)),
    "deep": ("conv", "conv", "deep/kernel", slices, (2, 4, 3)),
    "inner.a": ("dense", "", "inner/a/kernel", whole, (1, 480, 10)),
    "inner.b": ("dense", "", "inner/b/kernel", whole, (1, 10, 10)),
    "shared": ("dense", "", "shared/kernel", whole, (1, 10, 10)),
    "head": ("dense", "head", "head/kernel", whole, (1, 10, 3)),
}


def test_every_weight_is_listed_once_in_order(model):
    """Names follow the model's own order; biases, norms and the second use of a layer are not listed."""
    assert list(matrices(model)) == list(EXPECTED)
    assert skipped(model) == {}


def test_the_rms_norm_of_keras_convolutions_in_groups_is_that_of_what_they_compute():
    built = (
        (layers.Conv1D(48, 1, groups=4, use_bias=False), 32),
        (layers.DepthwiseConv1D(1, depth_multiplier=3, use_bias=False), 16),
        (layers.Conv1D(48, 1, use_bias=False), 32),
    )
    for layer, inputs in built:
        unit = torch.eye(inputs)[:, None, :]
        operator = walker.to_torch(keras.ops.convert_to_tensor(layer(unit.numpy())))[:, 0].double()
        rms = torch.linalg.matrix_norm(operator, 2).item() * (inputs / operator.shape[1]) ** 0.5
        (row,) = analyze(keras.Sequential([layer]), min_size=1, metrics=["rms_norm"]).layers
        assert row.value("rms_norm") == pytest.approx(rms, rel=1e-5), type(layer).__name__


@pytest.mark.parametrize("name", EXPECTED)
def test_shapes_and_numbers(model, name):
    """A matrix has the numbers of its Keras array, and reads them where they are stored."""
    kind, role, path, take, shape = EXPECTED[name]
    matrix = matrices(model)[name]
    variable = next(v for v in model.weights if v.path == path)
    weights = matrix.load()
    assert (matrix.kind, matrix.role, matrix.shape) == (kind, role, shape)
    assert tuple(weights.shape) == shape
    np.testing.assert_array_equal(weights.numpy(), take(variable.numpy()))
    assert not weights.requires_grad
    assert weights.untyped_storage().data_ptr() == variable.value.untyped_storage().data_ptr()


def test_load_reads_the_present_value():
    """Numbers that were assigned after the walk are those that are loaded."""
    dense = layers.Dense(4, name="d")
    dense.build((None, 3))
    matrix = matrices(dense)["d"]
    dense.kernel.assign(np.full((3, 4), 7.0))
    assert torch.equal(matrix.load(), torch.full((1, 3, 4), 7.0))


def test_alpha_is_that_of_the_torch_layer():
    """A Dense layer and the torch layer with the same weights have the same alpha."""
    twin = nn.Linear(96, 64)
    dense = layers.Dense(64, name="d")
    dense.build((None, 96))
    dense.kernel.assign(twin.weight.detach().numpy().T)
    of_keras, of_torch = (analyze(model).layers[0].metrics["alpha"] for model in (dense, nn.Sequential(twin)))
    assert of_keras == pytest.approx(of_torch, abs=1e-9)


class Scale(layers.Layer):
    """A layer of a class nobody knows."""

    def build(self, shape):
        self.table = self.add_weight(shape=(4, 6), name="table")
        self.bias = self.add_weight(shape=(4, 6), name="bias")

    def call(self, x):
        return x


class Net(keras.Model):
    """A subclassed model that keeps layers in a list and a dict."""

    def __init__(self):
        super().__init__(name="net")
        self.blocks = [layers.Dense(5, name="same"), layers.Dense(6, name="same")]
        self.named = {"scale": Scale(name="scale")}

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.named["scale"](x)


def test_subclassed_model():
    """Layers in attributes are found, names that collide are told apart, an unknown class is followed."""
    net = Net()
    assert set(skipped(net).values()) == {"not built: no weights before the first call"}
    net(np.zeros((1, 4), "float32"))
    assert {name: item.shape for name, item in matrices(net).items()} == {
        "same": (1, 4, 5),
        "same#2": (1, 5, 6),
        "scale.table": (1, 4, 6),
    }
    assert not skipped(net)


class Own(layers.Layer):
    """A layer of a user's own that trains all sorts of things."""

    def build(self, shape):
        add = self.add_weight
        self.kernel = add(shape=(20, 30), name="kernel")
        self.filters = add(shape=(3, 3, 16, 24), name="filters")
        self.query = add(shape=(32, 4, 8), name="query")
        self.pos_embed = add(shape=(1, 9, 12), name="pos_embed")
        self.average = add(shape=(9, 12), name="average", trainable=False)

    def call(self, x):
        return x @ self.kernel


def test_what_a_layer_of_an_unknown_class_trains_is_read_by_name_and_shape():
    """Kernels as Keras stores them, heads as one matrix; what does not learn and tables of positions stay out."""
    net = keras.Sequential([keras.Input((20,)), Own(name="own")])
    found = matrices(net)
    kinds = {"own": "", "own.filters": "conv", "own.query": ""}
    assert {name: (item.kind, item.role) for name, item in found.items()} == {
        name: ("parameter", role) for name, role in kinds.items()
    }
    own = net.get_layer("own")
    value = {name: keras.ops.convert_to_numpy(getattr(own, name)) for name in ("kernel", "filters", "query")}
    assert np.array_equal(found["own"].load().numpy()[0], value["kernel"])
    assert np.array_equal(found["own.filters"].load().numpy(), value["filters"].reshape(9, 16, 24))
    assert np.array_equal(found["own.query"].load().numpy()[0], value["query"].reshape(32, 32))
    reasons = {"own.pos_embed": "a table of positions", "own.average": "a buffer, which training does not change"}
    assert skipped(net) == reasons
    own.trainable = False
    assert [item.frozen for item in matrices(net).values()] == [True] * 3
    assert skipped(net) == reasons


class Tied(layers.Dense):
    """A layer that computes with the kernel of another."""

    def __init__(self, other):
        super().__init__(other.units, name="tied", use_bias=False)
        self.other = [other]

    def build(self, shape):
        self._kernel, self.bias, self.built = self.other[0]._kernel, None, True


def test_a_variable_of_two_layers_is_listed_once():
    """The second layer with the same variable is skipped as tied."""
    first = layers.Dense(4, name="first")
    net = keras.Sequential([keras.Input((4,)), first, Tied(first)])
    assert list(matrices(net)) == ["first"]
    assert skipped(net) == {"tied": "tied to first"}


@pytest.mark.parametrize(
    ("equation", "output", "inputs", "shape"),
    [
        ("abc,cd->abd", (None, 7), (None, 5, 6), (1, 6, 7)),
        ("...x,xy->...y", (7,), (None, 5, 6), (1, 6, 7)),
        ("abc,dc->abd", (None, 7), (None, 5, 6), (1, 7, 6)),
        ("abcd,cde->abe", (None, 7), (None, 5, 2, 3), (1, 6, 7)),
        ("abcd,ced->abe", (None, 7), (None, 5, 2, 3), None),
        ("abc,bcd->abd", (5, 7), (None, 5, 6), None),
    ],
)
def test_einsum_dense(equation, output, inputs, shape):
    """A kernel is flattened to summed × new axes; where these are mixed, or an axis is shared, it is skipped."""
    layer = layers.EinsumDense(equation, output_shape=output, name="e")
    layer.build(inputs)
    if shape is None:
        assert skipped(layer) == {"e": "its equation does not make it a matrix from summed to new axes"}
    else:
        assert matrices(layer)["e"].shape == shape
        np.testing.assert_array_equal(matrices(layer)["e"].load().ravel().numpy(), layer.kernel.numpy().ravel())


def test_lora_gives_the_merged_weight():
    """A layer with LoRA gives what it computes with, W + (alpha / r)·A·B, and its factors are not listed."""
    dense = layers.Dense(8, name="d")
    dense.build((None, 6))
    dense.enable_lora(2, lora_alpha=6)
    a, b = np.random.default_rng(0).normal(size=(6, 2)), np.random.default_rng(1).normal(size=(2, 8))
    dense.lora_kernel_a.assign(a)
    dense.lora_kernel_b.assign(b)
    (item,) = walk_keras(dense)
    merged = dense._kernel.numpy() + 3 * a @ b
    np.testing.assert_allclose(item.load()[0].numpy(), merged, rtol=1e-5, atol=1e-6)
    assert (item.name, item.load().requires_grad) == ("d", False)


def test_what_training_leaves_alone_is_frozen():
    """A frozen model inside, and what keeps its kernel but trains an adapter on it."""
    inner = keras.Sequential([layers.Dense(12, name="kept"), layers.Dense(12, name="adapted")], name="inner")
    net = keras.Sequential([keras.Input((9,)), inner, layers.Dense(5, name="head")])
    inner.trainable = False
    inner.layers[1].trainable = True
    inner.layers[1].enable_lora(2)
    frozen = {name: item.frozen for name, item in matrices(net).items()}
    assert frozen == {"inner.kept": True, "inner.adapted": False, "head": False}


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_layers_are_skipped(mode):
    """The integers of a quantized layer are no weights."""
    net = keras.Sequential([keras.Input((12,)), layers.Dense(16, name="d")], name="net")
    net.quantize(mode)
    assert matrices(net) == {}
    assert set(skipped(net).values()) == {f"quantized to {mode}"}


def test_split():
    """A fused kernel is cut along its outputs, its columns."""
    dense = layers.Dense(8, name="d")
    dense.build((None, 6))
    found = matrices(dense, split={"d": 2})
    assert {name: item.shape for name, item in found.items()} == {"d.0": (1, 6, 4), "d.1": (1, 6, 4)}
    np.testing.assert_array_equal(found["d.1"].load()[0].numpy(), dense.kernel.numpy()[:, 4:])
    with pytest.raises(InvalidArgument, match=r"walk_keras: split\['d'\]"):
        walk_keras(dense, split={"d": 0})


# --- files


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_files(tmp_path, model, suffix):
    """A saved model gives the analysis of the model."""
    path = tmp_path / f"net.{suffix}"
    model.save(path)
    live, read = analyze(model), analyze(str(path))
    assert [layer.name for layer in read.layers] == [layer.name for layer in live.layers]
    for ours, theirs in zip(read.layers, live.layers, strict=True):
        assert ours.metrics == pytest.approx(theirs.metrics, nan_ok=True)


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "net.weights.h5"])
def test_files_that_cannot_be_loaded(tmp_path, name):
    """A damaged file is an error of this package that says what Keras said."""
    path = tmp_path / name
    path.write_bytes(b"no model")
    with pytest.raises(WWMonitorError, match=rf"written by `model.save` in .*{name}; Keras could not load it: \w+: "):
        analyze(path)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_code_in_a_file_is_refused(tmp_path, suffix):
    """Safe mode stays on: a file with a pickled function is not loaded."""
    path = tmp_path / f"net.{suffix}"
    keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: 2 * x)]).save(path)
    with pytest.raises(WWMonitorError, match="Lambda"):
        load_keras_file(path)


# --- without keras, or without its backend

UNTOUCHED = """
import sys, torch
from ww_monitor.walk.sources import walk_source
assert [matrix.name for matrix in walk_source(torch.nn.Sequential(torch.nn.Linear(9, 9)))] == ["0"]
assert not {"keras", "jax", "tensorflow", "ww_monitor.walk.keras"} & set(sys.modules)
"""


def test_walking_a_torch_model_imports_nothing_of_keras():
    """Who has not imported keras has no Keras model."""
    done = run_python("-c", UNTOUCHED)
    assert done.returncode == 0, done.stderr


def test_without_a_backend(tmp_path):
    """Where the backend that keras is set to is missing, the error says which setting reads files with torch."""
    code = (
        "import sys; sys.modules['tensorflow'] = None; from ww_monitor.walk.keras import load_keras_file\n"
        f"load_keras_file({str(tmp_path / 'net.keras')!r})"
    )
    done = run_python("-c", code, KERAS_BACKEND="tensorflow")
    assert MissingDependency.__name__ in done.stderr
    assert "set the environment variable KERAS_BACKEND=torch" in done.stderr


def test_examples():
    """The examples in the docstrings run."""
    results = doctest.testmod(walker)
    assert results.attempted
    assert not results.failed
