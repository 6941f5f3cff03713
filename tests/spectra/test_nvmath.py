"""The batched solver before torch 2.12, with NVIDIA's bindings played by a module of their documented signature."""

import contextlib
import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from ww_monitor.spectra import device as module
from ww_monitor.spectra.device import Accelerator

FLOAT64, LOWER, NO_VECTORS = 1, 0, 0
"""CUDA_R_64F, CUBLAS_FILL_MODE_LOWER and CUSOLVER_EIG_MODE_NOVECTOR, from NVIDIA's headers."""


def array(pointer, shape, kind=ctypes.c_double):
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), shape)


def bindings(made, *, gives_up=()):
    """`nvmath.bindings.cusolverDn`: it works on the memory that it is given, as the library does."""

    def create():
        made.append(threading.get_ident())
        return len(made)

    def xsyev_batched_buffer_size(
        handle, params, jobz, uplo, n, data_type_a, a, lda, data_type_w, w, compute_type, batch_size
    ):
        assert (jobz, uplo, lda) == (NO_VECTORS, LOWER, n)
        assert (data_type_a, data_type_w, compute_type) == (FLOAT64,) * 3
        return 64 * batch_size, 16

    def xsyev_batched(
        handle, params, jobz, uplo, n, data_type_a, a, lda, data_type_w, w, compute_type, buffer_on_device,
        workspace_in_bytes_on_device, buffer_on_host, workspace_in_bytes_on_host, info, batch_size,
    ):  # fmt: skip
        assert (workspace_in_bytes_on_device, workspace_in_bytes_on_host) == (64 * batch_size, 16)
        array(buffer_on_device, (workspace_in_bytes_on_device,), ctypes.c_uint8)[:] = 1
        array(buffer_on_host, (workspace_in_bytes_on_host,), ctypes.c_uint8)[:] = 1
        stack, values = array(a, (batch_size, n, n)), array(w, (batch_size, n))
        values[:] = np.linalg.eigvalsh(stack, UPLO="U")  # a lower triangle by columns is an upper one by rows
        stack[:] = 7.0
        array(info, (batch_size,), ctypes.c_int32)[:] = [k in gives_up for k in range(batch_size)]

    streams = []
    return SimpleNamespace(
        create=create,
        create_params=lambda: 5,
        set_stream=lambda handle, stream: streams.append((handle, stream)),
        streams=streams,
        xsyev_batched_buffer_size=xsyev_batched_buffer_size,
        xsyev_batched=xsyev_batched,
    )


@pytest.fixture
def played(monkeypatch):
    """A maker of the bindings, put where they are imported from; torch says that it is 2.11 on a CUDA device."""

    def play(**behaviour):
        made = []
        solver = bindings(made, **behaviour)
        package, inner = ModuleType("nvmath"), ModuleType("nvmath.bindings")
        inner.cusolverDn = solver
        monkeypatch.setitem(sys.modules, "nvmath", package)
        monkeypatch.setitem(sys.modules, "nvmath.bindings", inner)
        monkeypatch.setattr(module, "_has_nvmath", lambda: True)
        monkeypatch.setattr(module, "_HANDLES", threading.local())
        monkeypatch.setattr(torch, "__version__", "2.11.0")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=42))
        return solver, made

    return play


def grams(count, side):
    w = torch.randn(count, 2 * side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return w.mT @ w


@pytest.mark.parametrize(("count", "side"), [(1, 5), (9, 20), (8, 130)])
def test_a_stack_is_solved_in_one_call_on_the_current_stream(played, count, side):
    solver, _ = played()
    stack = grams(count, side)
    expected = torch.linalg.eigvalsh(stack)
    torch.testing.assert_close(Accelerator(torch.device("cpu")).batched(stack), expected, rtol=1e-12, atol=1e-12)
    assert solver.streams == [(1, 42)]


def test_what_it_gives_up_on_is_not_known(played):
    played(gives_up={1})
    values = Accelerator(torch.device("cpu")).batched(grams(3, 10))
    assert values.isnan().all(1).tolist() == [False, True, False]


def test_a_thread_has_a_handle_of_its_own_and_keeps_it(played):
    _, made = played()
    device = Accelerator(torch.device("cpu"))
    for _ in range(2):
        device.batched(grams(2, 6))
    thread = threading.Thread(target=lambda: device.batched(grams(2, 6)))
    thread.start()
    thread.join()
    assert len(made) == 2
    assert len(set(made)) == 2


def test_below_eight_large_matrices_it_is_not_asked(played):
    solver, _ = played()
    values = Accelerator(torch.device("cpu")).eigvalsh(grams(7, 130))
    assert values.shape == (7, 130)
    assert solver.streams == []
