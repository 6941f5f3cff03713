"""The names under which trainers and libraries keep weights, and files of weights without their model."""

import json
import os

import pytest
import torch
from torch import nn

import ww_monitor
from ww_monitor import analyze
from ww_monitor.errors import NoSuchFile, SpectralWarning, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.files import walk_files
from ww_monitor.walk.torch import walk

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported

safetensors = pytest.importorskip("safetensors.torch", reason="its files are what is read")

TENSORS = {"fc.weight": torch.randn(12, 16), "fc.bias": torch.randn(12)}


def matrices(path, **options):
    return {item.name: item for item in walk_files(path, **options) if isinstance(item, Matrix)}


def check(path):
    found = matrices(path)
    assert list(found) == ["fc"]
    assert torch.equal(found["fc"].load()[0], TENSORS["fc.weight"])


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (safetensors.save_file if path.suffix == ".safetensors" else torch.save)(TENSORS, path)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "NET.PTH", "checkpoint.pt.tar", "consolidated.00.pth"])
def test_names_of_torch_files(tmp_path, name):
    save(tmp_path / name)
    check(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "pytorch_lora_weights.safetensors",
        "model.fp16.safetensors",
    ],
)
def test_names_in_folders(tmp_path, name):
    save(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    check(tmp_path)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "consolidated", "model.fp16"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_the_index_of_shards_is_given(tmp_path, stem, as_folder):
    parts = {f"{stem}-0000{i}-of-00002.safetensors": name for i, name in ((1, "fc.weight"), (2, "fc.bias"))}
    for file, key in parts.items():
        safetensors.save_file({key: TENSORS[key]}, tmp_path / file)
    index = tmp_path / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, key in parts.items()}}))
    check(tmp_path if as_folder else index)


def test_one_part_says_that_it_is_one(tmp_path):
    path = tmp_path / "model-00002-of-00003.safetensors"
    save(path)
    for given in (path, tmp_path):
        with pytest.warns(SpectralWarning, match=r"read part 2 of 3 of a model \(model-00002-of-00003.safetensors\)"):
            check(given)


def test_pieces_of_one_tensor_are_not_taken_for_models(tmp_path):
    """Llama's files of a model that was trained in parallel all have the same names."""
    for number in range(2):
        save(tmp_path / f"consolidated.0{number}.pth")
    with pytest.raises(WWMonitorError, match=r"got 'fc.weight' in .*consolidated.01.pth too: pieces of one tensor"):
        walk_files(tmp_path)


