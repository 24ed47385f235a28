"""Score-weighted: keys as queries see them, values as the output projection sees them.

For a query q_j of head j that reads key-value head i, drawn apart from the keys, the error of its scores is

    E (q_j · (k_i − k̂_i))² = E ‖(k_i − k̂_i) S_j^½‖²            S_j = E[q_jᵀ q_j]

so summed over the readers of each head, the best basis is that of `optimal` with W = blockdiag_i Σ_{j reads i} S_j. A
value error meets W_O^j next, which gives W = blockdiag_i Σ_{j reads i} W_O^j W_O^jᵀ; what errors of different heads do
to one another is left out. One head to a group makes it KQ-SVD, the truncated SVD of K Qᵀ itself (arXiv 2512.05916).
"""

from collections.abc import Sequence

from ..moments import Moments
from .basis import Basis, Projection, check_group, readers, second_moment
from .optimal import best_projection


def score_weighted(
    moments: Moments, layer: int, heads: Sequence[int], key_rank: int, value_rank: int, centred: bool = False
) -> Basis:
    """The best basis for scores and for single heads' outputs, at the same cache as `activation_svd`.

    `error` for keys: the squared error of a score before the scale 1/√d_h, per query and key, summed over query heads.
    For values: the squared error that one token's value makes in the output, summed over query heads.
    ValueError as for `kvteach.bases.basis.check_group`.
    """
    heads = check_group(moments, heads, key_rank=key_rank, value_rank=value_rank)

    def side(kind: str, rank: int, read_by: str) -> Projection:
        gram, mean = second_moment(moments, kind, layer, heads, centred)
        return best_projection(gram, rank, readers(moments, read_by, layer, heads), mean)

    return Basis(side("keys_post", key_rank, "queries_post"), side("values", value_rank, "outputs_weight"))
