"""Codes with scales are read as the weights they stand for, in modules, mappings and files; or left out."""

import json

import pytest
import torch
from torch import nn

from ww_monitor import analyze
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.state_dict import walk_state_dict
from ww_monitor.walk.torch import walk

FP8 = torch.float8_e4m3fn


def heavy_tailed(rows, columns, seed=0):
    """Weights with a power law, whose rows, columns and blocks differ in scale: codes alone have another spectrum."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rows, generator=generator)
    scales = torch.arange(1, min(rows, columns) + 1) ** -0.7
    right = torch.randn(columns, columns, generator=generator)
    weights = torch.linalg.qr(left)[0][:, : len(scales)] * scales @ torch.linalg.qr(right)[0][: len(scales)]
    return weights * torch.logspace(0, 2, rows)[:, None] * torch.logspace(0, 1, columns)


def spread(scale, shape, rows, columns):
    """The slow reference: the scale of the element at i, j is the one at i // rows, j // columns."""
    i, j = torch.arange(shape[0]) // rows, torch.arange(shape[1]) // columns
    return scale.double()[i][:, j]


def quantized(dtype, rows, columns, shape=(300, 256)):
    """Codes, one scale for every rows × columns block, and the weights they stand for in float64."""
    weights, most = heavy_tailed(*shape), 448.0 if dtype is FP8 else 127.0
    scale = torch.stack(
        [
            torch.stack([part.abs().max() / most for part in row.split(columns, 1)])
            for row in weights.split(rows)
        ]
    )  # fmt: skip
    codes = weights / spread(scale, shape, rows, columns).float()
    codes = codes.round().to(dtype) if dtype is torch.int8 else codes.to(dtype)
    return codes, scale, codes.double() * spread(scale, shape, rows, columns)


# name: (dtype, rows and columns that share a scale, name of the scale, its shape where it is another)
LAYOUTS = {
    "DeepSeek's blocks": (FP8, 128, 128, "weight_scale_inv", None),
    "blocks under another name": (torch.float8_e5m2, 128, 128, "weight_scale", None),
    "one scale": (FP8, 300, 256, "weight_scale", ()),
    "one scale of ComfyUI": (FP8, 300, 256, "scale_weight", (1,)),
    "rows": (FP8, 1, 256, "weight_scale", None),
    "rows, as a list": (FP8, 1, 256, "weight_scale", (300,)),
    "columns": (FP8, 300, 1, "scale_weight", None),
    "columns, as a list": (FP8, 300, 1, "weight_scale", (256,)),
    "groups": (torch.int8, 1, 32, "weight_scale", None),
    "int8 rows": (torch.int8, 1, 256, "weight_scale", None),
}


class Quantized(nn.Linear):
    """A layer in the style of transformers' fp8: the codes are its weight, the scale stands beside it."""

    def __init__(self, tensors):
        super().__init__(256, 300, bias=False)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))


def sources(tensors, folder):
    """The same layer as a module, a mapping, and a file."""
    safetensors = pytest.importorskip("safetensors.torch", reason="its files are read")
    mapping = {f"fc.{name}": tensor for name, tensor in tensors.items()}
    safetensors.save_file(mapping, folder / "net.safetensors")
    return nn.ModuleDict({"fc": Quantized(tensors)}), mapping, folder / "net.safetensors"


@pytest.mark.parametrize("case", LAYOUTS)
def test_codes_are_scaled_in_modules_mappings_and_files(tmp_path, case):
    dtype, rows, columns, name, shape = LAYOUTS[case]
    codes, scale, dense = quantized(dtype, rows, columns)
    expected = analyze({"fc.weight": dense}).layers[0]
    given = sources({"weight": codes, name: scale if shape is None else scale.reshape(shape)}, tmp_path)
    for source in given:
        (layer,) = analyze(source).layers
        assert (layer.name, layer.status) == ("fc", "ok")
        assert layer.metrics["alpha"] == pytest.approx(expected.metrics["alpha"], rel=1e-5)
        assert layer.metrics["log_norm"] == pytest.approx(expected.metrics["log_norm"], rel=1e-6)
    if rows != 300 or columns != 256:  # one scale for all changes no alpha
        codes_alone = analyze({"fc.weight": codes.float()}).layers[0]
        assert abs(codes_alone.metrics["alpha"] - expected.metrics["alpha"]) > 0.01


