"""Checkpoints on disk: which are read, lazily and without running code, and what is said about the others."""

import doctest
import json
import struct
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tests.processes import run_python
from ww_monitor import analyze
from ww_monitor.errors import InvalidArgument, MissingDependency, WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk import files
from ww_monitor.walk.files import walk_files
from ww_monitor.walk.torch import walk

safetensors = pytest.importorskip("safetensors.torch", reason="its files are what is read")


def matrices(path, **options):
    return {item.name: item for item in walk_files(path, **options) if isinstance(item, Matrix)}


def reasons(path):
    return {item.name: item.reason for item in walk_files(path) if isinstance(item, Skipped)}


TENSORS = {"fc.weight": torch.randn(4, 8), "fc.bias": torch.randn(4), "out.weight": torch.randn(3, 4)}


def check(path):
    """The two matrices of `TENSORS` are in `path`, and no other."""
    found = matrices(path)
    assert list(found) == ["fc", "out"]
    for name, matrix in found.items():
        assert torch.equal(matrix.load()[0], TENSORS[f"{name}.weight"])


# --- kinds of files


@pytest.mark.parametrize("as_text", [True, False])
def test_safetensors(tmp_path, as_text):
    """A safetensors file is read, by its path as text or as an object."""
    path = tmp_path / "net.safetensors"
    safetensors.save_file(TENSORS, path)
    check(str(path) if as_text else path)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "th", "ckpt"])
@pytest.mark.parametrize("legacy", [True, False])
def test_torch_files(tmp_path, suffix, legacy):
    """torch files of the present and of the older format are read."""
    path = tmp_path / f"net.{suffix}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)
    check(path)


INSIDE = {
    "state_dict": {"state_dict": TENSORS, "epoch": 3},
    "model": {"model": TENSORS, "optimizer": {"state": {}}},
    "nested": {"model": {"state_dict": TENSORS}},
    "lightning": {"state_dict": TENSORS, "pytorch-lightning_version": "2.6.0", "callbacks": {}, "hyper_parameters": {}},
    "parallel": {"state_dict": {f"module.{key}": value for key, value in TENSORS.items()}},
    "compiled": {f"_orig_mod.{key}": value for key, value in TENSORS.items()},
}


@pytest.mark.parametrize("case", INSIDE)
def test_what_is_around_the_weights(tmp_path, case):
    """The mapping that training scripts put around a state dict, and prefixes of its names, are taken off."""
    torch.save(INSIDE[case], tmp_path / "net.pt")
    check(tmp_path / "net.pt")


def test_real_lightning_checkpoint(tmp_path):
    """The checkpoint that Lightning itself writes is read, under the names of its module."""
    lightning = pytest.importorskip("pytorch_lightning", reason="the checkpoint is theirs")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 4))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Lit()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = matrices(tmp_path / "last.ckpt")
    assert list(found) == ["net.0"]
    assert torch.equal(found["net.0"].load()[0], module.net[0].weight)


