"""Mean after alignment: each head is turned until all agree as well as they can, then they are pooled.

    c = (x_1 R_1 + … + x_n R_n) / n            x̂_i = c R_iᵀ            R_i orthogonal [d_h, d_h]

A turn costs nothing: W_Q and W_O of head i absorb it. It maximises Σ_ij tr R_iᵀ G_ij R_j, where G_ij = E[x_iᵀ x_j]:
generalised orthogonal Procrustes. One R_i at a time has an exact solution, the polar factor of Σ_{j≠i} G_ij R_j
(Schönemann, 1966), so the objective climbs with every step; for two heads the first step is the global optimum, for
more heads the end is a local one. Keys under RoPE may only turn within a frequency, by one angle each (arXiv
2412.20677, which aligns heads before merging them): the same maths with complex 1 × 1 matrices, see `pairs`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import Moments
from .basis import Basis, Projection, check_group, lost, second_moment
from .pairs import complex_gram, real_encoder


def procrustes(
    moments: Moments, layer: int, heads: Sequence[int], key_rank: int, value_rank: int, centred: bool = False
) -> Basis:
    """Mean of the aligned heads; both ranks are d_h.

    `error` is E‖x − x̂‖² per token, of cached keys and of values. Centred, deviations from each head's mean are
    aligned and pooled. ValueError as for `kvteach.bases.basis.check_group`.
    """
    heads = check_group(moments, heads, "procrustes", key_rank=key_rank, value_rank=value_rank)
    n, d_h = len(heads), moments.source.head_dim

    def side(kind: str, rotates: bool) -> Projection:
        gram, mean = second_moment(moments, kind, layer, heads, centred)
        frequencies = torch.arange(d_h // 2) if rotates else None
        if rotates:
            turns = align(complex_gram(gram, n), n)  # [d_h / 2, n, 1, 1]
            turned = real_encoder(turns[..., 0, 0], frequencies, d_h // 2)  # [n · d_h, d_h]
        else:
            turned = align(gram, n).flatten(0, 1)
        return Projection(turned / n, turned.T, mean, lost(gram, turned / n, turned.T), frequencies)

    return Basis(side("keys_post", moments.source.rotates), side("values", False))


def align(gram: Tensor, n: int, sweeps: int = 200) -> Tensor:
    """Orthogonal (unitary) matrices that turn n heads to one another; the first head stays as it is.

    Parameters
    ----------
    gram : [..., n · m, n · m], real or complex; leading axes are separate problems.
    sweeps : at most so many rounds over the heads; it stops when a round gains nothing.

    Returns
    -------
    [..., n, m, m].

    >>> x = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, -2.0, 0.0]])  # head 2 is head 1 turned by 90°
    >>> align(x.T @ x, n=2)[1].round()
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    m = gram.shape[-1] // n
    blocks = gram.clone().unflatten(-1, (n, m)).unflatten(-3, (n, m))  # [..., n, m, n, m]
    for i in range(n):
        blocks[..., i, :, i, :] = 0  # G_ii is the same for every R_i
    # Start from the m best directions of all heads together, each head's part made orthogonal.
    turns = _polar(torch.linalg.eigh(gram).eigenvectors[..., -m:].unflatten(-2, (n, m)))
    before = torch.full(gram.shape[:-2], -torch.inf, dtype=gram.real.dtype)
    for _ in range(sweeps):
        for i in range(n):
            # Σ_{j≠i} G_ij R_j: [..., m, n, m] · [..., n, m, m] -> [..., m, m]
            target = torch.einsum("...pjq,...jqr->...pr", blocks[..., i, :, :, :], turns)
            turns[..., i, :, :] = _polar(target)
        together = torch.einsum("...ipjq,...jqr->...ipr", blocks, turns)  # [..., n, m, m]
        agreement = (turns.conj() * together).sum((-3, -2, -1)).real
        if (agreement - before <= torch.finfo(before.dtype).eps * agreement.abs()).all():
            break
        before = agreement
    return turns @ turns[..., :1, :, :].mH


def _polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to `matrix`: it maximises tr Rᵀ M."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
