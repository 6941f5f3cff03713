"""trap_harm: what it says of nets with a trap, by hand and on published ones, and that it leaves the model alone."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import ww_monitor
from ww_monitor import InvalidArgument, trap_harm
from ww_monitor.callbacks._adapter import Adapter
from ww_monitor.harm import divergence


def with_trap(model, name, value=4.0):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    return model


def mlp():
    torch.manual_seed(0)
    return with_trap(nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)), "0.weight")


def cnn():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return with_trap(nn.Sequential(*convolutions, *head), "3.weight")


def gpt2():
    transformers = pytest.importorskip("transformers", reason="the model is theirs")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return with_trap(transformers.GPT2LMHeadModel(config), "transformer.h.0.mlp.c_fc.weight")


MODELS = {"mlp": mlp, "cnn": cnn, "gpt2": gpt2}


def state_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(module.training, dict(module._forward_hooks)) for module in model.modules()]
    needs = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    return tensors, flags, needs, torch.get_rng_state(), python, numpy[1].tolist()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_model_and_every_random_state_stay_bit_identical(make):
    model, called = make().train(), []
    snapshot = ww_monitor.analyze(model)
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append((torch.rand(1), random.random(), np.random.rand())))
    before = state_of(model)
    harm = trap_harm(model, snapshot)
    tensors, flags, needs, *streams = state_of(model)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in before[0].items())
    assert (flags, needs) == before[1:3]
    assert torch.equal(streams[0], before[3])
    assert streams[1:] == list(before[4:])
    assert called == []
    assert len(harm.layers) == 1
    assert 0 < float(harm) < math.log(2)


def test_the_harm_is_that_of_the_model_with_the_entry_at_the_threshold():
    model, inputs = mlp(), torch.rand(50, 40)
    snapshot = ww_monitor.analyze(model)
    double = copy.deepcopy(model).eval()
    weight = model[0].weight.detach().double()
    others = torch.cat([weight.flatten()[:7], weight.flatten()[8:]])
    limit = others.mean() + others.std(correction=0) * weight.numel() ** 0.25
    double[0].weight.data.view(-1)[7] = limit
    p, q = (torch.softmax(net(inputs).double(), -1) for net in (copy.deepcopy(model).eval(), double))
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).mean() / 2
    harm = trap_harm(model, snapshot, inputs)
    assert float(harm) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert harm.layers == {"0": harm.divergence}
    assert float(trap_harm(model, snapshot, (inputs,))) == float(harm)
    assert float(trap_harm(model, snapshot, {"input": inputs})) == float(harm)


def test_the_seed_draws_the_inputs_and_a_trap_that_no_input_meets_does_no_harm():
    model = mlp()
    snapshot = ww_monitor.analyze(model)
    assert float(trap_harm(model, snapshot)) == float(trap_harm(model, snapshot))
    assert float(trap_harm(model, snapshot)) != float(trap_harm(model, snapshot, seed=1))
    assert float(trap_harm(model, snapshot)) != float(trap_harm(model, snapshot, samples=10))
    inputs = torch.rand(50, 40)
    inputs[:, 7] = 0
    assert float(trap_harm(model, snapshot, inputs)) == 0


def test_each_layer_is_told_alone_and_all_together():
    model = with_trap(mlp(), "3.weight", 5.0)
    harm = trap_harm(model, ww_monitor.analyze(model))
    assert set(harm.layers) == {"0", "3"}
    assert len({harm.divergence, *harm.layers.values()}) == 3


def test_no_trap_is_no_harm_and_needs_no_model():
    snapshot = ww_monitor.analyze(nn.Linear(40, 30))
    assert float(trap_harm(object(), snapshot)) == 0


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
    ],
    ids=["parametrization", "weight norm", "spectral norm", "pruning"],
)
def test_a_weight_that_is_computed_from_others_is_left_out_with_the_reason(compute):
    model = mlp()
    compute(model[0])
    with torch.no_grad():
        model(torch.zeros(2, 40))
    harm = trap_harm(model, ww_monitor.analyze(model))
    assert math.isnan(float(harm)), "what is not known is not called harmless"
    assert list(harm.layers) == []
    assert "computed from others" in harm.skipped["0"]


@pytest.mark.parametrize(
    ("model", "inputs", "says"),
    [
        (object(), None, "model must be a torch module or a Keras model; got object"),
        (nn.Linear(8, 8), None, "layers that the model lacks"),
        (nn.Sequential(nn.Linear(40, 32), nn.Linear(5, 5)), None, "inputs must be given"),
    ],
)
def test_what_it_cannot_do_it_says(model, inputs, says):
    with pytest.raises(InvalidArgument, match=says):
        trap_harm(model, ww_monitor.analyze(mlp()), inputs)


def test_the_divergence_of_logits_probabilities_and_one_output():
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.1]])
    others = logits.flip(1)
    assert divergence(logits, logits) == 0
    assert divergence(logits.softmax(-1), others.softmax(-1)) == pytest.approx(divergence(logits, others), rel=1e-6)
    two = [torch.stack([torch.zeros(4), one], 1) for one in (torch.arange(4.0), torch.full((4,), -2.0))]
    assert divergence(torch.arange(4.0)[:, None], torch.full((4, 1), -2.0)) == pytest.approx(divergence(*two))
    assert divergence(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])) == pytest.approx(math.log(2))


def test_a_weight_that_the_forward_writes_is_left_out_too():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.register_buffer("source", self.net[0].weight.detach().clone().flatten())

        def forward(self, x):
            self.net[0].weight.data.copy_(self.source.view(32, 40))
            return self.net(x)

    model = Writing()
    harm = trap_harm(model, ww_monitor.analyze(model), torch.randn(8, 40, generator=torch.Generator().manual_seed(1)))
    assert math.isnan(float(harm))
    assert list(harm.skipped) == ["net.0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_known_as_such_in_any_precision(dtype):
    logits = torch.randn(200, 60, generator=torch.Generator().manual_seed(0))
    others = logits.roll(1, 0)
    rounded = [one.softmax(-1).to(dtype) for one in (logits, others)]
    assert divergence(*rounded) == pytest.approx(divergence(logits, others), rel=1e-2)


def test_one_output_a_sample_is_the_same_with_and_without_an_axis_of_its_own():
    first, second = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([1.0, 0.5, 2.0])
    assert divergence(first, second) == divergence(first[:, None], second[:, None]) > 0


class Giving(nn.Module):
    """A net whose outputs are given as some function of its logits."""

    def __init__(self, give):
        super().__init__()
        self.net, self.give = mlp(), give

    def forward(self, x):
        return self.give(self.net(x))


@pytest.mark.parametrize(
    "give",
    [
        lambda y: (y.mean(), y),
        lambda y: {"loss": y.mean(), "scores": y},
        lambda y: {"scores": 2 * y, "logits": y},
        lambda y: [(y, y.mean())],
    ],
    ids=["tuple", "dict", "logits", "nested"],
)
def test_a_loss_beside_the_outputs_is_passed_over(give):
    inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    plain = mlp()
    expected = float(trap_harm(plain, ww_monitor.analyze(plain), inputs))
    model = Giving(give)
    assert float(trap_harm(model, ww_monitor.analyze(model), inputs)) == expected > 0


@pytest.mark.parametrize("give", [lambda y: y.mean(), lambda y: y.argmax(-1), lambda y: "no", lambda y: ()])
def test_outputs_without_a_number_a_sample_are_refused(give):
    model = Giving(give)
    with pytest.raises(InvalidArgument, match="the model must give a tensor of numbers a sample; got"):
        trap_harm(model, ww_monitor.analyze(model), torch.zeros(8, 40))


def test_outputs_that_are_not_finite_are_not_called_harmless():
    known, broken = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    assert math.isnan(divergence(known, broken))
    assert math.isnan(divergence(broken, broken))
    sure = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # 0 ln 0 is 0
    assert (divergence(sure, sure), divergence(sure, sure.flip(1))) == (0.0, pytest.approx(math.log(2)))
    model = mlp()
    found = trap_harm(model, ww_monitor.analyze(model), torch.full((4, 40), math.nan))
    assert math.isnan(found.layers["0"])
    assert math.isnan(float(found))


def test_one_probability_is_that_of_two_classes():
    p, q = torch.tensor([[0.2], [0.9]]), torch.tensor([[0.5], [0.9]])
    both = [torch.cat([1 - one, one], 1) for one in (p, q)]
    assert divergence(p, q) == pytest.approx(divergence(*both), rel=1e-6)
    logits = torch.tensor([[-2.0], [3.0]])
    assert divergence(logits, 2 * logits) == pytest.approx(
        divergence(logits.sigmoid(), (2 * logits).sigmoid()), rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_classes_of_an_image_are_last_in_keras():
    keras = pytest.importorskip("keras", reason="the model is its")
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(32, 3, padding="same", activation="relu"), keras.layers.Conv2D(5, 1)]
    model = keras.Sequential([keras.Input((6, 6, 32)), *layers])
    kernel = layers[0].kernel.numpy()
    kernel[1, 1, 3, 4] = 6.0
    layers[0].kernel.assign(kernel)
    layers[1].kernel.assign(10 * layers[1].kernel.numpy())
    snapshot = ww_monitor.analyze(model)
    (row,) = [layer for layer in snapshot.layers if layer.trap_entries]
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 32)).astype("float32")
    own = torch.tensor(keras.ops.convert_to_numpy(model(x)))
    found = trap_harm(model, snapshot, x).layers[row.name]
    kernel[1, 1, 3, 4] = 6.0 / row.trap_entries[0].headroom
    layers[0].kernel.assign(kernel)
    by_hand = divergence(own, torch.tensor(keras.ops.convert_to_numpy(model(x))))
    assert found == pytest.approx(by_hand, rel=0.05)


def test_a_keras_model_is_run_with_other_numbers_and_keeps_its_own():
    keras = pytest.importorskip("keras", reason="the model is theirs")
    from ww_monitor.walk.keras import to_torch

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, activation="relu"), keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((40,)), *layers, keras.layers.Dense(10, name="head")])
    kernel = torch.full((40, 32), 0.1) * torch.randn(40, 32)
    kernel[3, 4] = 4.0
    model.layers[0].kernel.assign(kernel)
    before = [to_torch(variable.value).clone() for variable in model.variables]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    harm = trap_harm(model, ww_monitor.analyze(model))
    assert len(harm.layers) == 1
    assert 0 < float(harm) < 0.2
    for variable, value in zip(model.variables, before, strict=True):
        assert torch.equal(to_torch(variable.value), value)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]


@pytest.mark.parametrize("outputs", [list, lambda both: {"logits": both[0], "other": both[1]}], ids=["list", "dict"])
def test_a_keras_model_may_have_several_outputs(outputs):
    keras = pytest.importorskip("keras", reason="the model is theirs")
    keras.utils.set_random_seed(0)
    given = keras.Input((40,))
    hidden = keras.layers.Dense(32, activation="relu", name="hidden")
    inside = hidden(given)
    both = [keras.layers.Dense(10, name="head")(inside), keras.layers.Dense(3, name="other")(inside)]
    kernel = 0.1 * torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    kernel[3, 4] = 4.0
    hidden.kernel.assign(kernel)
    x = np.random.default_rng(0).normal(size=(8, 40)).astype("float32")
    one, several = keras.Model(given, both[0]), keras.Model(given, outputs(both))
    found = [float(trap_harm(model, ww_monitor.analyze(model), x)) for model in (one, several)]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[0] > 0


def test_the_traps_of_nets_that_collapsed_are_harmful_and_those_of_a_healthy_one_are_not(shared):
    load_file = pytest.importorskip("safetensors.torch", reason="the weights are in its format").load_file
    saved, found = load_file(shared / "data/antigrokking/weights-3212290.safetensors"), {}
    for run in ("seed0", "seed1", "seed2", "seed0-wd0.01"):
        model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
        for at, name in ((0, "fc1"), (2, "fc2"), (4, "fc3")):
            model[at].load_state_dict({key: saved[f"{run}.{name}.{key}"].float() for key in ("weight", "bias")})
        found[run] = float(trap_harm(model, ww_monitor.analyze(model)))
    healthy = found.pop("seed0-wd0.01")
    assert healthy == pytest.approx(0.0002, abs=0.00005)
    assert all(0.0010 <= value <= 0.0025 for value in found.values()), found


class Loop(Adapter):
    """A trainer of our own, of which nothing but the weights changes."""

    def train(self, model, *, steps=6):
        self._open(step=0, folder=lambda: None, print_line=None)
        for step in range(steps):
            if self.monitor.due(step):
                self._snapshot(model, step=step, epoch=None, whole=True)
            if self.monitor.stop_reason:
                break
        self._close()
        return step


@pytest.mark.parametrize(("level", "stopped_at"), [(1.0, 2), (0.0, 5)], ids=["meets the entry", "never meets it"])
def test_a_callback_stops_on_a_trap_that_the_outputs_depend_on_only(level, stopped_at):
    model, inputs = with_trap(mlp(), "0.weight", 20.0), torch.rand(50, 40)
    inputs[:, 7] *= level
    loop = Loop(every_n_steps=1, stop_on="harmful_traps", harm_inputs=inputs, patience=3)
    assert loop.train(model) == stopped_at
    assert ("harmful_traps in 3 snapshots" in loop.monitor.stop_reason) == (level > 0)
    harm = trap_harm(model, loop.monitor.history.last, inputs)
    assert loop.monitor.history.last["0"].value("trap_harm") == harm.layers["0"]
    assert loop.monitor.harm is None  # or it would hold the model


def test_a_callback_without_inputs_draws_some_and_a_failure_is_said_once():
    drawn = Loop(every_n_steps=1, stop_on="harmful_traps")
    drawn.train(with_trap(mlp(), "0.weight", 20.0), steps=1)
    assert drawn.monitor.history.last["0"].value("trap_harm") > 0
    wrong = Loop(every_n_steps=1, harm_inputs=torch.rand(3, 3))
    with pytest.warns(ww_monitor.SpectralWarning, match="trap_harm") as said:
        wrong.train(mlp(), steps=3)
    assert len(said) == 1
    assert len(wrong.monitor.history) == 3
    plain = Loop(every_n_steps=1)
    plain.train(mlp(), steps=1)
    assert "trap_harm" not in plain.monitor.history.last["0"].metrics
