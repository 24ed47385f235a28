"""A basis for keys that commutes with RoPE, so that it can be folded into W_K, at any position.

Per frequency f the group's keys are one complex row z_f [n] (see `pairs`). Averaged over all angles between query and
key, the squared score error is a sum over frequencies, without products of two of them:

    Σ_f E ‖(z_f − ẑ_f) Λ_f^½‖²            Λ_f = diag_i λ_if,   λ_if = ½ Σ_{j reads i} E|q_jf|²

so each frequency has its own small complex SVD, that of `optimal`. A pair of cached numbers buys one of its singular
values σ_f,k; the best way to spend r / 2 pairs is on the largest σ² of all frequencies ("water-filling"). A frequency
may get none, or several. The latents turn like keys, each with the frequency it came from.

Values have no RoPE: they are those of `score_weighted`, or of `attention_weighted`.
"""

from collections.abc import Sequence

import torch

from ..moments import Moments
from .basis import Basis, Projection, check_group, readers, second_moment
from .optimal import best_projection, directions
from .pairs import complex_gram, real_encoder


def commuting(
    moments: Moments,
    layer: int,
    heads: Sequence[int],
    key_rank: int,
    value_rank: int,
    centred: bool = False,
    *,
    attended: bool = False,
    stock: bool = False,
) -> Basis:
    """The best keys among those that RoPE does not disturb.

    Parameters
    ----------
    key_rank : even, for RoPE turns pairs.
    attended : count tokens as much as they are read, as `attention_weighted` does.
    stock : one direction a frequency instead of water-filling, with key_rank = d_h: the latents turn like an ordinary
        head, and an unchanged model class can read them.

    `error` for keys: the squared error of a score before the scale 1/√d_h, averaged over all angles between query and
    key, summed over query heads (a variance under softmax rows when `attended`).

    ValueError as for `kvteach.bases.basis.check_group`, for an odd key_rank, for a model without RoPE, and for centred
    together with attended.
    """
    heads = check_group(moments, heads, key_rank=key_rank, value_rank=value_rank)
    source, n, pairs = moments.source, len(heads), moments.source.head_dim // 2
    if not source.rotates:
        raise ValueError(
            f"a {source.model_type} model has no RoPE to commute with: any other basis folds into its weights"
        )
    if key_rank % 2:
        raise ValueError(f"key_rank is {key_rank}; RoPE turns pairs, so it must be even")
    if stock and key_rank != source.head_dim:
        raise ValueError(
            f"key_rank is {key_rank}; for one direction a frequency it must be {source.head_dim}"
        )
    if centred and attended:
        raise ValueError(
            "attended keys are centred by themselves and values have no mean: centred must be False"
        )
    key_kind, value_kind = ("keys_attended", "values_attended") if attended else ("keys_post", "values")

    gram, mean = second_moment(moments, key_kind, layer, heads, centred)
    queries = readers(moments, "queries_post", layer, heads).diagonal(dim1=1, dim2=2)  # [n, d_h]
    power = queries.unflatten(1, (2, pairs)).sum(1).T / 2  # λ: [d_h / 2, n]
    found = [directions(c, w.view(n, 1, 1)) for c, w in zip(complex_gram(gram, n), power, strict=True)]
    values = torch.stack([part[0] for part in found])  # σ²: [d_h / 2, n]
    if stock:
        chosen = torch.arange(pairs) * n
    else:
        chosen = values.ravel().argsort(descending=True, stable=True)[: key_rank // 2].sort().values
    frequencies = chosen // n
    columns = torch.cat([part[1].T for part in found])[chosen]  # [r / 2, n]
    rows = torch.cat([part[2] for part in found])[chosen]
    left_out = values.ravel().index_fill(0, chosen, 0)
    keys = Projection(
        real_encoder(columns, frequencies, pairs),
        real_encoder(rows.conj(), frequencies, pairs).T,
        mean,
        float(left_out.sum()),
        frequencies,
    )

    gram, mean = second_moment(moments, value_kind, layer, heads, centred)
    return Basis(
        keys, best_projection(gram, value_rank, readers(moments, "outputs_weight", layer, heads), mean)
    )