def save_shards(folder, save, name, index, suffix):
    """`TENSORS` in two shards with an index."""
    shards = {
        f"{name}-0000{i}-of-00002.{suffix}": keys for i, keys in ((1, ["fc.weight"]), (2, ["fc.bias", "out.weight"]))
    }
    for file, keys in shards.items():
        save({key: TENSORS[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


DIRECTORIES = {
    "safetensors": lambda folder: safetensors.save_file(TENSORS, folder / "model.safetensors"),
    "shards": lambda folder: save_shards(
        folder, safetensors.save_file, "model", "model.safetensors.index.json", "safetensors"
    ),
    "bin": lambda folder: torch.save(TENSORS, folder / "pytorch_model.bin"),
    "bin shards": lambda folder: save_shards(
        folder, torch.save, "pytorch_model", "pytorch_model.bin.index.json", "bin"
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
@pytest.mark.parametrize("beside", [True, False])
def test_directories(tmp_path, case, beside):
    """Whole and sharded models of a directory are read; other files beside them change nothing."""
    DIRECTORIES[case](tmp_path)
    if beside:
        torch.save({"lr.weight": torch.ones(9, 9)}, tmp_path / "optimizer.pt")
        safetensors.save_file({"x.weight": torch.ones(9, 9)}, tmp_path / "adapter_model.safetensors")
    check(tmp_path)


def test_shards_without_index(tmp_path):
    """Shards whose index is lost are all read."""
    DIRECTORIES["shards"](tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    check(tmp_path)


def test_stale_shards(tmp_path):
    """Files that the index does not name are left alone."""
    DIRECTORIES["shards"](tmp_path)
    safetensors.save_file({"old.weight": torch.ones(9, 9)}, tmp_path / "model-00003-of-00003.safetensors")
    check(tmp_path)


def test_saved_by_transformers(tmp_path):
    """A directory of `save_pretrained`, in shards, gives the matrices of the model, its fused weights cut alike."""
    transformers = pytest.importorskip("transformers", reason="the model is theirs")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2Model(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    of_model = {item.name: item for item in walk(model) if isinstance(item, Matrix)}
    of_files = matrices(tmp_path)
    assert set(of_files.values()) == set(of_model.values())
    assert all(torch.equal(of_files[name].load(), of_model[name].load()) for name in of_model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("rslora", [True, False])
def test_saved_by_peft(tmp_path, rslora):
    """The deltas of a saved adapter, with the scaling of its configuration, are those of the model it came from."""
    peft = pytest.importorskip("peft", reason="the adapter is theirs")
    model = peft.get_peft_model(
        nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(10, 8)}),
        peft.LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=["a", "b"],
            alpha_pattern={"b": 5},
            rank_pattern={"b": 4},
            use_rslora=rslora,
            init_lora_weights=False,
        ),
    )
    model.save_pretrained(tmp_path)
    of_model = {item.name: item for item in walk(model, lora=["delta"]) if isinstance(item, Matrix)}
    of_files = matrices(tmp_path)
    assert set(of_files) == set(of_model) == {f"base_model.model.{name}.lora[default]" for name in "ab"}
    for name in of_model:
        assert torch.allclose(of_files[name].load(), of_model[name].load(), rtol=1e-6)


@pytest.mark.parametrize(("name", "tensors"), [("resnet20-12fca82f", 20), ("resnet32-d509ac18", 32)])
def test_trained_resnets(shared, name, tensors):
    """Real trained ResNets give their layers, with the numbers of a module that holds the same weights."""
    path = shared / "data" / f"{name}.th"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the folder of shared data")
    found = matrices(path)
    assert len(found) == tensors
    assert found["conv1"].shape == (9, 16, 3)
    assert found["layer2.0.conv1"].shape == (9, 32, 16)
    assert found["layer3.2.conv2"].shape == (9, 64, 64)
    assert (found["linear"].kind, found["linear"].shape) == ("dense", (1, 10, 64))
    module = nn.Module()
    content = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    for key, weight in content.items():
        if key.endswith("weight") and weight.ndim > 1:
            conv = weight.ndim == 4
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3) if conv else nn.Linear(64, 10)
            layer.weight.data = weight
            module.add_module(key.removeprefix("module.").removesuffix(".weight").replace(".", "_"), layer)
    of_module = [item for item in walk(module) if isinstance(item, Matrix)]
    assert [m.shape for m in of_module] == [m.shape for m in found.values()]
    assert all(torch.equal(a.load(), b.load()) for a, b in zip(of_module, found.values(), strict=True))


def test_analyze_reads_files(tmp_path):
    """`analyze` of a file gives the numbers of the module it was saved from."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    (of_file,), (of_net,) = analyze(tmp_path / "net.pt").layers, analyze(net).layers
    assert repr(of_file) == repr(of_net)  # as text, where NaN equals NaN
    assert analyze(str(tmp_path / "net.pt")).layers[0].name == "0"


def test_tied_in_a_file(tmp_path):
    """A tensor that a torch file holds under two names is listed once; two files never tie anything."""
    weight = torch.randn(9, 8)
    torch.save({"wte.weight": weight, "lm_head.weight": weight}, tmp_path / "pytorch_model-1.bin")
    torch.save({"other.weight": weight}, tmp_path / "pytorch_model-2.bin")
    assert list(matrices(tmp_path)) == ["wte", "other"]
    assert reasons(tmp_path) == {"lm_head": "tied to wte"}


def test_unread_storage_type(tmp_path):
    """A dtype that torch lacks costs its tensor only, and integers are called so."""
    path = tmp_path / "net.safetensors"
    written = safetensors.save({**TENSORS, "i.weight": torch.ones(4, 4, dtype=torch.uint16)})
    numbers = written[8 + int.from_bytes(written[:8], "little") :]
    header = json.loads(written[8 : -len(numbers)])
    header["x.weight"] = {"dtype": "F6_E2M3", "shape": [8, 8], "data_offsets": [len(numbers), len(numbers) + 48]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers + bytes(48))
    check(path)
    assert reasons(path) == {"i": "integer weights", "x": "a storage type that is not read"}


def test_split(tmp_path):
    """The caller's cuts reach the files, and a malformed one is an error at once."""
    torch.save(TENSORS, tmp_path / "net.pt")
    assert list(matrices(tmp_path / "net.pt", split={"fc": 2})) == ["fc.0", "fc.1", "out"]
    with pytest.raises(InvalidArgument, match=r"walk_files: split\['fc'\]"):
        walk_files(tmp_path / "net.pt", split={"fc": 0})


# --- errors, all of them at once and not while the walk is consumed


class Payload:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_objects(tmp_path, legacy):
    """A file that needs pickled objects is refused, and none of its code runs."""
    path = tmp_path / "net.pt"
    torch.save(
        {"fc.weight": torch.ones(4, 4), "x": Payload(tmp_path / "trace")},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(WWMonitorError, match=r"holds pickled Python objects.*save the model's state_dict"):
        walk_files(path)
    assert not (tmp_path / "trace").exists()


def test_a_whole_module(tmp_path):
    """A pickled module is refused in the same way."""
    torch.save(nn.Linear(4, 4), tmp_path / "net.pt")
    with pytest.raises(WWMonitorError, match="holds pickled Python objects"):
        walk_files(tmp_path / "net.pt")


def test_nothing_there(tmp_path):
    """A missing path is an error that says what was looked for."""
    with pytest.raises(FileNotFoundError, match=r"no file or directory '.*nope.pt'; looked for a .safetensors file"):
        walk_files(tmp_path / "nope.pt")
    with pytest.raises(FileNotFoundError, match="walk_files"):
        analyze(tmp_path / "nope")


def test_empty_directory(tmp_path):
    """A directory without weights is an error that lists what is recognised."""
    (tmp_path / "README.md").touch()
    with pytest.raises(
        WWMonitorError, match=r"expected weights in .*found none; use .*model\*.safetensors, pytorch_model"
    ):
        walk_files(tmp_path)


def test_missing_shard(tmp_path):
    """A shard that the index names and the directory has not is an error that names both."""
    DIRECTORIES["shards"](tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model\.safetensors\.index\.json names 'model-00002-of-00002.safetensors'"
    ):
        walk_files(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(tmp_path, text):
    """An index without its map is an error."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WWMonitorError, match="expected a `weight_map`"):
        walk_files(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
def test_damaged_file(tmp_path, suffix):
    """A file that is cut off is an error of this package that names it."""
    path = tmp_path / f"net.{suffix}"
    (safetensors.save_file if suffix == "safetensors" else torch.save)(TENSORS, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WWMonitorError, match=f"net.{suffix} is "):
        walk_files(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(3)], torch.ones(3)], ids=str)
def test_no_tensors(tmp_path, content):
    """A torch file without named tensors is an error that says what it holds."""
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(WWMonitorError, match=r"net.pt: expected tensors of two or more dimensions in a mapping; got "):
        walk_files(tmp_path / "net.pt")


def test_unknown_suffix(tmp_path):
    """A file of another kind is an error that lists what is recognised."""
    (tmp_path / "net.onnx").touch()
    with pytest.raises(WWMonitorError, match=r"expected a .safetensors file.*; got 'net.onnx'"):
        walk_files(tmp_path / "net.onnx")


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_files(tmp_path, monkeypatch, suffix):
    """Without keras the error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "keras", None)
    (tmp_path / f"net.{suffix}").touch()
    with pytest.raises(MissingDependency, match=r"install `ww-monitor\[keras\]`"):
        walk_files(tmp_path / f"net.{suffix}")


def test_without_safetensors(tmp_path, monkeypatch):
    """Without safetensors the error names the extra that brings it, and torch files are read as before."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "net.safetensors").touch()
    with pytest.raises(MissingDependency, match=r"install `ww-monitor\[huggingface\]`"):
        walk_files(tmp_path / "net.safetensors")
    torch.save(TENSORS, tmp_path / "net.pt")
    check(tmp_path / "net.pt")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_adapter_configuration(tmp_path, text):
    """A configuration of an adapter without its alpha is an error that names the file."""
    safetensors.save_file({"fc.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(WWMonitorError, match="expected a LoRA configuration with `lora_alpha`"):
        walk_files(tmp_path)


# --- laziness


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_numbers_are_read_by_load(tmp_path, suffix):
    """The walk reads no numbers, and load reads those of its own tensor: the file may change in between."""
    path = tmp_path / f"net.{suffix}"
    save = safetensors.save_file if suffix == "safetensors" else torch.save
    save(TENSORS, path)
    found = matrices(path)
    changed = {key: value + 1 for key, value in TENSORS.items()}
    save(changed, path)
    assert torch.equal(found["out"].load()[0], changed["out.weight"])


# On Linux the peak of a process starts at that of the one that started it: a small one in between makes it honest.
RELAY = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
PEAK = """
import resource, sys
import torch
from ww_monitor.walk.files import walk_files
import safetensors.torch
kilobyte = 1 if sys.platform == "darwin" else 1024
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
torch.set_num_threads(1)
baseline = peak()
count = 0
for matrix in walk_files(sys.argv[1]):
    count += matrix.shape == (1, 4096, 8192)
    weights = matrix.load()
    total = weights.sum()  # touches every page
print(count, peak() - baseline)
"""


def write_large_safetensors(path):
    """Eight matrices of 128 MiB; their zeros are a hole in the file, which takes no room on the disk."""
    size = 4096 * 8192 * 4
    names = [f"layers.{i}.weight" for i in range(8)]
    header = {
        name: {"dtype": "F32", "shape": [4096, 8192], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 8 * size)


def write_large_torch_file(path):
    """The same as a torch file."""
    torch.save({f"layers.{i}.weight": torch.zeros(4096, 8192) for i in range(8)}, path)


@pytest.mark.skipif(find_spec("resource") is None, reason="peak memory is asked for through `resource`")
@pytest.mark.parametrize("write", [write_large_safetensors, write_large_torch_file], ids=["safetensors", "torch"])
def test_peak_memory(tmp_path, write):
    """Reading 1 GiB in eight tensors needs at most three times one of them in float64, and a constant."""
    path = tmp_path / ("large.safetensors" if write is write_large_safetensors else "large.pt")
    write(path)
    try:
        assert path.stat().st_size > 1 << 30
        done = run_python("-c", RELAY, sys.executable, "-c", PEAK, str(path))
    finally:
        path.unlink()
    assert done.returncode == 0, done.stderr
    count, peak = map(int, done.stdout.split())
    assert count == 8
    assert peak <= 3 * 4096 * 8192 * 8 + 200e6


def test_examples():
    """The examples in the docstrings run."""
    results = doctest.testmod(files)
    assert results.attempted
    assert not results.failed
