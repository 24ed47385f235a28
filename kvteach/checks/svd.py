"""Checks of chapter 1: energy, truncation, storage, and the basis that a cache keeps."""

import numpy as np

from . import Mistake, array, check, expect, number

__all__ = ["basis", "energy_kept", "largest_rank", "truncate"]


@check("Exercise 1.1")
def energy_kept(answer):
    """``answer(s, r)`` -> share of the energy that the first r of the singular values `s` keep."""
    s = np.array([4.0, 2.0, 2.0, 1.0])
    value = number(answer(s.copy(), 2), "energy_kept(s, 2)")
    mistakes = {
        6 / 9: "this adds the singular values themselves: energy is the sum of their squares",
        3 / 9: "this is a share of the singular values, and of the lost ones: square them, keep the first r",
        5 / 25: "this is the share that is lost: the first r values are the ones kept",
        80: "this is a percentage: give the share, from 0 to 1",
        20: "this is the energy kept: divide it by the energy of all singular values",
        np.sqrt(0.8): "no square root: that is the share of the norm, not of the energy",
        16 / 25: "this keeps one value, not two: s[:r] has r of them",
        24 / 25: "this keeps three values, not two: s[:r] has r of them",
    }
    for wrong, sentence in mistakes.items():
        expect(not np.isclose(value, wrong), sentence)
    expect(
        np.isclose(value, 0.8), f"for s = [4, 2, 2, 1] and r = 2 it is 20/25 = 0.8, yours says {value:.4g}"
    )
    value = number(answer(s.copy(), 4), "energy_kept(s, 4)")
    expect(np.isclose(value, 1), f"all four values keep everything: 1, yours says {value:.4g}")


@check("Exercise 1.2")
def truncate(answer):
    """``answer(A, r)`` -> the best rank-r approximation of A, of the shape of A."""
    for shape in ((4, 4), (6, 4)):
        A = np.random.default_rng(1).standard_normal(shape)
        U, s, Vt = np.linalg.svd(A, full_matrices=False)
        name = f"truncate(A, 2) for A of shape {shape}"
        vector = "s is a vector: U * s multiplies the columns of U, and np.diag(s) makes a matrix of it"
        try:
            found = answer(A.copy(), 2)
        except ValueError as error:
            raise Mistake(
                f"the shapes do not fit. U needs r columns and Vᵀ r rows, and {vector}. NumPy says: {error}"
            ) from None
        expect(
            not isinstance(found, tuple | list), f"{name} is a {type(found).__name__}: multiply the factors"
        )
        expect(np.ndim(found) != 1, f"{name} is a vector, it should have shape {shape}. {vector}")
        rows = np.ndim(found) == 2 and np.shape(found)[0] == 2
        expect(not rows, f"{name} has 2 rows: keep all rows of U and its first r columns, U[:, :r]")
        found = array(found, shape, name)
        mistakes = {
            "this is A itself: keep r columns of U, r values and r rows of Vᵀ": [A],
            "this uses V where Vᵀ belongs: np.linalg.svd returns Vᵀ, so take its first r rows": [
                (U[:, :2] * s[:2]) @ Vt[:, :2].T,
                (U[:, :2] * s[:2]) @ Vt.T[:2],
            ],
            "the singular values are missing: multiply the columns of U by them": [U[:, :2] @ Vt[:2]],
            "this multiplies the columns of Vᵀ by the singular values: multiply its rows, s[:r, None] * Vt[:r]": [
                U[:, :2] @ (s * Vt)[:2]
            ],
            "this keeps the smallest values: take the first r": [(U[:, 2:] * s[2:]) @ Vt[2:]],
            "this cuts rows or columns of A: cut the factors instead": [
                A * (np.arange(shape[0]) < 2)[:, None],
                A * (np.arange(4) < 2),
            ],
        }
        for sentence, wrong in mistakes.items():
            expect(not any(np.allclose(found, one) for one in wrong), sentence)
        error, best = np.linalg.norm(A - found), np.linalg.norm(s[2:])
        right = np.allclose(found, (U[:, :2] * s[:2]) @ Vt[:2])
        expect(right, f"{name} is off by {error:.3f} (Frobenius), the best rank 2 by {best:.3f}")


