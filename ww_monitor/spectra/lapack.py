"""The host's symmetric routines in place: a Gram matrix that is added to, a solve that overwrites it.

numpy's and torch's calls of the same routines copy the matrix, and numpy mirrors the triangle that BLAS has filled.
SciPy publishes the routines themselves (`scipy.linalg.cython_blas`, `cython_lapack`); called by their address they take
no copy and let other threads run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import LowLevelCallable
from scipy.linalg import cython_blas, cython_lapack
from threadpoolctl import ThreadpoolController

from ww_monitor.spectra.stop import stop_if_told

_LOWER = b"L"
"""What is an upper triangle by rows is a lower one to LAPACK, for which columns come first; with it the solve is the
quicker (on one core 0.77 s at 2048, with the other 0.84, with numpy 0.94)."""

_UNSCALED = (1e-140, 1e140)
"""Largest elements that LAPACK does not scale (dsyevd: 1e-146 to 1e146); that of a Gram matrix is on its diagonal."""

_BLOCK = 32
"""Columns that LAPACK's dsytrd reduces together, for each of which it wants M elements of workspace."""


def add_gram(rows: np.ndarray, gram: np.ndarray) -> None:
    """Add rowsᵀ·rows to the upper triangle of `gram`; the other triangle is left as it is.

    Both are float64: rows `[N, M]` contiguous by rows or by columns, `gram` `[M, M]` by rows.

    Raises:
        ValueError: if an array is of another kind: its memory would be misread.

    >>> gram = np.zeros((2, 2))
    >>> add_gram(np.array([[1.0, 2.0], [3.0, 4.0]]), gram)
    >>> gram
    array([[10., 14.],
           [ 0., 20.]])
    """
    n, m = rows.shape
    _check("add_gram", gram, m)
    by_rows = rows.flags.c_contiguous  # BLAS, for which columns come first, reads these as the transpose
    if rows.dtype != np.float64 or not (by_rows or rows.flags.f_contiguous):
        raise ValueError(f"add_gram: expected float64 rows in one piece, got {rows.dtype}, strides {rows.strides}")
    one = ctypes.byref(ctypes.c_double(1.0))
    _routine(cython_blas, "dsyrk")(
        _LOWER, b"N" if by_rows else b"T", _int(m), _int(n), one, _at(rows), _int(m if by_rows else n), one, _at(gram),
        _int(m),
    )  # fmt: skip


def eigvalsh(gram: np.ndarray, *, with_torch: bool = False) -> np.ndarray:
    """Ascending eigenvalues `[M]` of a Gram matrix, of which the upper triangle is read.

    Args:
        gram: `[M, M]` float64, positive semidefinite, contiguous by rows; overwritten.
        with_torch: Use the LAPACK that torch brings; where it cannot be called, torch's own call of it, which copies.

    Raises:
        numpy.linalg.LinAlgError: if the solver gives up.
        ValueError: if the array is of another kind.

    >>> eigvalsh(np.array([[2.0, 1.0], [0.0, 2.0]]))
    array([1., 3.])
    """
    _check("eigvalsh", gram, len(gram))
    stop_if_told()  # the call of a library cannot be ended
    if not with_torch and _UNSCALED[0] < gram.diagonal().max() < _UNSCALED[1]:
        return _eigvalsh_unscaled(gram)
    solve = _torch_dsyevd() if with_torch else _routine(cython_lapack, "dsyevd")
    if solve is None:
        found: np.ndarray = torch.linalg.eigvalsh(torch.from_numpy(gram), UPLO="U").numpy()
        return found
    m, info, integers = len(gram), ctypes.c_int64(0), np.empty(8, dtype=np.int64)  # one is wanted without vectors
    values, work, size = np.empty(m), np.empty(1), -1
    for integer_size in (-1, len(integers)):  # the first call says which workspace it wants
        solve(
            b"N", _LOWER, _int(m), _at(gram), _int(m), _at(values), _at(work), _int(size), _at(integers),
            _int(integer_size), ctypes.byref(info),
        )  # fmt: skip
        size = int(work[0])
        work = np.empty(size) if integer_size < 0 else work
    if info.value:
        raise np.linalg.LinAlgError(f"dsyevd: gave up with info {info.value}")
    return values


