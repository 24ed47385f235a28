"""The singular value decomposition, cut off at a rank: what is kept, what is lost, what it costs to store.

For an m × n matrix ``A = U diag(s) Vt`` the factors are ``U`` (m × r, orthonormal columns), ``s`` (r numbers,
descending, never negative) and ``Vt`` (r × n, orthonormal rows: the right singular vectors). Leading axes are
a batch.

Signs. A pair (column of U, row of Vt) may be flipped together and the product stays the same. Here the
entry of largest magnitude of every row of ``Vt`` is positive; entries equal to about six digits are a tie,
which the first wins.

Energy is the sum of the squared entries, which is the sum of the squared singular values. These squares are
the eigenvalues of the Gram matrix AᵀA, so the functions about energy take eigenvalues.

The truncation is optimal: Eckart and Young (1936) for the Frobenius norm, Mirsky (1960) for the spectral one.
"""

import operator

import numpy as np


def truncated_svd(matrix, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best approximation of `rank` to `matrix`, as three factors.

    Parameters
    ----------
    matrix : (..., m, n) real numbers. float32 is computed in float32, everything else in float64.
    rank : 0 … min(m, n).

    Returns
    -------
    U (..., m, rank), s (..., rank), Vt (..., rank, n); ``(U * s[..., None, :]) @ Vt`` is the approximation.

    Raises
    ------
    ValueError : NaN, infinity or complex numbers, fewer than two axes, an empty axis, or a rank out of range.

    >>> U, s, Vt = truncated_svd([[3, 0], [4, 0], [0, 2]], rank=1)
    >>> print(s, Vt, (U * s) @ Vt)
    [5.] [[1. 0.]] [[3. 0.]
     [4. 0.]
     [0. 0.]]
    """
    a = _real(matrix, "matrix")
    if a.ndim < 2:
        raise ValueError(f"matrix has shape {a.shape}; it needs two axes or more, (..., m, n)")
    rank = _integer(rank, "rank", 0, min(a.shape[-2:]))
    left, s, right = np.linalg.svd(a, full_matrices=False)
    left, right = fix_signs(left, right)
    return left[..., :rank], s[..., :rank], right[..., :rank, :]


def fix_signs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip pairs of singular vectors until the largest entry of every row of `right` is positive.

    Parameters
    ----------
    left : (..., m, r), one vector a column.
    right : (..., r, n), one vector a row.

    >>> left, right = fix_signs(np.array([[1.0]]), np.array([[0.6, -0.8]]))
    >>> print(left, right)
    [[-1.]] [[-0.6  0.8]]
    """
    size = np.abs(right)
    first = (size >= (1 - 1e-6) * size.max(-1, keepdims=True)).argmax(-1)[..., None]
    sign = np.where(np.take_along_axis(right, first, -1) < 0, -1, 1).astype(right.dtype)
    return left * np.swapaxes(sign, -1, -2), right * sign


def energy(eigenvalues) -> np.ndarray:
    """Share of the energy that rank 0, 1, …, n keeps, given the n eigenvalues of a Gram matrix.

    Parameters
    ----------
    eigenvalues : (..., n) squared singular values in any order: ``s**2`` or ``np.linalg.eigvalsh(A.T @ A)``.
        Rounding leaves tiny negative ones (1e-6 of the largest, 1e-4 in float32); they count as zero.

    Returns
    -------
    (..., n + 1) float64 from 0 to 1, so ``energy(s**2)[r]`` is the share of rank r. A zero matrix has nothing
    to lose: its shares are 1 at every rank, 0 included.

    Raises
    ------
    ValueError : an eigenvalue that is clearly negative, NaN or infinity, or no eigenvalues.

    >>> print(energy([1, 3, 0]))
    [0.   0.75 1.   1.  ]
    """
    found = _real(eigenvalues, "eigenvalues")
    if found.ndim < 1:
        raise ValueError("eigenvalues is one number; it needs one axis or more, (..., n)")
    rounding = 1e-4 if found.dtype == np.float32 else 1e-6
    found = found.astype(np.float64)
    largest = np.abs(found).max(-1, keepdims=True)
    if (found < -rounding * largest).any():
        raise ValueError(f"eigenvalues holds {found.min():.3g}; those of a Gram matrix are never below zero")
    ascending = np.sort(np.clip(found, 0, None), -1) / np.where(largest > 0, largest, 1)
    lost = np.concatenate([np.zeros_like(largest), np.cumsum(ascending, -1)], -1)[..., ::-1]
    return 1 - lost / np.where(lost[..., :1] > 0, lost[..., :1], 1)


def rank_for_energy(eigenvalues, share: float):
    """The smallest rank that keeps `share` of the energy (float64 rounding counts as kept).

    Parameters
    ----------
    eigenvalues : (..., n), as for `energy`.
    share : above 0, up to 1.

    Returns
    -------
    int, or an array of the leading shape.

    >>> rank_for_energy([4, 3, 2, 1], 0.75)
    3
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it should be above 0 and at most 1")
    ranks = (energy(eigenvalues) >= share).argmax(-1)
    return int(ranks) if ranks.ndim == 0 else ranks


def truncation_error(singular_values, rank: int, norm="fro", relative: bool = False):
    """Norm of what the best approximation of `rank` leaves out: Eckart–Young, no approximation formed.

    Parameters
    ----------
    singular_values : (..., k) of the full matrix, descending.
    rank : 0 … k.
    norm : "fro", the root of the summed squares, or 2, the spectral norm (the first singular value left out).
    relative : divide by the same norm of the matrix; the zero matrix gives 0.

    Returns
    -------
    float, or an array of the leading shape.

    >>> print(truncation_error([9, 4, 3], rank=1), truncation_error([9, 4, 3], rank=1, norm=2))
    5.0 4.0
    """
    s = _real(singular_values, "singular_values")
    if s.ndim < 1 or (s < 0).any() or (np.diff(s, axis=-1) > 0).any():
        raise ValueError("singular_values should be (..., k), descending and never negative")
    if norm not in ("fro", 2):
        raise ValueError(f'norm is {norm!r}; it should be "fro" or 2')
    order = None if norm == "fro" else np.inf
    largest = s[..., :1]
    s = s / np.where(largest > 0, largest, 1)  # squares of very large or small numbers would leave the range
    left_out = s[..., _integer(rank, "rank", 0, s.shape[-1]) :]
    lost = np.linalg.norm(np.append(left_out, 0 * largest, -1), ord=order, axis=-1)
    if not relative:
        return lost * largest[..., 0]
    whole = np.linalg.norm(s, ord=order, axis=-1)
    return lost / np.where(whole > 0, whole, 1)


def stored_numbers(rows: int, columns: int, rank: int, folded: bool = False) -> int:
    """How many numbers the factors of one rows × columns matrix hold.

    Parameters
    ----------
    folded : False for U, s and Vt, rank · (rows + columns + 1); True when s is multiplied into one of the
        others, rank · (rows + columns).

    >>> stored_numbers(3, 3, rank=2)
    14
    """
    rows, columns = _integer(rows, "rows", 1), _integer(columns, "columns", 1)
    rank = _integer(rank, "rank", 0, min(rows, columns))
    return rank * (rows + columns + (not folded))


def break_even_rank(rows: int, columns: int, folded: bool = False) -> int:
    """The largest rank whose factors hold fewer numbers than the matrix itself.

    >>> break_even_rank(3, 3), break_even_rank(4096, 128), break_even_rank(1, 5)
    (1, 124, 0)
    """
    each = stored_numbers(rows, columns, 1, folded)
    return (rows * columns - 1) // each


def _real(values, name: str) -> np.ndarray:
    found = np.asarray(values)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {found.dtype} entries; they should be real numbers")
    if found.size == 0:
        raise ValueError(f"{name} is empty, its shape is {found.shape}; every axis needs length 1 or more")
    if found.dtype != np.float32:
        found = found.astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinity; every entry should be finite")
    return found


def _integer(value, name: str, low: int, high: int | None = None) -> int:
    legal = f"{low} or more" if high is None else f"{low} to {high}"
    try:
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it should be a whole number, {legal}") from None
    if found < low or (high is not None and found > high):
        raise ValueError(f"{name} is {found}; it should be {legal}")
    return found