@check("Exercise 1.3")
def largest_rank(answer):
    """``answer(m, n)`` -> the largest rank whose U, s and Vᵀ hold fewer numbers than an m × n matrix."""
    value = number(answer(49, 29), "largest_rank(49, 29)")
    expect(value == int(value), f"largest_rank(49, 29) is {value:.4g}: a rank is whole, so round down")
    mistakes = {
        18: "18 · (49 + 29 + 1) = 1422 numbers exceed 1421: count the r singular values too, and round down",
        16: "17 · (49 + 29 + 1) = 1343 numbers are fewer than 1421, so rank 17 still saves: "
        "take one off only when m · n is a multiple of m + n + 1",
        15: "this stores Σ as an r × r matrix: its diagonal, r numbers, is enough",
        11: "this stores all n × n numbers of Vᵀ: only its first r rows are needed",
        29: "this is the largest rank there is: compare what is stored with m · n",
        1: "rank 1 is not the largest: r · (m + n + 1) < m · n still holds for larger r",
    }
    expect(value not in mistakes, mistakes.get(value, ""))
    expect(value == 17, f"largest_rank(49, 29) is 17: 17 · 79 = 1343 < 1421, yours says {value:g}")
    value = number(answer(5, 4), "largest_rank(5, 4)")
    expect(
        value != 2, "rank 2 of a 5 × 4 matrix stores 20 numbers, as many as the matrix: it must store fewer"
    )
    expect(value == 1, f"largest_rank(5, 4) is 1, yours says {value:g}")
    value = number(answer(2, 2), "largest_rank(2, 2)")
    expect(value == 0, f"no rank of a 2 × 2 matrix saves anything, so 0, yours says {value:g}")


@check("Exercise 1.4")
def basis(answer):
    """``answer(K, r)`` -> Ψ (r × D): the top r right singular vectors of K, in any order, any sign."""
    K = np.random.default_rng(2).standard_normal((50, 4)) * [3.0, 1.0, 2.0, 0.5]
    K += [0.0, 4.0, 0.0, 4.0]  # a mean, so that taking it out is seen
    Vt = np.linalg.svd(K, full_matrices=False)[2]
    vectors = np.linalg.eigh(K.T @ K)[1]
    found = answer(K.copy(), 2)
    shape = np.shape(found)
    expect(
        shape != (4, 2),
        "basis(K, 2) has shape (4, 2): eigenvectors are columns, transpose them into rows",
    )
    expect(shape != (2, 50), "basis(K, 2) has 50 columns: use the small matrix KᵀK, not KKᵀ")
    found = array(found, (2, 4), "basis(K, 2)")

    def same(wrong):
        return np.allclose(np.abs(found), np.abs(wrong)) or np.allclose(np.abs(found), np.abs(wrong[::-1]))

    expect(
        not same(Vt[2:]),
        "these belong to the smallest eigenvalues: np.linalg.eigh sorts upwards, so take the last r",
    )
    centred = np.linalg.eigh(np.cov(K.T))[1][:, ::-1].T
    expect(
        not same(centred[:2]),
        "this takes the mean out first, as np.cov does: use KᵀK, the mean is part of what a cache stores",
    )
    rows = same(vectors[:2]) or same(vectors[2:])
    expect(not rows, "these are rows of the matrix of eigenvectors: each of its columns is one eigenvector")
    lengths = np.linalg.norm(found, axis=1)
    expect(
        np.allclose(lengths, 1),
        f"rows should have length 1, yours have {lengths[0]:.3f} and {lengths[1]:.3f}",
    )
    expect(np.allclose(found @ found.T, np.eye(2)), "the two rows should be orthogonal")
    kept, best = np.linalg.norm(K @ found.T) ** 2, np.linalg.norm(K @ Vt[:2].T) ** 2
    right = np.isclose(kept, best)
    expect(
        right, f"KΨᵀ keeps {kept / np.sum(K**2):.3f} of the energy, the best basis {best / np.sum(K**2):.3f}"
    )