def _eigvalsh_unscaled(gram: np.ndarray) -> np.ndarray:
    """Both steps of dsyevd without its search for the largest element, which takes a twentieth of its time at 768."""
    m, info = len(gram), ctypes.c_int64(0)
    values, off_diagonal, reflectors, work = np.empty(m), np.empty(m), np.empty(m), np.empty(_BLOCK * m)
    _routine(cython_lapack, "dsytrd")(
        _LOWER, _int(m), _at(gram), _int(m), _at(values), _at(off_diagonal), _at(reflectors), _at(work),
        _int(work.size), ctypes.byref(info),
    )  # fmt: skip
    if not info.value:
        _routine(cython_lapack, "dsterf")(_int(m), _at(values), _at(off_diagonal), ctypes.byref(info))
    if info.value:
        raise np.linalg.LinAlgError(f"dsytrd or dsterf: gave up with info {info.value}")
    return values


def sum_of_squares(array: np.ndarray) -> float:
    """Σ a² of a float64 array, by the same threads as the rest: those of another library would go on spinning.

    Raises:
        ValueError: if the array is of another kind.

    >>> sum_of_squares(np.array([[3.0, 4.0]]))
    25.0
    """
    flat, step, dot = array.ravel(order="K"), _int(1), _routine(cython_blas, "ddot", ctypes.c_double)
    if flat.dtype != np.float64:
        raise ValueError(f"sum_of_squares: expected float64, got {flat.dtype}")
    parts = (flat[start : start + (1 << 30)] for start in range(0, flat.size, 1 << 30))  # as many as a call counts
    return float(sum(dot(_int(part.size), _at(part), step, _at(part), step) for part in parts))


def _check(who: str, gram: np.ndarray, m: int) -> None:
    if gram.dtype != np.float64 or gram.shape != (m, m) or not gram.flags.c_contiguous:
        found = f"{gram.dtype} {list(gram.shape)}, strides {gram.strides}"
        raise ValueError(f"{who}: expected a float64 Gram matrix [{m}, {m}] contiguous by rows, got {found}")


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _int(value: int) -> Any:
    """An integer by reference, in 64 bits: a library that takes 32 reads the lower half."""
    return ctypes.byref(ctypes.c_int64(value))


@lru_cache
def _routine(module: ModuleType, name: str, result: Any = None) -> Callable[..., Any]:
    """The routine at the address that SciPy publishes; every argument is a pointer."""
    callable_ = LowLevelCallable.from_cython(module, name)
    # Python's own function is called with its lock, LAPACK's (CFUNCTYPE) without, so that other threads run
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address = pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(callable_.function, callable_.signature.encode())
    return ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * callable_.signature.count("*"))(address)


@lru_cache(maxsize=1)
def on_intel() -> bool:
    """Whether OpenBLAS takes this processor for one of Intel's, by the name of its kernels."""
    kernels = {getattr(library, "architecture", "") for library in ThreadpoolController().lib_controllers}
    return not kernels.isdisjoint({"Haswell", "SkylakeX", "SapphireRapids"})  # AMD's are Zen and Cooperlake to it


def _torch_dsyevd() -> Callable[..., Any] | None:
    """LAPACK's routine in torch's own library, where it can be found there."""
    return of_torch("dsyevd_", None, *[ctypes.c_void_p] * 11)


@lru_cache
def of_torch(name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
    """A function of the libraries that torch is linked with, if it can be found in torch's own file."""
    for library in Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"):
        function = getattr(ctypes.CDLL(str(library)), name, None)  # torch has loaded it: no second copy comes
        if function is not None:
            function.restype, function.argtypes = result, arguments
            return function  # type: ignore[no-any-return]
    return None
