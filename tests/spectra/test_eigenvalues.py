"""Eigenvalues are the squared singular values, or there is a status that says why not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stand_in import use_stand_in
from ww_monitor.spectra import host
from ww_monitor.spectra.eigenvalues import eigenvalues
from ww_monitor.spectra.status import Status

SHAPES = [(1, 1, 1), (1, 8, 8), (3, 50, 20), (2, 20, 50), (1, 1, 7), (2, 7, 1), (1, 200, 150), (5, 9, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_svd(matrices):
    """The slow twin: squared singular values in float64, ascending."""
    return torch.from_numpy(np.linalg.svd(matrices.double().numpy(), compute_uv=False)[:, ::-1].copy() ** 2)


def assert_same_spectrum(found, expected, tolerance=1e-13):
    """Equal to `tolerance` of each row's largest eigenvalue."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    worst = ((found - expected).abs().amax(1) / expected[:, -1]).max()
    assert worst <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_squared_singular_values(shape, dtype):
    matrices = draw(*shape, dtype=dtype)
    before = matrices.clone()
    solved = eigenvalues(matrices)
    assert_same_spectrum(solved.values, by_svd(matrices))
    assert solved.status.tolist() == [Status.OK] * shape[0]
    torch.testing.assert_close(solved.frobenius_sq, matrices.double().square().sum((1, 2)), rtol=1e-13, atol=0)
    assert torch.equal(matrices, before)


