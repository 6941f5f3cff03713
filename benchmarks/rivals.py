"""What the analysis is measured against: weightwatcher 0.7.7, singular values with a Hill fit, the bare solver."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ww_monitor.engine.threads import hold_to_one_thread, thread_budget
from ww_monitor.matrix import Matrix
from ww_monitor.walk.torch import walk

FULL = {"randomize": True, "mp_fit": True, "detX": True}
"""weightwatcher's options for traps, Marchenko–Pastur spikes and detX."""


def has_weightwatcher() -> bool:
    return importlib.util.find_spec("weightwatcher") is not None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Catches what the peer prints and warns of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def weightwatcher(model: torch.nn.Module, **options: bool) -> Any:
    """The peer's table of details, a row a layer."""
    with silent():
        import weightwatcher

        return weightwatcher.WeightWatcher(model=model).analyze(plot=False, savefig=False, **options)


def hill(model: torch.nn.Module) -> list[float]:
    """α = 1 + k / Σ ln(λ_j/λ_k) over the larger half of each spectrum, from torch's singular values in float32.

    What TempBalance (Zhou et al. 2023, NeurIPS) computes, with the median as the start of the tail.
    """
    return [hill_of(torch.linalg.svdvals(matrix.load().float())) for matrix in matrices_of(model)]


def hill_of(singular_values: torch.Tensor) -> float:
    """The Hill estimator of one layer's pooled singular values, any shape."""
    eigenvalues = singular_values.flatten().square().sort().values
    tail = eigenvalues[len(eigenvalues) // 2 :]
    return float(1 + len(tail) / (tail / tail[0]).log().sum())


def matrices_of(model: torch.nn.Module) -> list[Matrix]:
    """The matrices, the most expensive first."""
    return sorted((item for item in walk(model) if isinstance(item, Matrix)), key=lambda matrix: -matrix.cost)


# --- the bare solver: float64 Gram matrix of the short side and its eigenvalues, and nothing else


def numpy_serial(model: torch.nn.Module) -> float:
    return sum(_by_numpy(w) for w in _slices(model))


def numpy_pool(model: torch.nn.Module) -> float:
    return _pool(_by_numpy, model)


def torch_serial(model: torch.nn.Module) -> float:
    return sum(_by_torch(w) for w in _slices(model))


def torch_pool(model: torch.nn.Module) -> float:
    return _pool(_by_torch, model)


DRIVERS: dict[str, Callable[[torch.nn.Module], float]] = {
    "numpy, default threads": numpy_serial,
    "numpy, one-thread workers": numpy_pool,
    "torch, default threads": torch_serial,
    "torch, one-thread workers": torch_pool,
}
"""Ways to run the bare solver; each gives the sum of the largest eigenvalues."""


def _slices(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for matrix in matrices_of(model):
        yield from matrix.load()


def _pool(largest: Callable[[torch.Tensor], float], model: torch.nn.Module) -> float:
    with (
        threadpool_limits(limits=1, user_api="blas"),
        ThreadPoolExecutor(thread_budget(), initializer=hold_to_one_thread) as pool,
    ):
        return sum(pool.map(largest, _slices(model)))


def _by_numpy(w: torch.Tensor) -> float:
    a = _tall(w).numpy()
    return float(np.linalg.eigvalsh(a.T @ a)[-1])


def _by_torch(w: torch.Tensor) -> float:
    a = _tall(w)
    with torch.no_grad():
        return float(torch.linalg.eigvalsh(a.mT @ a)[-1])


def _tall(w: torch.Tensor) -> torch.Tensor:
    return (w if w.shape[0] >= w.shape[1] else w.mT).double()