def test_the_newest_checkpoint_of_a_run_is_read_and_named(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.warns(
        SpectralWarning, match=r"read checkpoint-100, the newest .* with weights, which checkpoint-200 lacks"
    ):
        check(tmp_path)
    save(tmp_path / "model.safetensors")  # the model that the run ended with
    check(tmp_path)


def test_a_pipeline_names_its_folders_with_weights(tmp_path):
    save(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save(tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "scheduler").mkdir()
    with pytest.raises(WWMonitorError, match="its folders text_encoder, unet have some: give one of them"):
        walk_files(tmp_path)


class Net(nn.Module):
    """Something to script: nested modules, a buffer, a shared and a half-precision weight."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 20).to(torch.bfloat16))
        self.conv = nn.Conv2d(4, 9, 3)
        self.embed = nn.Embedding(30, 16)
        self.register_buffer("mean", torch.randn(5))

    def forward(self, x):
        return self.body[0](x) + 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_an_archive_of_torchscript_gives_its_weights(tmp_path, how):
    net = Net()
    module = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.ones(2, 16))
    module.save(str(tmp_path / "net.pt"))
    found, expected = matrices(tmp_path / "net.pt"), {item.name: item for item in walk(net)}
    assert set(found.values()) == set(expected.values())
    assert all(torch.equal(found[name].load(), expected[name].load()) for name in expected)
    with pytest.raises(WWMonitorError, match="part chooses between several state dicts"):
        walk_files(tmp_path / "net.pt", part="body")


# --- Keras


def keras_models():
    keras = pytest.importorskip("keras", reason="the files are theirs")
    if keras.backend.backend() != "torch":
        pytest.skip("values are compared with torch tensors")
    k = keras.layers
    plain = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            k.Conv2D(4, 2),
            k.DepthwiseConv2D(2, name="deep"),
            k.SeparableConv2D(6, 1),
            k.Reshape((-1, 6)),
            k.Bidirectional(k.LSTM(6, return_sequences=True)),
            k.GRU(6, return_sequences=True),
            k.Conv1D(5, 2),
            k.Flatten(),
            keras.Sequential([k.Dense(9), k.Dense(8)], name="inner"),
            k.Dense(10, name="head"),
        ]
    )
    tokens = keras.Input((5,), dtype="int32")
    x = k.Embedding(50, 12)(tokens)
    return plain, keras.Model(tokens, k.MultiHeadAttention(2, 6)(x, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_of_an_archive_of_torchscript_are_listed(tmp_path):
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(32, 24), nn.Conv1d(24, 20, 3)).eval())
    torch.jit.script(quantized).save(tmp_path / "net.pt")
    found = list(walk_files(tmp_path / "net.pt"))
    assert [(type(item), item.shape) for item in found] == [(Skipped, (24, 32)), (Matrix, (3, 20, 24))]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_weights_of_keras_without_their_model_have_its_names_kinds_and_numbers(tmp_path):
    for model in keras_models():
        model.save_weights(tmp_path / "net.weights.h5")
        found = matrices(tmp_path)  # also by their folder
        expected = {item.name: item for item in analyzable(model)}
        assert set(found.values()) == set(expected.values())
        assert all(torch.equal(found[name].load(), expected[name].load()) for name in expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras reads a tensor of torch
def test_weights_of_keras_alone_leave_out_what_their_model_leaves_out(tmp_path):
    """Tables of positions, the numbers of normalisations, and what a wrapper lists again of the layer inside."""
    keras = pytest.importorskip("keras", reason="the models are theirs")
    k = keras.layers

    class PositionEmbedding(k.Layer):
        def build(self, _):
            self.table = self.add_weight(shape=(20, 32), name="embeddings")

        def call(self, inputs):
            return inputs + self.table

    class Wrapped(k.Wrapper):
        def build(self, shape):
            super().build(shape)
            self.own = self.layer.kernel

        def save_own_variables(self, store):
            store["0"] = self.own.numpy() if hasattr(self.own, "numpy") else self.own

        def call(self, inputs):
            return self.layer(inputs)

    inputs = keras.Input((20, 32))
    outputs = k.LayerNormalization(axis=(1, 2))(PositionEmbedding()(inputs))
    model = keras.Model(inputs, Wrapped(k.Dense(16))(k.SpectralNormalization(k.Dense(24))(outputs)))
    model.save_weights(tmp_path / "net.weights.h5")
    stored = list(walk_files(tmp_path / "net.weights.h5"))
    assert {item.shape for item in stored if isinstance(item, Matrix)} == {(1, 32, 24), (1, 24, 16)}
    assert len([item for item in stored if isinstance(item, Matrix)]) == len(analyzable(model)) == 2
    assert ww_monitor.describe(tmp_path / "net.weights.h5").kinds[-1].kind == "vector"
    reasons = {item.name.partition(".")[0]: item.reason for item in stored if isinstance(item, Skipped)}
    assert reasons["position_embedding"] == "a table of positions"
    assert reasons["layer_normalization"] == "numbers of a normalisation"
    assert reasons["wrapped"].startswith("tied to wrapped")


def analyzable(model):
    from ww_monitor.walk.keras import walk_keras

    return [item for item in walk_keras(model) if isinstance(item, Matrix)]


def write_hdf5(path, fill):
    h5py = pytest.importorskip("h5py", reason="the files are theirs")
    with h5py.File(path, "w") as file:
        fill(h5py, file)
    return path


def external_link(h5py, file):
    file["layers"] = h5py.ExternalLink("/etc/passwd", "/layers")


def external_numbers(h5py, file):
    file.create_dataset("layers/dense/vars/0", (64, 4), "u1", external=[("/etc/passwd", 0, 256)])


def virtual_numbers(h5py, file):
    layout = h5py.VirtualLayout(shape=(8, 8), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(8, 8))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize("fill", [external_link, external_numbers, virtual_numbers])
@pytest.mark.parametrize("name", ["net.weights.h5", "net.h5", "net.keras"])
def test_hdf5_that_reaches_into_other_files_is_refused(tmp_path, fill, name):
    from zipfile import ZipFile

    inner = write_hdf5(tmp_path / name, fill)
    if name.endswith(".keras"):
        inner = inner.rename(tmp_path / "model.weights.h5")
        with ZipFile(tmp_path / name, "w") as archive:
            archive.write(inner, inner.name)
            archive.writestr("config.json", "{}")
    with pytest.raises(WWMonitorError, match=r"expected all data in one file; .* in .*net\."):
        walk_files(tmp_path / name)


def test_hdf5_that_says_more_than_it_has_is_refused(tmp_path):
    path = write_hdf5(
        tmp_path / "net.weights.h5",
        lambda _, file: file.create_dataset("layers/dense/vars/0", (1 << 20, 1 << 20), "f4"),
    )
    with pytest.raises(WWMonitorError, match=r"net.weights.h5 says that it holds \d+ bytes, and has"):
        walk_files(path)


# --- what is no file with weights


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "net.pt")  # opening it would wait for ever
    with pytest.raises(WWMonitorError, match=r"expected a regular file, got .*net.pt"):
        walk_files(tmp_path / "net.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(WWMonitorError, match=r"expected weights in .*folder.pt"):
        walk_files(tmp_path / "folder.pt")


def test_a_loop_of_links_is_no_file(tmp_path):
    (tmp_path / "a.pt").symlink_to("b.pt")
    (tmp_path / "b.pt").symlink_to("a.pt")
    with pytest.raises(NoSuchFile, match=r"no file or directory .*a.pt"):
        walk_files(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..\\x", "C:\\x", "a/../../x", 3, None, ""])
def test_an_index_does_not_leave_its_folder(tmp_path, name):
    save(tmp_path / "other.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    with pytest.raises(WWMonitorError, match=r"expected files in the folder of .*index.json, got"):
        walk_files(folder)


def test_a_torch_that_cannot_refuse_code_is_not_used(tmp_path, monkeypatch):
    save(tmp_path / "net.pt")
    save(tmp_path / "net.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(
        WWMonitorError, match=r"net.pt is a pickled file.*torch 2.5.1\+cpu.*CVE-2025-32434.*2.6 or later"
    ):
        walk_files(tmp_path / "net.pt")
    check(tmp_path / "net.safetensors")


def test_text_and_other_files_under_a_name_of_torch_are_named(tmp_path):
    (tmp_path / "net.pt").write_text("hello")
    with pytest.raises(WWMonitorError, match=r"net.pt is no torch file: it begins with b'hello'"):
        walk_files(tmp_path / "net.pt")


def test_compressed_archives_are_refused(tmp_path):
    """torch never compresses, and would map the packed bytes as numbers; a bomb is packed too."""
    from zipfile import ZIP_DEFLATED, ZipFile

    save(tmp_path / "plain.pt")
    with ZipFile(tmp_path / "plain.pt") as archive, ZipFile(tmp_path / "net.pt", "w", ZIP_DEFLATED) as packed:
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    with pytest.raises(WWMonitorError, match=r"net.pt is no readable torch file: 'plain/data.pkl' in it is compressed"):
        walk_files(tmp_path / "net.pt")


def test_a_tensor_that_repeats_its_numbers_is_left_out(tmp_path):
    """A shape may promise any number of elements and the file hold one."""
    torch.save({"big.weight": torch.ones(1).expand(10**6, 10**6), **TENSORS}, tmp_path / "net.pt")
    snapshot = analyze(tmp_path / "net.pt")
    assert [layer.name for layer in snapshot.layers] == ["fc"]
    assert snapshot.skipped[0].reason == "a view that repeats fewer numbers than its shape says"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_sparse_tensors_in_a_file_cost_themselves_only(tmp_path):
    sparse = {"coo.weight": torch.eye(9).to_sparse(), "csr.weight": torch.eye(9).to_sparse_csr()}
    torch.save({**sparse, **TENSORS}, tmp_path / "net.pt")
    snapshot = analyze(tmp_path / "net.pt")
    assert [layer.name for layer in snapshot.layers] == ["fc"]
    assert {item.reason.split(" (")[0] for item in snapshot.skipped} == {"sparse weights"}


def test_a_shard_without_matrices_costs_nothing(tmp_path):
    for number, key in ((1, "fc.weight"), (2, "fc.bias")):
        torch.save({key: TENSORS[key]}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    check(tmp_path)
    torch.save({"fc.bias": TENSORS["fc.bias"]}, tmp_path / "alone.pt")
    with pytest.raises(WWMonitorError, match=r"expected weight matrices in .*; got fc.bias \(12,\)"):
        walk_files(tmp_path / "alone.pt")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", "(.*)*x", ".*.*.*.*.*x"])
def test_an_adapter_s_pattern_that_may_take_for_ever_is_refused(tmp_path, pattern):
    factors = {"a" * 60 + f".lora_{which}.weight": torch.ones(16, 16) for which in "AB"}
    safetensors.save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WWMonitorError):
        walk_files(tmp_path)


def test_of_several_models_in_a_folder_the_first_is_read_and_the_others_are_named(tmp_path):
    save(tmp_path / "model.safetensors")
    save(tmp_path / "model_1.safetensors")
    with pytest.warns(SpectralWarning, match=r"read model.safetensors, left out model_1.safetensors"):
        check(tmp_path)


def test_a_folder_whose_files_have_other_names_says_which_they_are(tmp_path):
    save(tmp_path / "best.pt")
    save(tmp_path / "epoch=1-step=3.ckpt")
    with pytest.raises(WWMonitorError, match=r"found none; it has best.pt, epoch=1-step=3.ckpt: give one of them"):
        walk_files(tmp_path)