def test_llm_int8_has_a_magnitude_a_row(tmp_path):
    codes, scale, dense = quantized(torch.int8, 1, 256)
    tensors = {"weight": codes, "SCB": scale.flatten() * 127}
    for source in sources(tensors, tmp_path):
        (item,) = [item for item in items_of(source) if isinstance(item, Matrix)]
        assert torch.allclose(item.load()[0].double(), dense, rtol=1e-6, atol=0)
    (item,) = walk_state_dict({"fc.weight_format": torch.tensor(2, dtype=torch.uint8), **mapped(tensors)})
    assert item.reason == "codes of eight bits in an order of a device's own"


def test_a_zero_point_is_subtracted(tmp_path):
    codes, scale, _ = quantized(torch.int8, 1, 256)
    zero = torch.arange(300).remainder(7).to(torch.int8)[:, None]
    (item,) = matrices({"fc.weight": codes, "fc.weight_scale": scale, "fc.weight_zero_point": zero})
    expected = (codes.double() - zero.double()) * scale.double()
    assert torch.allclose(item.load()[0].double(), expected, rtol=1e-6, atol=0)


def test_experts_have_their_own_scales():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 256, 128, generator=generator).to(FP8)
    scale = torch.rand(3, 2, 1, generator=generator)
    found = matrices({"mlp.experts.up_proj": codes, "mlp.experts.up_proj_scale_inv": scale})
    expected = codes.double() * scale.double().repeat_interleave(128, 1)
    assert [item.name for item in found] == [f"mlp.experts.up_proj.{i}" for i in range(3)]
    assert all(torch.allclose(item.load()[0].double(), expected[i]) for i, item in enumerate(found))


def test_a_scale_that_is_a_plain_number_of_a_module_counts():
    codes = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(FP8)
    layer = nn.Linear(16, 16, bias=False)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = 0.5
    (item,) = walk(layer)
    assert torch.equal(item.load()[0], codes.float() * 0.5)


def items_of(source):
    """What a walker yields of any of the three sources."""
    from ww_monitor.walk.sources import walk_source

    return list(walk_source(source))


def mapped(tensors):
    return {f"fc.{name}": tensor for name, tensor in tensors.items()}


def matrices(tensors):
    return [item for item in walk_state_dict(tensors) if isinstance(item, Matrix)]


