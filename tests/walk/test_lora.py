"""Adapters of PEFT: base, delta and merged, each with its own numbers, whatever state the adapter is in."""

import pytest
import torch
from torch import nn

from ww_monitor.errors import InvalidArgument
from ww_monitor.matrix import Matrix, Skipped
from ww_monitor.walk.files import walk_files
from ww_monitor.walk.state_dict import walk_state_dict
from ww_monitor.walk.torch import walk

peft = pytest.importorskip("peft", reason="the adapters are theirs")
transformers = pytest.importorskip("transformers", reason="the models are theirs")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
ALL = ("base", "delta", "merged")


def matrices(model, **options):
    return {item.name: item for item in walk(model, **options) if isinstance(item, Matrix)}


def reasons(model, **options):
    return {item.name: item.reason for item in walk(model, **options) if isinstance(item, Skipped)}


def adapt(model, targets, **options):
    """`model` with an adapter of rank 2 on the layers `targets`, whose factors are both random."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


class Net(nn.Module):
    """One layer of every kind that can be adapted."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 10)
        self.conv = nn.Conv2d(4, 6, 3)
        self.emb = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.plain = nn.Linear(5, 5)


PREFIX = "base_model.model."


def test_names():
    """The base has the clean name, the delta is labelled, and the factors are only mentioned."""
    model = adapt(Net(), ["fc", "emb"])
    assert {name.removeprefix(PREFIX): (m.kind, m.shape) for name, m in matrices(model).items()} == {
        "fc": ("dense", (1, 10, 12)),
        "fc.lora[default]": ("dense", (1, 10, 12)),
        "conv": ("conv", (9, 6, 4)),
        "emb": ("embedding", (1, 9, 8)),
        "emb.lora[default]": ("embedding", (1, 9, 8)),
        "attention.q": ("attention", (1, 8, 8)),
        "attention.k": ("attention", (1, 8, 8)),
        "attention.v": ("attention", (1, 8, 8)),
        "attention.out_proj": ("dense", (1, 8, 8)),
        "plain": ("dense", (1, 5, 5)),
    }
    assert {name.removeprefix(PREFIX): reason for name, reason in reasons(model).items()} == {
        f"{layer}.lora_{factor}.default": "factor of lora[default]"
        for layer, factor in (("fc", "A"), ("fc", "B"), ("emb", "embedding_A"), ("emb", "embedding_B"))
    }


def test_numbers():
    """The delta is s·B·A, of rank r, and merged is base plus delta."""
    model = adapt(Net(), ["fc"])
    layer = model.base_model.model.fc
    found = matrices(model, lora=ALL)
    base, delta = (found[PREFIX + name].load()[0] for name in ("fc", "fc.lora[default]"))
    assert torch.equal(base, layer.base_layer.weight)
    expected = 3.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert torch.allclose(delta, expected, atol=1e-6)
    assert torch.linalg.matrix_rank(delta) == 2
    assert torch.equal(found[PREFIX + "fc.merged"].load()[0], base + delta)
    assert not delta.requires_grad


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")  # peft merges an attention twice
@pytest.mark.parametrize("target", ["fc", "conv", "emb", "attention"])
def test_every_state_gives_the_same_numbers(target):
    """Base, delta and merged do not depend on whether the adapter is merged into the stored weight at the moment."""
    model = adapt(Net(), [target])
    before = {name: matrix.load().clone() for name, matrix in matrices(model, lora=ALL).items()}
    assert any("merged" in name for name in before)
    model.merge_adapter()
    after = {name: matrix.load() for name, matrix in matrices(model, lora=ALL).items()}
    assert list(after) == list(before)
    for name in before:
        if "out_proj" not in name:  # peft 0.21 adds its delta twice when it merges an attention
            assert torch.allclose(after[name], before[name], atol=1e-5), name


