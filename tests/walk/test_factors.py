"""Adapters of every kind, live and in files: the delta that is added, else a reason; nothing twice, nothing lost."""

import copy
import json
import time

import pytest
import torch
from torch import nn

import ww_monitor
from ww_monitor.errors import WWMonitorError
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.files import walk_files
from ww_monitor.walk.sources import walk_source

ADDED = {
    "AdaLora": {"total_step": 10, "target_r": 4, "init_r": 4, "init_lora_weights": False},
    "LoHa": {"r": 2, "init_weights": False},
    "LoKr": {"r": 2, "init_weights": False},
    "Vera": {"r": 4, "init_weights": False},
    "FourierFT": {"n_frequency": 60},
    "RandLora": {"r": 4, "init_weights": False},
    "Adamss": {},
    "C3A": {"block_size": 4},
    "Delora": {},
    "Frod": {},
    "Gralora": {},
    "OSF": {},
    "Psoft": {"r": 4},
    "Pvera": {"r": 4},
    "TinyLora": {},
    "VBLoRA": {"vector_length": 4, "num_vectors": 8},
    "WaveFT": {"n_frequency": 60},
}
NOT_ADDED = {
    "OFT": {"oft_block_size": 4, "init_weights": False},
    "BOFT": {"boft_block_size": 4, "init_weights": False},
    "IA3": {"feedforward_modules": [], "init_ia3_weights": False},
    "HRA": {"r": 2, "init_weights": False},
    "Miss": {"r": 2, "init_weights": False},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(24, 24)
        self.plain = nn.Linear(24, 12)

    def forward(self, x):
        return self.plain(self.fc(x))


def of(kind, source):
    return {item.name.removeprefix("base_model.model."): item for item in walk_source(source) if isinstance(item, kind)}


def adapted(name, options):
    peft = pytest.importorskip("peft", reason="the adapters are theirs")
    if not hasattr(peft, f"{name}Config"):
        pytest.skip(f"this version of peft has no {name}")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), getattr(peft, f"{name}Config")(target_modules=["fc"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADDED)
def test_the_delta_of_an_adapter_is_what_merging_adds(name):
    """Base and delta once each, with the numbers of the merged weights; nothing in the model changes."""
    model = adapted(name, ADDED[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    base = model.base_model.model.fc.get_base_layer().weight.detach().clone()
    found = of(Matrix, model)
    label = next(key for key in found if key.startswith("fc.") and key.endswith("[default]"))
    assert set(found) == {"fc", label, "plain"}
    merged = copy.deepcopy(model).merge_and_unload().fc.weight.detach()
    delta = found[label].load()[0]
    assert torch.allclose(delta, merged - base, atol=1e-6 * float(merged.abs().max()))
    assert torch.equal(found["fc"].load()[0], base)
    alone = ww_monitor.analyze({"x.weight": (merged.double() - base.double())})["x"]
    row = ww_monitor.analyze(model, include=[f"*fc.{label[3:6]}*"]).layers[0]
    assert row.value("log_norm") == pytest.approx(alone.value("log_norm"), abs=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NOT_ADDED)
def test_an_adapter_that_adds_no_delta_is_skipped_with_the_reason(name):
    model = adapted(name, NOT_ADDED[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(of(Matrix, model)) == {"fc", "plain"}
    reasons = {key: item.reason for key, item in of(Skipped, model).items()}
    label = f"{name.lower()}[default]"
    assert reasons.pop(f"fc.{label}") == f"PEFT gives no delta that {name.lower()} adds to the weight"
    assert reasons
    assert set(reasons.values()) == {f"factor of {label}"}
    with torch.no_grad():
        model.merge_adapter()
    assert "more than a sum" in {key: item.reason for key, item in of(Skipped, model).items()}["fc"]
    assert {key for key in before if key.endswith("plain.weight")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*ADDED, *NOT_ADDED][1:])
def test_stored_factors_of_adapters_without_a_delta_of_their_own_are_no_layers(name):
    peft = pytest.importorskip("peft", reason="the adapters are theirs")
    model = adapted(name, (ADDED | NOT_ADDED)[name])
    assert not of(Matrix, peft.get_peft_model_state_dict(model))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LEFT, RIGHT = random(24, 4), random(4, 20)
FILES = {
    "peft": ({"a.fc.lora_A.weight": RIGHT, "a.fc.lora_B.weight": LEFT}, "a.fc", 1.0),
    "kohya": (
        {"u_fc.lora_down.weight": RIGHT, "u_fc.lora_up.weight": LEFT, "u_fc.alpha": torch.tensor(2.0)},
        "u_fc",
        0.5,
    ),
    "diffusers": ({"a.to_q.lora.down.weight": RIGHT, "a.to_q.lora.up.weight": LEFT}, "a.to_q", 1.0),
    "diffusers processor": ({"a.to_q_lora.down.weight": RIGHT, "a.to_q_lora.up.weight": LEFT}, "a.to_q", 1.0),
    "diffusers text encoder": (
        {"q_proj.lora_linear_layer.down.weight": RIGHT, "q_proj.lora_linear_layer.up.weight": LEFT},
        "q_proj",
        1.0,
    ),
    "XLabs": ({"p.qkv_lora1.down.weight": RIGHT, "p.qkv_lora1.up.weight": LEFT}, "p.qkv", 1.0),
    "MLX": ({"l.0.q_proj.lora_a": RIGHT.T.contiguous(), "l.0.q_proj.lora_b": LEFT.T.contiguous()}, "l.0.q_proj", 1.0),
    "torchtune": ({"l.0.q_proj.lora_a.weight": RIGHT, "l.0.q_proj.lora_b.weight": LEFT}, "l.0.q_proj", 1.0),
}


@pytest.mark.parametrize("writer", FILES)
def test_the_factors_of_any_writer_give_their_delta_and_are_no_layers(writer):
    tensors, name, scale = FILES[writer]
    found = of(Matrix, tensors)
    assert list(found) == [f"{name}.lora[default]"]
    assert torch.allclose(found[f"{name}.lora[default]"].load()[0], scale * LEFT @ RIGHT)
    assert {item.reason for item in of(Skipped, tensors).values()} == {"factor of lora[default]"}


@pytest.mark.parametrize("orientation", ["torch", "MLX"])
def test_the_factors_of_a_square_weight_are_told_by_the_smaller_side(orientation):
    left, right = random(20, 4), random(4, 20)
    a, b = (right, left) if orientation == "torch" else (right.T, left.T)
    (item,) = of(Matrix, {"q.lora_a": a, "q.lora_b": b}).values()
    assert torch.allclose(item.load()[0], left @ right, atol=1e-6)


def test_the_scale_of_mlx_is_in_its_configuration(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="its files are read")
    safetensors.save_file(
        {"q.lora_a": RIGHT.T.contiguous(), "q.lora_b": LEFT.T.contiguous()}, tmp_path / "adapters.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 20.0}}))
    (item,) = of(Matrix, tmp_path).values()
    assert torch.allclose(item.load()[0], 20 * LEFT @ RIGHT, atol=1e-4)


HEADERS = {
    "diffusers": {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^b.fc": 12}}
        )
    },
    "kohya": {"ss_network_alpha": "8.0", "ss_network_dim": "4"},
}


@pytest.mark.parametrize("writer", HEADERS)
def test_the_header_of_a_file_says_the_scaling(tmp_path, writer):
    safetensors = pytest.importorskip("safetensors.torch", reason="its files are read")
    tensors = {
        f"transformer.{at}.fc.lora_{which}.weight": factor.clone()
        for at in "ab"
        for which, factor in (("A", RIGHT), ("B", LEFT))
    }
    safetensors.save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", HEADERS[writer])
    a, b = of(Matrix, tmp_path).values()
    assert torch.allclose(a.load()[0], 2 * LEFT @ RIGHT, atol=1e-5)
    assert torch.allclose(b.load()[0], (3 if writer == "diffusers" else 2) * LEFT @ RIGHT, atol=1e-5)


def test_a_file_that_says_no_scaling_is_read_with_one_and_says_so(tmp_path):
    torch.save({"a.lora_A.weight": RIGHT, "a.lora_B.weight": LEFT}, tmp_path / "lora.pt")
    with pytest.warns(
        ww_monitor.SpectralWarning, match=r"nothing says how the 2 factors .*lora.pt are scaled; taken as 1"
    ):
        (item,) = of(Matrix, tmp_path / "lora.pt").values()
    assert torch.equal(item.load()[0], LEFT @ RIGHT)


def test_a_kernel_between_the_factors_is_part_of_the_delta():
    """As LoCon composes three convolutions: down 1 × 1, the kernel in the middle, up 1 × 1."""
    down, middle, up = random(4, 10, 1, 1), random(4, 4, 3, 3), random(12, 4, 1, 1)
    tensors = {"c.lora_down.weight": down, "c.lora_mid.weight": middle, "c.lora_up.weight": up}
    (item,) = of(Matrix, tensors).values()
    x = random(1, 10, 5, 5)
    conv = nn.functional.conv2d
    kernel = item.load().permute(1, 2, 0).reshape(12, 10, 3, 3)
    assert torch.allclose(conv(x, kernel), conv(conv(conv(x, down), middle), up), atol=1e-4)
    assert {item.reason for item in of(Skipped, tensors).values()} == {"factor of lora[default]"}


def test_factors_of_kernels_embeddings_and_adalora_give_their_delta():
    up, down, values = random(6, 3, 1, 1), random(3, 5, 3, 3), random(3, 1)
    tensors = {
        "conv.lora_A.weight": down, "conv.lora_B.weight": up,
        "emb.lora_embedding_A": random(3, 40), "emb.lora_embedding_B": random(16, 3),
        "ada.lora_A": random(3, 20), "ada.lora_B": random(24, 3), "ada.lora_E": values,
    }  # fmt: skip
    found = {name.partition(".")[0]: item for name, item in of(Matrix, tensors).items()}
    assert {name: (item.kind, item.shape) for name, item in found.items()} == {
        "conv": ("conv", (9, 6, 5)),
        "emb": ("embedding", (1, 40, 16)),
        "ada": ("dense", (1, 24, 20)),
    }
    kernel = torch.einsum("or,rikl->klio", up[:, :, 0, 0], down).reshape(9, 5, 6).mT
    assert torch.allclose(found["conv"].load(), kernel, atol=1e-6)
    assert torch.allclose(found["emb"].load()[0], (random(16, 3) @ random(3, 40)).T)
    expected = random(24, 3) @ (random(3, 20) * values) * 3 / (3 + 1e-5)
    assert torch.allclose(found["ada"].load()[0], expected)


def test_a_lone_factor_and_factors_of_other_adapters_are_said():
    tensors = {"a.lora_down.weight": RIGHT, "b.hada_w1_a": LEFT, "c.lokr_w2": LEFT, "d.oft_R.weight": LEFT}
    assert not of(Matrix, tensors)
    assert len(of(Skipped, tensors)) == 4


def folder(path, **config):
    keys = "base_model.model.layers.0.fc", "base_model.model.other.layers.0.fc"
    tensors = {f"{key}.lora_{which}.weight": tensor for key in keys for which, tensor in (("A", RIGHT), ("B", LEFT))}
    torch.save(tensors, path / "adapter_model.bin")
    (path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, **config}))
    return path


def test_anchored_patterns_match_the_names_of_the_model_that_was_adapted(tmp_path):
    patterns = {"^layers.0.fc": 10, r"other\.layers\.(0|1)\..*": 6}
    found = of(Matrix, folder(tmp_path, alpha_pattern=patterns, rank_pattern={"^layers.0.fc": 4}))
    scales = {name: float(item.load().norm() / (LEFT @ RIGHT).norm()) for name, item in found.items()}
    assert scales == pytest.approx({"layers.0.fc.lora[default]": 2.5, "other.layers.0.fc.lora[default]": 1.5})


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", "(", "a?" * 40, "(a|a)" * 40, r"(.*)\1", "(" * 5000, "[", ".*" * 20]
)
def test_a_hostile_pattern_is_refused_at_once_with_our_own_error(tmp_path, pattern):
    start = time.process_time()
    with pytest.raises(WWMonitorError, match="walk_files: expected"):
        list(walk_files(folder(tmp_path, alpha_pattern={pattern: 1})))
    assert time.process_time() - start < 5


class Adapted(nn.Linear):
    """A layer with a low-rank adapter of its own: its factors are parameters (loralib) or layers (torchtune)."""

    def __init__(self, *, layers, **about):
        super().__init__(20, 24)
        vars(self).update(about)
        for name, factor in (("a" if layers else "A", RIGHT), ("b" if layers else "B", LEFT)):
            inner = nn.Linear(1, 1, bias=False)
            inner.weight = nn.Parameter(factor.clone())
            setattr(self, f"lora_{name}", inner if layers else nn.Parameter(factor.clone()))


@pytest.mark.parametrize(
    ("layers", "about"), [(False, {"scaling": 0.5}), (True, {"alpha": 2.0}), (True, {"lora_alpha": 2})]
)
def test_an_adapter_of_a_user_s_own_in_a_live_module_gives_its_delta(layers, about):
    module = nn.ModuleDict({"q": Adapted(layers=layers, **about), "out": nn.Linear(24, 9)})
    module["q"].weight.requires_grad = False
    found = of(Matrix, module)
    assert set(found) == {"q", "q.lora[default]", "out"}
    assert torch.allclose(found["q.lora[default]"].load()[0], 0.5 * LEFT @ RIGHT)
    assert not found["q.lora[default]"].frozen
    assert {item.reason for item in of(Skipped, module).values()} == {"factor of lora[default]"}
    assert set(of(Matrix, module.state_dict())) == set(found)
    with torch.no_grad():
        module["q"].get_parameter("lora_a.weight" if layers else "lora_A").mul_(2)
    assert torch.allclose(found["q.lora[default]"].load()[0], LEFT @ RIGHT)


def test_the_alpha_of_a_live_module_may_be_a_buffer_and_lora_leaves_the_delta_out():
    module = nn.Module()
    module.lora_down, module.lora_up = nn.Linear(20, 4, bias=False), nn.Linear(4, 24, bias=False)
    module.register_buffer("alpha", torch.tensor(2.0))
    (item,) = of(Matrix, nn.ModuleDict({"u_fc": module})).values()
    assert torch.allclose(item.load()[0], 0.5 * module.lora_up.weight @ module.lora_down.weight)
    left = list(walk_source(nn.ModuleDict({"u_fc": module}), lora=["base"]))
    assert [item.reason for item in left] == ["factor of lora[default]"] * 2
