"""On a real CUDA device: the host's snapshot, little memory, a training and a process that are left as they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks import shapes
from benchmarks.nets import Step, updated
from benchmarks.training import in_loop
from ww_monitor import Monitor, Options, analyze
from ww_monitor.record import Layer, Snapshot
from ww_monitor.walk.torch import walk

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")
MIB, GIB = 1 << 20, 1 << 30


def make_model(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Every kind of weight, enough of it to keep a device busy, and a trap in two of the dense ones."""
    generator = torch.Generator().manual_seed(0)
    others = {"conv": nn.Conv2d(64, 96, 3), "embedding": nn.Embedding(1000, 256), "small": nn.Linear(24, 16)}
    layers = nn.ModuleDict({f"dense{i}": nn.Linear(512, 384 + 64 * (i % 2)) for i in range(8)} | others)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        layers["dense2"].weight[3, 4] = 1.5
        layers["dense5"].weight[7, 8] = 1.5
    return layers.to(dtype)


def solved_on(snapshot: Snapshot) -> set[str]:
    return {layer.solved_on for layer in snapshot.layers}


def decided(one: Layer, other: Layer) -> set[str]:
    """The metrics that weights decide: two analyses with other shuffles agree in them."""
    same = {name for name, value in one.metrics.items() if value == other.metrics[name] or math.isnan(value)}
    return same | {"num_traps"}


def assert_same(found: Snapshot, expected: Snapshot, reseeded: Snapshot) -> None:
    for here, there, again in zip(found.layers, expected.layers, reseeded.layers, strict=True):
        assert (here.name, here.kind, here.shape, here.status) == (there.name, there.kind, there.shape, there.status)
        names = decided(there, again)
        assert {"alpha", "num_traps"} <= names
        values = [{name: layer.metrics[name] for name in names} for layer in (here, there)]
        assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-12, nan_ok=True), here.name


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def on_host(request) -> tuple[nn.ModuleDict, Snapshot, Snapshot]:
    """A model, and what the host makes of it with two seeds."""
    model = make_model(request.param)
    return model, analyze(model), analyze(model, seed=1)


def test_a_device_gives_the_hosts_snapshot(on_host):
    model, *expected = on_host
    found = analyze(model.to(CARD))
    model.cpu()
    assert [layer.value("num_traps") for layer in found.layers].count(1.0) == 2
    assert_same(found, *expected)
    assert all(where.startswith("cuda") for where in solved_on(found))


def test_small_layers_that_the_host_does_sooner_are_the_same():
    model = shapes.mlp(784, 300, 100, 10)
    expected = analyze(model), analyze(model, seed=1)
    assert_same(analyze(model.to(CARD)), *expected)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_the_default_device_and_dtype_change_nothing(on_host, place):
    model = on_host[0].to(CARD if place == "cuda" else "cpu")
    expected = analyze(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CARD:
            found = analyze(model)
    finally:
        torch.set_default_dtype(before)
        model.cpu()
    assert [repr(layer) for layer in found.layers] == [repr(layer) for layer in expected.layers]


def test_one_seed_gives_one_snapshot_twice():
    model = shapes.heavy_tailed(shapes.square(512, count=9)).to(CARD)
    first, second = analyze(model, seed=3), analyze(model, seed=3)
    assert [repr(layer.metrics) for layer in first.layers] == [repr(layer.metrics) for layer in second.layers]


def test_a_full_card_leaves_it_to_the_host_and_the_row_says_so():
    model = shapes.square(4096)
    expected = analyze(model), analyze(model, seed=1)
    model.to(CARD)
    analyze(shapes.square(64, count=9).to(CARD))  # the libraries' own memory
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 120 * MIB, dtype=torch.uint8, device=CARD)
    found = analyze(model)
    del held
    assert all(where.startswith("cpu, not cuda") for where in solved_on(found))
    assert_same(found, *expected)


# --- a training


def trained(mode: str | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Weights and the state of the device's random numbers after a training with bf16, dropout and AdamW."""
    nets = []

    def build() -> tuple[nn.Module, Step]:
        torch.manual_seed(0)
        with CARD:
            first, middle, last = nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10)
            x, y = torch.randn(256, 64), torch.arange(256) % 10
        net = nn.Sequential(first, nn.GELU(), nn.Dropout(0.1), middle, nn.GELU(), last)
        with torch.no_grad():
            middle.weight[3, 4] = 9.0  # is shuffled
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        nets.append(net)

        def step() -> torch.Tensor:
            with torch.autocast(CARD.type, dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(net(x), y)
            return updated(optimizer, loss)

        return net, step

    run = in_loop(build, 12, mode and {"every_n_steps": 3, "mode": mode, "options": Options(strict=True)})
    assert run.snapshots > (1 if mode else -1)
    return [parameter.detach().cpu() for parameter in nets[0].parameters()], torch.cuda.get_rng_state()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_training_on_a_device_is_bit_identical(mode):
    (alone, stream), (beside, other) = trained(None), trained(mode)
    assert all(map(torch.equal, alone, beside))
    assert torch.equal(stream, other)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("heavy", [False, True], ids=["plain", "Student t"])
def test_the_peak_of_a_look_is_the_copied_weights_and_a_gibibyte(mode, heavy):
    model = (shapes.heavy_tailed(shapes.gpt2_small()) if heavy else shapes.gpt2_small()).to(CARD)
    copied = sum(parameter.nbytes for parameter in model.parameters()) if mode == "async" else 0
    monitor = Monitor(every_n_steps=1, mode=mode)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    monitor.observe(walk(model), step=0)
    monitor.finish()
    monitor.close()
    assert {layer.status for layer in monitor.history.last.layers} == {"ok"}
    assert torch.cuda.max_memory_allocated() - before <= copied + GIB
    assert torch.cuda.memory_allocated() - before <= 128 * MIB  # what libraries keep, no weights


# --- the process


def process_state() -> dict[str, object]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "tf32": (matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "float16 sums": matmul.allow_fp16_reduced_precision_reduction,
        "bfloat16 sums": matmul.allow_bf16_reduced_precision_reduction,
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "linalg library": torch.backends.cuda.preferred_linalg_library(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.current_device(),
        "stream": torch.cuda.current_stream().cuda_stream,
        "streams of random numbers": (torch.get_rng_state().tolist(), torch.cuda.get_rng_state().tolist()),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("tf32", [False, True])
def test_an_analysis_on_a_device_changes_no_global_setting(tf32):
    model = make_model().to(CARD)
    found = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        before = process_state()
        analyze(model)
        analyze(model, preset="weightwatcher", metrics="all")
        assert process_state() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = found