def test_merged_is_what_the_layer_computes():
    """The layer's output follows from the matrix `merged`."""
    model = adapt(Net(), ["fc"])
    layer = model.base_model.model.fc.eval()
    x = torch.randn(3, 12)
    for change in (model.merge_adapter, model.unmerge_adapter):
        weight = matrices(model, lora=["merged"])[PREFIX + "fc.merged"].load()[0]
        assert torch.allclose(layer(x), x @ weight.T + layer.bias, atol=1e-5)
        change()


def test_several_adapters():
    """Every adapter has its delta; merged holds the active ones only."""
    model = adapt(Net(), ["fc"])
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["fc"], init_lora_weights=False))
    found = matrices(model, lora=ALL)
    deltas = [found[f"{PREFIX}fc.lora[{adapter}]"].load() for adapter in ("default", "other")]
    assert [int(torch.linalg.matrix_rank(delta[0])) for delta in deltas] == [2, 3]
    base, merged = found[PREFIX + "fc"].load(), found[PREFIX + "fc.merged"]
    assert torch.equal(merged.load(), base + deltas[0])
    model.set_adapter("other")
    assert torch.equal(merged.load(), base + deltas[1])


def test_choice():
    """`lora` lists what is shown of an adapted weight; a base that is left out is mentioned."""
    model = adapt(nn.ModuleDict({"fc": nn.Linear(12, 10), "plain": nn.Linear(4, 4)}), ["fc"])
    assert list(matrices(model, lora=["merged"])) == [PREFIX + "fc.merged", PREFIX + "plain"]
    assert reasons(model, lora=["merged"])[PREFIX + "fc"] == "base weight of an adapter: not in lora"
    assert list(matrices(model, lora=["delta"])) == [PREFIX + "fc.lora[default]", PREFIX + "plain"]


@pytest.mark.parametrize("lora", [["base", "factors"], "base", ()])
def test_unknown_choice(lora):
    """The error names the choices, at once."""
    with pytest.raises(
        InvalidArgument, match="walk: lora must be a sequence of some of 'base', 'delta', 'merged'; got"
    ):
        walk(nn.Linear(4, 4), lora=lora)


def test_fused_and_transposed():
    """The fused projection of GPT-2 has base and delta of q, k and v, cut alike."""
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = adapt(transformers.GPT2LMHeadModel(config), ["c_attn"], fan_in_fan_out=True)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    found = matrices(model, lora=ALL)
    name = PREFIX + "transformer.h.0.attn.c_attn"
    for index, end in enumerate("qkv"):
        columns = slice(16 * index, 16 * index + 16)
        assert torch.equal(found[f"{name}.{end}"].load()[0], layer.weight[:, columns])
        delta = layer.get_delta_weight("default")[:, columns]
        assert torch.allclose(found[f"{name}.{end}.lora[default]"].load()[0], delta, atol=1e-6)
        assert found[f"{name}.{end}.merged"].role == end


