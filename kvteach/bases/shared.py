"""One encoder for all query heads of a group, and a decoder for each of them.

Query head j reads head i(j) of the group: the columns x S_j of a row x, through its own softmax rows, so with a second
moment G_j of its own, and feels errors by its own weights W_j. What is cached, x E, is the same for all. Minimise

    Σ_j E_j ‖(x E D_j − x S_j) W_j^½‖² = Σ_j tr (E D_j − S_j)ᵀ G_j (E D_j − S_j) W_j

No closed form solves for all at once, but there is one for each side alone. They take turns (alternating least
squares), beginning with the best projection under the mean of the G_j (`optimal`):

    D_j = (Eᵀ G_j E)⁺ Eᵀ G_j S_j
    Σ_j G_j E (D_j W_j D_jᵀ) = Σ_j G_j S_j W_j D_jᵀ        linear in E: a few steps of conjugate gradients

No turn makes the sum larger. Only E D_j matters, so E is kept orthonormal: what is cached keeps the size of x. Where no
row of its own looks, head j reads the plain projection, D_j = Eᵀ S_j, so that rank d gives E D_j = S_j on any text.
"""

import torch
from torch import Tensor

from .optimal import best_projection, pseudo_inverse

TURNS = 12
STEPS = 3  # of conjugate gradients in a turn; more turns bring more than more steps


def shared_encoder(grams: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The encoder, its decoders, and what they leave.

    Parameters
    ----------
    grams : G_j, float64 [readers, d, d] for a group of t heads, d = t · d_h. The readers of a head stand together,
        readers / t of them each, in the order of the heads.
    weights : W_j, [readers, d_h, d_h].
    rank : numbers cached for a token, 1 … d.

    Returns
    -------
    E [d, rank]; the D_j [readers, rank, d_h]; and what is left of the sum, as a share of what E = 0 leaves.

    Two heads of one number each, equally large, and the first is felt more:

    >>> grams, weights = torch.eye(2, dtype=torch.double).repeat(2, 1, 1), torch.tensor([[[9.0]], [[1.0]]]).double()
    >>> encode, decode, left = shared_encoder(grams, weights, 1)
    >>> encode.abs().T, decode.abs().ravel(), round(left, 3)
    (tensor([[1., 0.]], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64), 0.1)
    """
    d, d_h = grams.shape[-1], weights.shape[-1]
    heads = d // d_h
    readers = len(grams) // heads  # of each head
    # S_j [d, d_h]: the columns of the head that j reads
    picks = torch.eye(d, dtype=grams.dtype).unflatten(1, (heads, d_h)).transpose(0, 1)  # [t, d, d_h]
    picks = picks.repeat_interleave(readers, 0)  # [readers, d, d_h]
    if rank == d:  # nothing is left out, whatever the text was
        return torch.eye(d, dtype=grams.dtype), picks, 0.0
    read = grams @ picks  # G_j S_j
    whole = _trace(picks.mT @ read @ weights)
    mean, felt = grams.mean(0), weights.unflatten(0, (heads, readers)).sum(1)
    encode, best = torch.linalg.qr(best_projection(mean, rank, felt).encode).Q, None
    scale = pseudo_inverse(mean)
    for turn in range(TURNS + 1):
        decode = _decoders(encode, grams, read, picks)
        wrong = encode @ decode - picks
        left = _trace(wrong.mT @ grams @ wrong @ weights) / whole if whole else 0.0
        if best is not None and left >= best[2]:  # as small as rounding lets it be
            break
        best = encode, decode, left
        if turn < TURNS:
            encode = torch.linalg.qr(_encoder(encode, decode, grams, read, weights, scale)).Q
    return best


def _decoders(encode: Tensor, grams: Tensor, read: Tensor, picks: Tensor) -> Tensor:
    """The best D_j for this E: [readers, rank, d_h]."""
    plain = encode.T @ picks
    normal = encode.T @ grams @ encode  # [readers, rank, rank]
    rest = encode.T @ read - normal @ plain
    return plain + torch.stack([pseudo_inverse(one) for one in normal]) @ rest


def _encoder(
    encode: Tensor, decode: Tensor, grams: Tensor, read: Tensor, weights: Tensor, scale: Tensor
) -> Tensor:
    """A better E for these D_j: [d, rank]. `scale` is the inverse of the mean G_j, which evens the directions out."""
    felt = decode @ weights @ decode.mT  # [readers, rank, rank]
    other = pseudo_inverse(felt.sum(0))
    residual = (read @ weights @ decode.mT - grams @ encode @ felt).sum(0)
    direction, before = 0, 1
    for _ in range(STEPS):
        scaled = scale @ residual @ other
        size = (residual * scaled).sum()
        direction = scaled + size / before * direction
        image = (grams @ direction @ felt).sum(0)
        slope = (direction * image).sum()
        if not slope > 0:  # nothing is left to gain
            break
        encode = encode + size / slope * direction
        residual, before = residual - size / slope * image, size
    return encode


def _trace(matrices: Tensor) -> float:
    """Summed over all of them; a sum of squares, so rounding below zero is cut off."""
    return float(matrices.diagonal(dim1=-2, dim2=-1).sum().clamp(min=0))
