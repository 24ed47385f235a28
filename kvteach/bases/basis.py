"""What a method returns, and what every method asks of its arguments.

A group is n key-value heads of one layer side by side, d = n · d_h numbers a token. A row x of keys or values is cached
as r numbers and read back from them:

    c = (x − mean) E            x̂ = c D + mean            E [d, r], D [r, d]

For n heads that are cached as one head of the old width, r = d_h.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..moments import Moments


@dataclass(frozen=True, eq=False)
class Projection:
    """Encoder and decoder of one side, keys or values, of one group.

    Attributes
    ----------
    encode : float64 [d, r]. Its columns set the scale of what is cached.
    decode : float64 [r, d].
    mean : [d], or None when nothing is subtracted. For values, Σ weights = 1 lets the mean pass through attention: it
        is a constant of the layer's output, exact and free where the output projection has a bias. For keys, q · mean
        is the same for all tokens and softmax drops it: nothing need be subtracted or added at all.
    error : what remains of the method's own objective, per token. Each method says what that is.
    frequencies : [r / 2] for keys that can be projected before RoPE: the pair (c[i], c[i + r / 2]) turns with this
        frequency of the original head. None when the projection does not commute with RoPE, or there is none.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor | None
    error: float
    frequencies: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Basis:
    """One group's projections."""

    keys: Projection
    values: Projection


def check_group(moments: Moments, heads: Sequence[int], pooled: str = "", **ranks: int) -> list[int]:
    """The group's heads as a list.

    Parameters
    ----------
    pooled : the name of a method that makes one head out of the group, so that its ranks can only be d_h.
    ranks : by name, each from 1 to n · d_h.

    Raises
    ------
    ValueError : heads that are none, repeated or not there, or a rank out of range.
    """
    source = moments.source
    chosen = [operator.index(head) for head in heads]
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(source.kv_heads)):
        raise ValueError(
            f"heads is {chosen}; it must be one or more different key-value heads from 0 to {source.kv_heads - 1}"
        )
    width = len(chosen) * source.head_dim
    for name, rank in ranks.items():
        if pooled and rank != source.head_dim:
            raise ValueError(
                f"{name} is {rank!r}; {pooled} makes one head of the group, so it must be {source.head_dim}"
            )
        if not isinstance(rank, int) or not 1 <= rank <= width:
            raise ValueError(
                f"{name} is {rank!r}; it must be a whole number from 1 to {width} for {len(chosen)} heads"
            )
    return chosen


def second_moment(moments: Moments, kind: str, layer: int, heads: list[int], centred: bool):
    """E[xᵀx] of the group and None, or its covariance and its mean [d]; errors as for `Moments.matrix`."""
    gram = moments.matrix(kind, layer, heads, centred)
    return gram, moments.mean(kind, layer)[heads].ravel() if centred else None


def readers(moments: Moments, kind: str, layer: int, heads: list[int]) -> Tensor:
    """How strongly each key-value head is read: `kind`, summed over the query heads that read it.

    Query heads i·q … i·q + q − 1 read key-value head i, q of them each.

    Parameters
    ----------
    kind : ``queries_post`` or ``queries_in_blocks`` (they read keys), or ``outputs_weight`` (they read values).

    Returns
    -------
    float64 [n, d_h, d_h].
    """
    each = moments.per_token(kind, layer)  # [query heads, d_h, d_h]
    return each.unflatten(0, (moments.source.kv_heads, -1)).sum(1)[heads]


def lost(gram: Tensor, encode: Tensor, decode: Tensor) -> float:
    """E‖x − x̂‖² of any projection, from E[xᵀx] [d, d]: tr (I − ED)ᵀ G (I − ED).

    >>> lost(torch.eye(2), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    1.0
    """
    rest = torch.eye(len(gram), dtype=gram.dtype) - encode @ decode
    return float((rest.T @ gram @ rest).trace().clamp(min=0))