def test_adapted_experts():
    """An adapter on the experts of Mixtral gives a delta for each of them."""
    config = transformers.MixtralConfig(
        hidden_size=32,
        num_hidden_layers=1,
        vocab_size=20,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=3,
    )
    model = peft.get_peft_model(
        transformers.MixtralModel(config),
        peft.LoraConfig(
            r=2,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    found = matrices(model)
    name = PREFIX + "layers.0.mlp.experts"
    for end in ("gate_up_proj.gate", "gate_up_proj.up", "down_proj"):
        for index in range(3):
            delta = found[f"{name}.{end}.{index}.lora[default]"]
            assert delta.shape == found[f"{name}.{end}.{index}"].shape
            assert torch.linalg.matrix_rank(delta.load()[0]) == 2


def test_half_precision():
    """The delta of factors in bfloat16 keeps its rank: it is not rounded to bfloat16 again."""
    model = adapt(Net().to(torch.bfloat16), ["fc"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    found = matrices(model)
    assert found[PREFIX + "fc"].load().dtype == torch.bfloat16
    delta = found[PREFIX + "fc.lora[default]"].load()
    assert delta.dtype == torch.float32
    assert torch.linalg.matrix_rank(delta[0]) == 2


def test_dora():
    """DoRA rescales the columns of the sum: there is a base and a delta, and merged says that it is more than a sum."""
    model = adapt(Net(), ["fc"], use_dora=True)
    assert PREFIX + "fc.lora[default]" in matrices(model, lora=ALL)
    assert "more than a sum" in reasons(model, lora=ALL)[PREFIX + "fc.merged"]
    model.merge_adapter()
    assert "more than a sum" in reasons(model, lora=ALL)[PREFIX + "fc"]
    used = model.base_model.model.fc.base_layer.weight
    assert torch.equal(matrices(model, lora=ALL)[PREFIX + "fc.merged"].load()[0], used)


def test_quantised_base():
    """An adapter over a base that cannot be read still gives its delta."""
    model = adapt(nn.ModuleDict({"fc": nn.Linear(12, 10)}), ["fc"])
    base = model.base_model.model["fc"].base_layer
    base.weight = nn.Parameter(torch.zeros(60, 1, dtype=torch.uint8), requires_grad=False)
    assert {name: matrix.shape for name, matrix in matrices(model, lora=ALL).items()} == {
        PREFIX + "fc.lora[default]": (1, 10, 12)
    }
    assert reasons(model, lora=ALL)[PREFIX + "fc"] == "integer weights"
    assert reasons(model, lora=ALL)[PREFIX + "fc.merged"] == "integer weights"


def test_no_trace():
    """Walking and loading change no tensor, no state and no random number."""
    model = adapt(Net(), ["fc", "conv", "emb"])
    model.merge_adapter()
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    for matrix in matrices(model, lora=ALL).values():
        matrix.load()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, (tensor, _) in before.items())
    assert all(after[name]._version == version for name, (_, version) in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.base_model.model.fc.merged


def test_a_module_called_base_layer():
    """The name `base_layer` is dropped for adapters only."""
    assert list(matrices(nn.ModuleDict({"base_layer": nn.Linear(4, 4)}))) == ["base_layer"]


def test_a_delta_trains_where_its_factors_do():
    model = adapt(Net(), ["fc"])
    frozen = {name.removeprefix(PREFIX): item.frozen for name, item in matrices(model, lora=ALL).items()}
    assert {name for name, still in frozen.items() if not still} == {"fc.lora[default]", "fc.merged"}
    model.requires_grad_(False)
    assert all(item.frozen for item in matrices(model, lora=ALL).values())


def test_a_copy_that_trains_stands_in_the_place_of_its_original():
    model = adapt(Net(), ["fc"], modules_to_save=["plain"])
    copy = model.base_model.model.plain.modules_to_save["default"].weight
    found = {name.removeprefix(PREFIX): item for name, item in matrices(model).items() if "plain" in name}
    assert list(found) == ["plain"]
    assert found["plain"].load().data_ptr() == copy.data_ptr()
    assert not found["plain"].frozen
    assert reasons(model)[f"{PREFIX}plain.original_module.weight"].startswith("the original of a module that trains")
    stored = {
        item.name.removeprefix(PREFIX): item for item in walk_state_dict(model.state_dict()) if "plain" in item.name
    }
    assert {name: type(item) for name, item in stored.items()} == {"plain": Matrix, "plain.original_module": Skipped}


def test_stored_adapters_of_stacked_parameters_are_left_out_with_the_reason(tmp_path):
    """Live each expert has its delta; a file does not say which parameter a factor belongs to."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 16, 24)), nn.Parameter(torch.randn(4, 24, 16))

    for targets in (["experts.up", "experts.down"], ["experts.down"]):
        model = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(12, 10)})
        model = adapt(model, ["fc"], target_parameters=targets)
        model.save_pretrained(tmp_path)
        for items in (walk_files(tmp_path), walk_state_dict(model.state_dict())):
            listed = list(items)
            deltas = [item.name for item in listed if isinstance(item, Matrix) and "lora" in item.name]
            assert deltas == [f"{PREFIX}fc.lora[default]"]
            assert any(
                item.reason.startswith("an adapter of a module's parameters")
                for item in listed
                if isinstance(item, Skipped)
            )
