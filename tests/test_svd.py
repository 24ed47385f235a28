"""Truncated SVD, energy, error and storage against their definitions."""

import doctest
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvteach import svd

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 12)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def rebuild(factors):
    U, s, Vt = factors
    return (U * s[..., None, :]) @ Vt


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1.0, 1e200])
def test_scale_does_not_matter(scale):
    s = np.array([4.0, 2.0, 1.0])
    assert np.isclose(svd.truncation_error(scale * s, 1), scale * 5**0.5)
    assert np.isclose(svd.truncation_error(scale * s, 1, relative=True), (5 / 21) ** 0.5)
    if scale < 1e100:  # squares of 1e200 have no float64
        eigenvalues = (scale**0.5 * s) ** 2
        assert np.allclose(svd.energy(eigenvalues), [0, 16 / 21, 20 / 21, 1])
        assert svd.rank_for_energy(eigenvalues, 0.9) == 2


def test_docstrings():
    result = doctest.testmod(svd)
    assert result.attempted >= 8
    assert result.failed == 0


def test_imports_numpy_only():
    code = "import sys, kvteach.svd; print([m for m in ('torch', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@given(seeds, sides, sides)
def test_full_rank_rebuilds_and_factors_are_orthonormal(seed, m, n):
    A = random(seed, m, n)
    U, s, Vt = svd.truncated_svd(A, min(m, n))
    np.testing.assert_allclose(rebuild((U, s, Vt)), A, atol=1e-12)
    np.testing.assert_allclose(U.T @ U, np.eye(min(m, n)), atol=1e-12)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(min(m, n)), atol=1e-12)
    assert (np.diff(s) <= 0).all()


@given(seeds, sides, sides, st.data())
def test_truncation_error_is_the_error_and_no_competitor_beats_it(seed, m, n, data):
    A = random(seed, m, n)
    rank = data.draw(st.integers(0, min(m, n)))
    factors = svd.truncated_svd(A, rank)
    best = rebuild(factors)
    s = np.linalg.svd(A, compute_uv=False)
    for norm in ("fro", 2):
        promised = svd.truncation_error(s, rank, norm)
        np.testing.assert_allclose(promised, np.linalg.norm(A - best, norm), atol=1e-12)
        np.testing.assert_allclose(
            svd.truncation_error(s, rank, norm, relative=True), promised / np.linalg.norm(A, norm), atol=1e-12
        )
        unrelated = random(seed + 1, m, rank) @ random(seed + 2, rank, n)
        nearby = (factors[0] + 1e-2 * random(seed + 3, m, rank)) * factors[1] @ factors[2]
        for competitor in (unrelated, nearby):
            assert promised <= np.linalg.norm(A - competitor, norm) + 1e-12


@given(seeds, sides, sides, st.integers(0, 2**12 - 1))
def test_signs_do_not_depend_on_the_signs_that_came_in(seed, m, n, bits):
    U, s, Vt = svd.truncated_svd(random(seed, m, n), min(m, n))
    flips = np.array([1 if bits >> k & 1 else -1 for k in range(len(s))])
    left, right = svd.fix_signs(U * flips, Vt * flips[:, None])
    np.testing.assert_array_equal(left, U)
    np.testing.assert_array_equal(right, Vt)
    assert (Vt[np.arange(len(s)), np.abs(Vt).argmax(1)] > 0).all()


def test_ties_go_to_the_first_entry():
    tie = np.array([[-1.0, 1.0 + 1e-12, 0.0]]) / np.sqrt(2)
    _, right = svd.fix_signs(np.ones((1, 1)), tie)
    assert right[0, 0] > 0
    _, right = svd.fix_signs(np.ones((1, 1)), np.array([[-1.0, 1.1, 0.0]]))
    assert right[0, 0] < 0


def test_the_gram_route_gives_the_same_right_vectors():
    A = random(0, 200, 6)
    values, vectors = np.linalg.eigh(A.T @ A)
    _, right = svd.fix_signs(np.zeros((1, 6)), vectors[:, ::-1].T)
    _, s, Vt = svd.truncated_svd(A, 6)
    np.testing.assert_allclose(values[::-1], s**2)
    np.testing.assert_allclose(right, Vt, atol=1e-10)


def test_batches_are_matrices_side_by_side():
    A = random(1, 2, 3, 5, 4)
    U, s, Vt = svd.truncated_svd(A, 2)
    assert (U.shape, s.shape, Vt.shape) == ((2, 3, 5, 2), (2, 3, 2), (2, 3, 2, 4))
    for one, whole in zip(svd.truncated_svd(A[1, 2], 2), (U, s, Vt), strict=True):
        np.testing.assert_allclose(one, whole[1, 2], atol=1e-12)
    squares = np.linalg.svd(A, compute_uv=False) ** 2
    assert svd.energy(squares).shape == (2, 3, 5)
    ranks = svd.rank_for_energy(squares, 0.9)
    assert ranks.shape == (2, 3)
    assert ranks[1, 2] == svd.rank_for_energy(squares[1, 2], 0.9)
    assert svd.truncation_error(np.sqrt(squares), 1).shape == (2, 3)


