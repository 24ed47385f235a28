"""Mean pooling: n heads become their mean (Ainslie et al., 2023, GQA).

    c = (x_1 + … + x_n) / n            x̂_i = c

The cheapest way and the oldest: pooling the projections W_K and W_V does the same. It is the best shared head when
each query head reads c unchanged, and it commutes with RoPE. It loses what heads do not have in common, and heads that
were trained apart have little in common: number f of head 1 has nothing to do with number f of head 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import Moments
from .basis import Basis, Projection, check_group, lost, second_moment


def mean_pool(
    moments: Moments, layer: int, heads: Sequence[int], key_rank: int, value_rank: int, centred: bool = False
) -> Basis:
    """Mean of the heads; both ranks are d_h.

    `error` is E‖x − x̂‖² per token, of cached keys and of values. Centred, each head keeps its own mean and the
    deviations are pooled. ValueError as for `kvteach.bases.basis.check_group`.
    """
    heads = check_group(moments, heads, "mean-pool", key_rank=key_rank, value_rank=value_rank)
    n, d_h = len(heads), moments.source.head_dim
    decode = torch.eye(d_h, dtype=torch.float64).repeat(1, n)  # [d_h, n · d_h]

    def side(kind: str, frequencies: Tensor | None = None) -> Projection:
        gram, mean = second_moment(moments, kind, layer, heads, centred)
        return Projection(decode.T / n, decode, mean, lost(gram, decode.T / n, decode), frequencies)

    return Basis(
        side("keys_post", torch.arange(d_h // 2) if moments.source.rotates else None), side("values")
    )
