"""Attention-weighted ("att"): tokens count as much as they are read.

The moments of `score_weighted` count every token once; attention does not: a few tokens, the sinks, are read by almost
every query, and most hardly at all. With A_j the softmax weights of query head j, one row a query:

    keys     G = mean_j Σ_q Cov_{A_j[q]}(k)          a shift common to all scores changes nothing, so the error of a
                                                     softmax row is the variance of its score errors under the row
    values   G = mean_j (A_j V)ᵀ (A_j V)             only attention's output reaches W_O

and the weights W of `score_weighted`. The mean is over all query heads of the layer, and queries are taken as drawn
apart from their own softmax rows.

In blocks ("blockwise"): a basis for keys at every position must hold each pair of numbers turned by every angle. RoPE
may also turn a key by its place in a block of m tokens only, and leave the rest to its readers
(`kvteach.models.llama`). Within a block the slow pairs hardly turn, so fewer directions hold the keys, and later
blocks hold keys like those of the first. G is then a sum over blocks, and a query counts in the frame of each block, as
often as it reads there (`kvteach.attended`).
"""

from collections.abc import Sequence

from ..moments import Moments
from .basis import Basis, check_group, readers
from .optimal import best_projection


def attention_weighted(
    moments: Moments,
    layer: int,
    heads: Sequence[int],
    key_rank: int,
    value_rank: int,
    centred: bool = False,
    *,
    in_blocks: bool = False,
) -> Basis:
    """The best basis for softmax rows and for what attention hands on, at the same cache as `activation_svd`.

    Parameters
    ----------
    in_blocks : of keys that are turned within blocks; makes no difference to a model without RoPE.

    `error` for keys: the variance of a score's error (before the scale 1/√d_h) under a softmax row, averaged over rows,
    summed over query heads; in blocks, without what two blocks have in common. For values: the squared error in the
    output, per token, summed over query heads.

    ValueError as for `kvteach.bases.basis.check_group`, for `centred`, and for moments without attention.
    """
    heads = check_group(moments, heads, key_rank=key_rank, value_rank=value_rank)
    if centred:
        raise ValueError(
            "attention takes the mean off the keys, and what it hands on has none: centred must be False"
        )
    blocks = in_blocks and moments.source.rotates
    kinds = ("keys_in_blocks", "queries_in_blocks") if blocks else ("keys_attended", "queries_post")
    keys, values = (moments.matrix(kind, layer, heads) for kind in (kinds[0], "values_attended"))
    return Basis(
        best_projection(keys, key_rank, readers(moments, kinds[1], layer, heads)),
        best_projection(values, value_rank, readers(moments, "outputs_weight", layer, heads)),
    )
