"""The routines that are called in place give what numpy gives, and refuse what they would misread."""

import numpy as np
import pytest
import torch

from ww_monitor.spectra import lapack

SIDES = [1, 2, 3, 31, 64, 200]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("m", SIDES)
def test_a_gram_matrix_is_added_to_its_upper_triangle(m, order):
    gram, parts = np.tril(draw(m, m, seed=1), -1), [draw(n, m, seed=n) for n in (m, 1, 2 * m + 5)]
    below = gram.copy()
    for part in parts:
        lapack.add_gram(np.asarray(part, order=order), gram)
    w = np.concatenate(parts)
    np.testing.assert_allclose(np.triu(gram), np.triu(w.T @ w), rtol=1e-13, atol=1e-13 * len(w))
    np.testing.assert_array_equal(np.tril(gram, -1), below)


@pytest.mark.parametrize("with_torch", [False, True])
@pytest.mark.parametrize("m", SIDES)
def test_eigenvalues_are_those_of_the_upper_triangle(m, with_torch):
    w = draw(m + 10, m)
    gram = w.T @ w
    upper = np.triu(gram) + np.tril(np.full((m, m), 7.0), -1)
    np.testing.assert_allclose(lapack.eigvalsh(upper, with_torch=with_torch), np.linalg.eigvalsh(gram), rtol=1e-11)


@pytest.mark.parametrize("m", SIDES)
def test_the_two_steps_are_the_driver_to_the_bit(m, monkeypatch):
    gram = draw(m + 10, m).T @ draw(m + 10, m)
    found = lapack.eigvalsh(gram.copy())
    monkeypatch.setattr(lapack, "_UNSCALED", (float("inf"), 0.0))
    np.testing.assert_array_equal(found, lapack.eigvalsh(gram.copy()))


@pytest.mark.parametrize("scale", [1e-200, 1e-147, 1e-139, 1e139, 1e147, 1e200])
def test_a_scale_at_which_products_leave_the_range_is_no_matter(scale):
    w = draw(60, 50)
    gram = w.T @ w
    np.testing.assert_allclose(lapack.eigvalsh(gram * scale), np.linalg.eigvalsh(gram) * scale, rtol=1e-11)


@pytest.mark.parametrize("with_torch", [False, True])
def test_a_solve_takes_no_second_matrix(with_torch):
    """What numpy and torch allocate for a copy is seen as a matrix that is left as it was."""
    gram = draw(50, 50)
    before = gram.copy()
    lapack.eigvalsh(gram, with_torch=with_torch)
    assert not np.array_equal(np.triu(gram), np.triu(before))


def test_torch_solves_itself_where_its_lapack_cannot_be_called(monkeypatch):
    monkeypatch.setattr(lapack, "_torch_dsyevd", lambda: None)
    gram = np.triu(draw(40, 30).T @ draw(40, 30))
    expected = torch.linalg.eigvalsh(torch.from_numpy(gram), UPLO="U").numpy()
    np.testing.assert_array_equal(lapack.eigvalsh(gram, with_torch=True), expected)


@pytest.mark.parametrize(
    "rows", [draw(6, 4).astype(np.float32), draw(12, 8)[::2, ::2]], ids=["float32", "not in one piece"]
)
def test_rows_that_would_be_misread_are_refused(rows):
    with pytest.raises(ValueError, match="add_gram: expected float64 rows in one piece"):
        lapack.add_gram(rows, np.zeros((4, 4)))


@pytest.mark.parametrize(
    "gram",
    [np.zeros((4, 4), np.float32), np.zeros((8, 8))[::2, ::2], np.zeros((3, 3)), np.asfortranarray(draw(4, 4))],
    ids=["float32", "not in one piece", "too small", "by columns"],
)
def test_a_gram_matrix_that_would_be_misread_is_refused(gram):
    with pytest.raises(ValueError, match=r"add_gram: expected a float64 Gram matrix \[4, 4\]"):
        lapack.add_gram(draw(6, 4), gram)
    if gram.shape == (4, 4):
        with pytest.raises(ValueError, match="eigvalsh: expected a float64 Gram matrix"):
            lapack.eigvalsh(gram)