@pytest.mark.parametrize(
    "dtype, expected", [(np.float32, np.float32), (np.float16, np.float64), (np.int64, np.float64)]
)
def test_precision_of_the_factors(dtype, expected):
    factors = svd.truncated_svd(np.arange(6).reshape(2, 3).astype(dtype), 2)
    assert {f.dtype for f in factors} == {np.dtype(expected)}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0.01, 1))
def test_energy_and_the_smallest_rank_for_it(eigenvalues, share):
    kept = svd.energy(eigenvalues)
    assert len(kept) == len(eigenvalues) + 1
    assert (np.diff(kept) >= 0).all()
    assert kept[-1] == 1
    np.testing.assert_array_equal(kept, svd.energy(eigenvalues[::-1]))
    rank = svd.rank_for_energy(eigenvalues, share)
    assert kept[rank] >= share
    assert rank == 0 or kept[rank - 1] < share


@given(seeds, sides, sides)
def test_energy_is_what_the_truncation_keeps(seed, m, n):
    A = random(seed, m, n)
    s = np.linalg.svd(A, compute_uv=False)
    for rank, share in enumerate(svd.energy(s**2)):
        kept = np.linalg.norm(rebuild(svd.truncated_svd(A, rank))) ** 2
        assert share == pytest.approx(kept / np.linalg.norm(A) ** 2, abs=1e-12)


def test_zero_matrix_has_nothing_to_lose():
    U, s, Vt = svd.truncated_svd(np.zeros((3, 2)), 1)
    np.testing.assert_array_equal(rebuild((U, s, Vt)), np.zeros((3, 2)))
    np.testing.assert_array_equal(svd.energy([0.0, 0.0]), [1, 1, 1])
    assert svd.rank_for_energy([0.0, 0.0], 1) == 0
    assert svd.truncation_error([0.0, 0.0], 1, relative=True) == 0
    np.testing.assert_array_equal(svd.energy([[0, 0], [3, 1]]), [[1, 1, 1], [0, 0.75, 1]])


def test_energy_forgives_rounding_and_refuses_negatives():
    assert svd.energy([1.0, -1e-9])[1] == 1
    assert svd.energy(np.array([1.0, -5e-5], dtype=np.float32))[1] == 1
    with pytest.raises(ValueError, match=r"eigenvalues holds -0\.1"):
        svd.energy([1.0, -0.1])
    with pytest.raises(ValueError, match="never below zero"):
        svd.energy([1.0, -5e-5])


@given(sides, sides, st.booleans())
def test_stored_numbers_and_break_even(m, n, folded):
    for rank in range(min(m, n) + 1):
        factors = svd.truncated_svd(np.ones((m, n)), rank)
        count = sum(f.size for f in factors) - (rank if folded else 0)
        assert svd.stored_numbers(m, n, rank, folded) == count
        assert (count < m * n) == (rank <= svd.break_even_rank(m, n, folded))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: svd.truncated_svd([1.0, 2.0], 1), "matrix has shape"),
        (lambda: svd.truncated_svd(np.zeros((0, 3)), 0), "matrix is empty"),
        (lambda: svd.truncated_svd([[np.nan]], 1), "matrix holds NaN"),
        (lambda: svd.truncated_svd([[np.inf]], 1), "matrix holds NaN or infinity"),
        (lambda: svd.truncated_svd([[1j]], 1), "real numbers"),
        (lambda: svd.truncated_svd(np.eye(2), 3), "rank is 3; it should be 0 to 2"),
        (lambda: svd.truncated_svd(np.eye(2), -1), "rank is -1; it should be 0 to 2"),
        (lambda: svd.truncated_svd(np.eye(2), 1.5), "rank is 1.5; it should be a whole number, 0 to 2"),
        (lambda: svd.energy([]), "eigenvalues is empty"),
        (lambda: svd.energy(3.0), "eigenvalues is one number"),
        (lambda: svd.energy([np.nan]), "eigenvalues holds NaN"),
        (lambda: svd.rank_for_energy([1.0], 0), "share is 0; it should be above 0 and at most 1"),
        (lambda: svd.rank_for_energy([1.0], 90), "share is 90"),
        (lambda: svd.truncation_error([1.0, 2.0], 1), "descending"),
        (lambda: svd.truncation_error([1.0, -2.0], 1), "never negative"),
        (lambda: svd.truncation_error([1.0], 2), "rank is 2; it should be 0 to 1"),
        (lambda: svd.truncation_error([1.0], 1, norm="nuc"), "norm is 'nuc'"),
        (lambda: svd.stored_numbers(0, 3, 0), "rows is 0; it should be 1 or more"),
        (lambda: svd.stored_numbers(3, 3, 4), "rank is 4; it should be 0 to 3"),
        (lambda: svd.break_even_rank(3, 0), "columns is 0"),
    ],
)
def test_refusals_name_the_field_and_the_legal_values(call, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call()
