"""What training has queued is waited for on the accelerators that it uses, and on no other."""

from types import SimpleNamespace

import pytest
import torch

from ww_monitor.monitor import queued


class Device:
    """An accelerator's module of torch, which records whose stream was waited for."""

    def __init__(self, reserved, *, initialized=True):
        self.waited = []
        self.reserved = reserved
        self.is_initialized = lambda: initialized
        self.device_count = lambda: len(reserved)
        self.memory_reserved = lambda number: self.reserved[number]
        self.current_stream = lambda number: SimpleNamespace(synchronize=lambda: self.waited.append(number))


@pytest.fixture
def use(monkeypatch):
    """A function: let torch know this accelerator's module, and no other."""

    def known(module, kind="xpu"):
        device = torch.device(kind)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        accelerator = SimpleNamespace(current_accelerator=lambda: device)
        monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
        monkeypatch.setattr(torch, "get_device_module", {device: module}.get, raising=False)

    return known


@pytest.mark.parametrize(
    ("module", "waited"),
    [
        (Device([100]), [0]),
        (Device([100, 0, 300]), [0, 2]),
        (Device([0, 0]), []),
        (Device([100], initialized=False), []),
    ],
)
def test_the_current_stream_of_every_device_in_use_is_waited_for(use, module, waited):
    use(module)
    assert queued.wait_for_queued() >= 0
    assert module.waited == waited


@pytest.mark.parametrize(("allocated", "waited"), [(0, []), (8, ["all"])])
def test_a_device_without_streams_is_waited_for_as_a_whole_where_it_is_in_use(use, allocated, waited):
    """As Apple's."""
    calls = []
    module = SimpleNamespace(current_allocated_memory=lambda: allocated, synchronize=lambda: calls.append("all"))
    use(module, "mps")
    queued.wait_for_queued()
    assert calls == waited


def test_without_an_accelerator_nothing_is_waited_for_and_none_is_initialized():
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is one here")
    assert queued.wait_for_queued() < 1
    assert not torch.cuda.is_initialized()


def test_cuda_is_taken_where_it_is_in_use_else_what_torch_calls_the_accelerator(use, monkeypatch):
    other, cuda = Device([100]), Device([100])
    use(other)
    queued.wait_for_queued()
    assert (other.waited, cuda.waited) == ([0], [])
    for name, attribute in vars(cuda).items():
        monkeypatch.setattr(torch.cuda, name, attribute, raising=False)
    queued.wait_for_queued()
    assert (other.waited, cuda.waited) == ([0], [0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_done_when_the_wait_is_over():
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        matrix = matrix @ matrix
    queued.wait_for_queued()
    assert torch.cuda.current_stream().query()