def test_spectra_ascend_and_are_never_negative():
    rank_one = torch.ones(1, 40, 30) * torch.linspace(1, 2, 30)
    values = eigenvalues(rank_one).values
    assert (values.diff(dim=1) >= 0).all()
    assert (values >= 0).all()


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    exponent=st.integers(-40, 40),
)
def test_scale_multiplies_by_its_square_and_permutation_and_transpose_change_nothing(seed, rows, columns, exponent):
    matrices = draw(2, rows, columns, seed=seed)
    expected = eigenvalues(matrices).values
    scale = 1.7 * 10.0 ** (exponent / 4)
    generator = torch.Generator().manual_seed(seed)
    shuffled = matrices[:, torch.randperm(rows, generator=generator)][
        :, :, torch.randperm(columns, generator=generator)
    ]
    assert_same_spectrum(eigenvalues(scale * matrices).values / scale**2, expected)
    assert_same_spectrum(eigenvalues(shuffled).values, expected)
    assert_same_spectrum(eigenvalues(matrices.mT).values, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_path_equals_the_host_path(dtype):
    """The batched solve that a GPU runs, here on CPU tensors."""
    matrices = draw(4, 60, 25, dtype=dtype)
    on_host, on_device = eigenvalues(matrices), as_on_device(matrices)
    assert_same_spectrum(on_device.values, on_host.values)
    torch.testing.assert_close(on_device.frobenius_sq, on_host.frobenius_sq, rtol=1e-13, atol=0)
    assert torch.equal(on_device.status, on_host.status)


def as_on_device(matrices):
    """The path of a device, on whatever device the matrices are."""
    with pytest.MonkeyPatch.context() as patch:
        use_stand_in(patch)
        return eigenvalues(matrices)


@pytest.mark.parametrize("solve", [eigenvalues, as_on_device])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_matrix_leaves_its_neighbours_bit_identical(solve, bad):
    matrices = draw(3, 30, 20)
    clean = solve(matrices)
    matrices[1, 4, 5] = bad
    solved = solve(matrices)
    assert solved.status.tolist() == [Status.OK, Status.NOT_FINITE, Status.OK]
    assert solved.values[1].isnan().all()
    assert torch.equal(solved.values[[0, 2]], clean.values[[0, 2]])


@pytest.mark.parametrize("rows", [(1 << 18) // 20, (1 << 18) // 20 + 1, 30_000])
def test_gram_matrix_summed_in_chunks_is_the_same(rows):
    """In one of 2 MiB and in more, the last of them of one row or of many."""
    matrices = draw(2, rows, 20, dtype=torch.float32)
    whole, found = matrices.double(), eigenvalues(matrices)
    assert_same_spectrum(found.values, torch.linalg.eigvalsh(whole.mT @ whole))
    torch.testing.assert_close(found.frobenius_sq, whole.square().sum((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("sides", [(256, 2048), (256, 257), (640, 1024)], ids=["SciPy", "torch above", "torch below"])
def test_what_is_solved_in_place_is_what_numpy_gives(monkeypatch, sides, library):
    matrices = draw(3, 280, 260)
    by_numpy = torch.from_numpy(np.linalg.eigvalsh((matrices.mT @ matrices).numpy()))
    monkeypatch.setattr(host, "_SCIPY_SIDES", sides)
    monkeypatch.setattr(host, "_SCIPY_SIDES_ON_INTEL", sides)
    monkeypatch.setattr(np.linalg, "eigvalsh", None)
    assert_same_spectrum(eigenvalues(matrices, library=library).values, by_numpy)


@pytest.mark.parametrize("intel", [True, False])
def test_the_processor_decides_which_solver_a_side_gets(monkeypatch, intel):
    monkeypatch.setattr(host.lapack, "on_intel", lambda: intel)
    solve, asked = host.lapack.eigvalsh, []

    def noted(gram, *, with_torch):
        asked.append((len(gram), with_torch))
        return solve(gram, with_torch=with_torch)

    monkeypatch.setattr(host.lapack, "eigvalsh", noted)
    for side in (40, 300, 700, 1100):
        eigenvalues(draw(1, side, side))
    assert asked == ([(700, False), (1100, True)] if intel else [(300, False), (700, False), (1100, False)])


@pytest.mark.parametrize("side", [40, 300])
def test_a_matrix_has_the_same_bits_alone_and_beside_others(side):
    matrices = draw(3, 320, side).float()
    together = eigenvalues(matrices).values
    for b in range(3):
        assert torch.equal(eigenvalues(matrices[b : b + 1]).values[0], together[b])


def with_entries(matrices, *values):
    changed = matrices.clone()
    changed[0, 3, : len(values)] = torch.tensor(values, dtype=changed.dtype)
    return changed


CASES = {
    "one NaN": (lambda w: with_entries(w, float("nan")), Status.NOT_FINITE),
    "one Inf": (lambda w: with_entries(w, float("inf")), Status.NOT_FINITE),
    "both infinities": (lambda w: with_entries(w, float("inf"), -float("inf")), Status.NOT_FINITE),
    "squares overflow": (lambda w: w * 1e200, Status.NOT_FINITE),
    "zero": (lambda w: w * 0, Status.ZERO),
    "squares underflow": (lambda w: w * 1e-160, Status.ZERO),
    "subnormal": (lambda w: w * 1e-310, Status.ZERO),
    "small": (lambda w: w * 1e-60, Status.OK),
    "float32 subnormal": (lambda w: (w * 1e-40).float(), Status.OK),
    "large": (lambda w: w * 1e60, Status.OK),
    "rank one": (lambda w: w[:, :1] * torch.ones(1, 30, 1, dtype=w.dtype), Status.OK),
}


@pytest.mark.parametrize("solve", [eigenvalues, as_on_device])
@pytest.mark.parametrize(("change", "status"), CASES.values(), ids=CASES)
def test_status_says_why_there_is_no_spectrum(solve, change, status):
    matrices = change(draw(1, 30, 20))
    solved = solve(matrices)
    assert solved.status.tolist() == [status]
    if status == Status.OK:
        assert_same_spectrum(solved.values, by_svd(matrices))
    else:
        assert solved.values.isnan().all()


def returns_diagonal(gram):
    return torch.from_numpy(np.sort(np.diag(gram)))


def returns_trace_in_one(gram):
    values = np.zeros(len(gram))
    values[-1] = np.trace(gram)
    return torch.from_numpy(values)


def returns_nan(gram):
    return torch.full((len(gram),), float("nan"), dtype=torch.float64)


def returns_slightly_large(gram):
    return (1 + 1e-10) * torch.from_numpy(np.linalg.eigvalsh(gram))


def raises(gram):
    raise np.linalg.LinAlgError("did not converge")


BAD_SOLVERS = [returns_diagonal, returns_trace_in_one, returns_nan, returns_slightly_large, raises]


@pytest.mark.parametrize("solver", BAD_SOLVERS, ids=lambda f: f.__name__)
def test_a_solver_that_lies_is_caught_by_the_moments(monkeypatch, solver):
    monkeypatch.setattr(host, "_lapack", lambda grams, library: np.stack([solver(gram) for gram in grams]))
    solved = eigenvalues(draw(2, 30, 20))
    assert solved.status.tolist() == [Status.SOLVER_FAILED] * 2
    assert solved.values.isnan().all()


@pytest.mark.parametrize("solver", BAD_SOLVERS[:4], ids=lambda f: f.__name__)
def test_a_device_solver_that_lies_is_caught_by_the_moments(monkeypatch, solver):
    use_stand_in(monkeypatch, solve=lambda grams: torch.stack([solver(gram) for gram in grams.numpy()]))
    solved = eigenvalues(draw(2, 30, 20))
    assert solved.status.tolist() == [Status.SOLVER_FAILED] * 2
    assert solved.values.isnan().all()


def planted(singular):
    """40 × n with these singular values."""
    n = len(singular)
    u, v = torch.linalg.qr(draw(40, n, seed=1)).Q, torch.linalg.qr(draw(n, n, seed=2)).Q
    return ((u * singular) @ v.mT)[None]


def test_resolve_small_makes_small_eigenvalues_good_to_their_own_size():
    singular = torch.logspace(-7, 0, 15, dtype=torch.float64)
    resolved = eigenvalues(planted(singular), resolve_small=True).values[0]
    blurred = eigenvalues(planted(singular)).values[0]
    torch.testing.assert_close(resolved, singular.square(), rtol=1e-7, atol=0)
    assert (blurred[0] / singular[0].square() - 1).abs() > 1e-6
    torch.testing.assert_close(blurred, singular.square(), rtol=0, atol=1e-14)


def test_resolve_small_leaves_rows_alone_that_need_it_not():
    singular = torch.logspace(-7, 0, 15, dtype=torch.float64)
    matrices = torch.cat([draw(1, 40, 15), planted(singular), draw(1, 40, 15) * float("nan"), draw(1, 40, 15) * 0])
    plain, resolved = eigenvalues(matrices), eigenvalues(matrices, resolve_small=True)
    assert torch.equal(plain.values[0], resolved.values[0])
    assert not torch.equal(plain.values[1], resolved.values[1])
    assert resolved.values[2:].isnan().all()
    assert torch.equal(plain.status, resolved.status)


@pytest.mark.parametrize("shape", [(3, 4), (1, 0, 4), (1, 4, 0), (1, 2, 3, 4)], ids=str)
def test_shapes_that_are_no_batch_of_matrices_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected non-empty matrices \[B, N, M\], got shape"):
        eigenvalues(torch.ones(shape))


def test_an_empty_batch_gives_an_empty_result():
    assert eigenvalues(torch.ones(0, 5, 3)).values.shape == (0, 3)