CODES = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(FP8)
REFUSED = {
    "a layout of blocks that is not known": {"weight": CODES, "weight_scale_inv": torch.ones(3, 5)},
    "two scales": {"weight": CODES, "weight_scale": torch.ones(()), "weight_scale_2": torch.ones(())},
    "another name": {"weight": CODES, "weights_scaling_factor": torch.ones(()), "my_scale": torch.ones(())},
    "scales that are codes": {"weight": CODES, "weight_scale": torch.ones(64, 3, dtype=torch.uint8)},
    "packed bytes": {"weight": torch.ones(64, 48, dtype=torch.uint8), "weight_scale": torch.ones(64, 1)},
    "the largest magnitude": {"weight": CODES, "weight_amax": torch.ones(64, 1)},
    "an inverse": {"weight": CODES, "weight_inv": torch.ones(64)},
    "blocks of another size": {"weight": CODES, "weight_s": torch.ones(16, 24)},
    "a name as of an activation": {"weight": CODES, "q_scale": torch.ones(64, 1)},
    "bytes of a library": {"weight": CODES, "_extra_state": torch.ones(100, dtype=torch.uint8)},
    "scales with their zeros": {"weight": CODES.view(torch.int8), "scales_and_zeros": torch.ones(16, 24, 2)},
    "tables": {"weight": CODES.view(torch.int8), "scales": torch.ones(64, 9), "tables2": torch.ones(16, 16)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_is_not_known_is_left_out_with_its_reason(tmp_path, case):
    other = {"weight": torch.randn(16, 16)}
    for source in (nn.ModuleDict({"fc": Quantized(REFUSED[case])}), mapped(REFUSED[case])):
        whole = nn.ModuleDict({**source, "out": nn.Linear(16, 16)}) if isinstance(source, nn.Module) else None
        snapshot = analyze(whole or {**source, "out.weight": other["weight"]})
        assert [layer.name for layer in snapshot.layers] == ["out"]
        assert "a layout that is not known" in {item.name: item.reason for item in snapshot.skipped}["fc"]


def test_eight_bits_beside_a_bias_and_scales_of_activations_are_a_plain_cast():
    tensors = {"weight": CODES, "bias": torch.ones(64), "input_scale": torch.ones(()), "lora_A": torch.ones(8, 96)}
    for source in (nn.ModuleDict({"fc": Quantized(tensors)}), mapped(tensors)):
        found = {item.name: item for item in items_of(source)}
        assert torch.equal(found["fc"].load()[0].float(), CODES.float())


PACKED = {
    "packed codes (GPTQ or AWQ)": {"qweight": (8, 64), "qzeros": (2, 8), "scales": (2, 64), "g_idx": (64,)},
    "packed codes (compressed-tensors)": {"weight_packed": (64, 8), "weight_scale": (64, 2), "weight_shape": (2,)},
    "packed codes (HQQ)": {"W_q": (32, 64), "scale": (64, 16), "zero": (64, 16)},
    "with codebooks": {"codes": (64, 12, 2), "codebooks": (2, 256, 1, 8)},
    "with up_proj_scales": {"up_proj_blocks": (2, 64, 4, 9), "up_proj_scales": (2, 64, 4)},
}


@pytest.mark.parametrize("kind", ["module", "mapping"])
@pytest.mark.parametrize("case", PACKED)
def test_packed_codes_and_their_scales_are_no_weights(case, kind):
    """Neither the codes nor their scales, which may have two dimensions, are taken for weights; both are listed."""
    tensors = {
        name: torch.ones(shape, dtype=torch.float16 if "scale" in name or "books" in name else torch.int32)
        for name, shape in PACKED[case].items()
    }
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    found = {
        item.name: item for item in items_of(nn.ModuleDict({"fc": module}) if kind == "module" else mapped(tensors))
    }
    assert not any(isinstance(item, Matrix) for item in found.values())
    assert set(found) == {f"fc.{name}" for name, tensor in tensors.items() if tensor.ndim > 1}
    codes = next(iter(PACKED[case]))
    assert case in found.pop(f"fc.{codes}").reason or codes == "up_proj_blocks"
    assert {item.reason.replace("fc.", "") for item in found.values()} <= {f"scales of {codes}"}


def test_eight_bits_without_a_scale_are_weights_unless_others_have_one():
    """A plain cast to eight bits needs no scale; one that is not in this part of a model does."""
    (alone,) = walk_state_dict({"fc.weight": CODES})
    assert torch.equal(alone.load()[0].float(), CODES.float())
    out = {"out.weight": CODES, "out.weight_scale": torch.ones(())}
    found = {item.name: item for item in walk_state_dict({"fc.weight": CODES, **out})}
    assert isinstance(found["fc"], Skipped)
    assert found["fc"].reason == "codes of eight bits whose scale is not there, as others' are"


def test_in_a_module_too_eight_bits_without_a_scale_are_codes_where_others_have_one():
    plain, scaled = (Quantized({"weight": CODES}) for _ in range(2))
    assert torch.equal(next(walk(nn.ModuleDict({"a": plain}))).load()[0].float(), CODES.float())
    scaled.weight_scale = 2  # a number counts, too
    found = {item.name: item for item in walk(nn.ModuleDict({"a": plain, "b": scaled}))}
    assert found["a"].reason == "codes of eight bits whose scale is not there, as others' are"
    assert torch.equal(found["b"].load()[0], 2 * CODES.float())


def test_weights_in_floating_point_are_not_scaled_again():
    """Training that simulates quantisation keeps full weights beside their scales."""
    (item,) = matrices({"fc.weight": torch.eye(16), "fc.weight_scale": torch.full((16, 1), 3.0)})
    assert torch.equal(item.load()[0], torch.eye(16))


def test_mxfp4_of_experts_is_unpacked():
    """Two codes a byte, an exponent for 32 of them; transposed as the checkpoint in half precision is."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 48, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (2, 48, 3), dtype=torch.uint8, generator=generator)
    found = matrices({"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales})
    assert [item.name for item in found] == ["mlp.experts.down_proj.0", "mlp.experts.down_proj.1"]
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for expert, item in enumerate(found):
        weights = item.load()[0]
        assert weights.shape == (96, 48)
        for row, column in ((0, 0), (1, 0), (33, 47), (95, 20)):
            byte = int(blocks[expert, column, row // 32, row % 32 // 2])
            code = byte >> 4 if row % 2 else byte & 15
            value = values[code & 7] * (-1 if code & 8 else 1)
            assert float(weights[row, column]) == value * 2.0 ** (int(scales[expert, column, row // 32]) - 127)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_are_unpacked(nested):
    """Blocks of 64 share a magnitude, which may be a code itself."""
    generator = torch.Generator().manual_seed(0)
    table = torch.linspace(-1, 1, 16)
    codes = torch.randint(0, 16, (48, 64), generator=generator)
    bytes_ = (codes.flatten()[0::2] * 16 + codes.flatten()[1::2]).to(torch.uint8)[:, None]
    absmax, state = torch.rand(48, generator=generator), {"quant_type": "nf4", "blocksize": 64, "shape": [48, 64]}
    tensors = {"weight": bytes_, "weight.absmax": absmax, "weight.quant_map": table}
    if nested:
        inner = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=generator)
        second, steps = torch.rand(3, generator=generator), torch.linspace(-1, 1, 256)
        absmax = steps[inner.long()] * second.repeat_interleave(16) + 0.25
        tensors |= {
            "weight.absmax": inner,
            "weight.nested_absmax": second,
            "weight.nested_quant_map": steps,
        }
        state |= {"nested_blocksize": 16, "nested_offset": 0.25}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    (item,) = matrices(mapped({**tensors, "weight.quant_state.bitsandbytes__nf4": text}))
    assert (item.name, item.shape) == ("fc", (1, 48, 64))
    assert torch.allclose(item.load()[0], table[codes] * absmax[:, None])
    text = torch.tensor(list(b'{"shape": [1000000000, 64]}'), dtype=torch.uint8)
    left_out = next(iter(walk_state_dict(mapped({**tensors, "weight.quant_state.bitsandbytes__nf4": text}))))
    assert left_out.reason.startswith("packed codes of four bits whose state is not known")


def test_a_tensor_that_is_sparse_costs_its_own_entry_only():
    tensors = {"a.weight": torch.eye(16).to_sparse(), "b.weight": torch.randn(16, 16)}
    snapshot = analyze(tensors)
    assert [layer.name for layer in snapshot.layers] == ["b"]
    assert {item.name: item.reason for item in snapshot.skipped} == {"a": "sparse weights (layout torch.sparse_coo)"}


class Scaled(nn.Module):
    """A weight of a class of its own with a matrix called its scale."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        self.scales = nn.Parameter(torch.randn(16, 24))


@pytest.mark.parametrize("kind", ["module", "mapping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int32], ids=str)
def test_a_matrix_called_scale_is_a_weight_unless_codes_are_beside_it(dtype, kind):
    module = nn.Sequential(Scaled(torch.ones(32, 24).to(dtype)))
    found = {item.name: item for item in items_of(module if kind == "module" else module.state_dict())}
    if dtype.is_floating_point:
        assert torch.equal(found["0.scales"].load()[0], module[0].scales)
    else:
        assert found["0.scales"].reason.startswith("scales of ")
        assert found["0"].reason == f"codes of {dtype} with scales, a layout that is not known"


def test_a_delta_of_codes_without_a_known_scale_is_left_out_with_the_reason():
    codes, scale = torch.ones(4, 32, dtype=torch.int8), torch.ones(3, 5)
    factors = {"a.lora_A.weight": codes, "a.lora_A.weight_scale": scale, "a.lora_B.weight": torch.randn(16, 4)}
    found = {item.name: item for item in items_of({**factors, "b.weight": torch.randn(16, 16)})}
    assert found["a.lora[default]"].reason == "codes with weight_scale of shape (3, 5), a layout that is not known"
