"""The best projection of every rank, when errors are weighted.

Given G = E[xᵀx] [d, d] and weights W [d, d], positive semidefinite and block-diagonal (one block a head), minimise

    E ‖(x − x E D) W^½‖²        over E [d, r], D [r, d]

1. With y = x W^½ this is E ‖y − x E D W^½‖², and x E D W^½ is of rank r.
2. No rank-r approximation of y beats y U Uᵀ, U = top eigenvectors of E[yᵀy] = W^½ G W^½ (Eckart and Young, 1936).
3. E = W^½ U and D = Uᵀ W^−½ reach it: x E D W^½ = y U Uᵀ. For singular W take the pseudo-inverse: eigenvectors with a
   positive eigenvalue lie in the range of W.
4. What remains is the sum of the eigenvalues left out.

W = I gives principal components, the basis of Yu et al. (2024). Only the product E D matters, so the columns of E are
scaled to length 1: what is cached keeps the size of x, also in half precision.

An eigenvalue below d · ε of the largest is rounding and counts as zero. Rank that is left over when G or W has such
eigenvalues goes to the plain error ‖x − x̂‖², so that rank d gives E D = I whatever the calibration text was.
"""

import torch
from torch import Tensor

from .basis import Projection


def directions(gram: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All directions, best first: the first r columns and rows are the best projection of rank r, for every r.

    Parameters
    ----------
    gram : [d, d], symmetric, or Hermitian when x is complex.
    weights : [n, d / n, d / n], the blocks of W, or None for W = I.

    Returns
    -------
    values [d], how much each one takes off the objective; encode [d, d]; decode [d, d].

    >>> values, encode, decode = directions(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.tensor([[[9.0]], [[1.0]]]))
    >>> values, encode[:, 0].abs()
    (tensor([9., 4.]), tensor([1., 0.]))
    """
    if weights is None:
        values, vectors = torch.linalg.eigh(gram)
        vectors = vectors.flip(1)
        return values.flip(0).clamp(min=0), vectors, vectors.mH
    root, inverse = (part.to(gram.dtype) for part in _roots(weights))
    values, vectors = torch.linalg.eigh(root @ gram @ root)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    felt = int((values > _floor(values)).sum())
    encode, decode = root @ vectors[:, :felt], vectors[:, :felt].mH @ inverse  # [d, felt], [felt, d]
    # What is left of x, x (I − E D), is orthogonal to E: its plain principal components fill the basis up.
    unseen = torch.linalg.qr(encode, mode="complete").Q[:, felt:]  # [d, d − felt]
    rest = unseen - encode @ (decode @ unseen)
    _, plain, _ = directions(rest.mH @ gram @ rest)
    values[felt:] = 0
    encode, decode = torch.cat([encode, rest @ plain], 1), torch.cat([decode, (unseen @ plain).mH])
    length = encode.norm(dim=0)
    return values, encode / length, decode * length[:, None]


def best_projection(
    gram: Tensor, rank: int, weights: Tensor | None = None, mean: Tensor | None = None
) -> Projection:
    """The best projection of one rank; `error` is E‖(x − x̂) W^½‖², exactly. Shapes as for `directions`."""
    values, encode, decode = directions(gram, weights)
    return Projection(encode[:, :rank], decode[:rank], mean, float(values[rank:].sum()))


def _roots(weights: Tensor) -> tuple[Tensor, Tensor]:
    """W^½ and its pseudo-inverse, [d, d] each, block by block."""
    values, vectors = torch.linalg.eigh(weights)  # [n, d_h], [n, d_h, d_h]
    root = values.where(values > _floor(values), 0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    return tuple(torch.block_diag(*((vectors * part[:, None]) @ vectors.mT)) for part in (root, inverse))


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Of a positive semidefinite [d, d]; eigenvalues that are rounding stay zero.

    >>> pseudo_inverse(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[0.2500, 0.0000],
            [0.0000, 0.0000]])
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * torch.where(values > _floor(values), 1 / values, 0)) @ vectors.mT


def _floor(values: Tensor) -> Tensor:
    """Eigenvalues up to this are rounding: their number × machine epsilon × the largest."""
    return values.numel() * torch.finfo(values.dtype).eps * values.max().clamp(min=0)
