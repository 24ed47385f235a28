"""SVD-a: the singular vectors of the activations (Yu et al., 2024, equations 7–14).

    [K_1 … K_n] = Φ Σ Ψᵀ            E = Ψ_r,  D = Ψ_rᵀ            (values alike: Θ Λ Ωᵀ)

Ψ_r holds the top r eigenvectors of KᵀK, so the activations themselves are never stored. It is the best basis for the
keys and values themselves, but nobody reads those: queries read keys, the output projection reads values, and some
tokens are read far more than others.
"""

from collections.abc import Sequence

from ..moments import Moments
from .basis import Basis, Projection, check_group, second_moment
from .optimal import best_projection


def activation_svd(
    moments: Moments, layer: int, heads: Sequence[int], key_rank: int, value_rank: int, centred: bool = False
) -> Basis:
    """Top right singular vectors of the group's cached keys and of its values.

    `error` is E‖x − x̂‖² per token. ValueError as for `kvteach.bases.basis.check_group`.
    """
    heads = check_group(moments, heads, key_rank=key_rank, value_rank=value_rank)

    def side(kind: str, rank: int) -> Projection:
        gram, mean = second_moment(moments, kind, layer, heads, centred)
        return best_projection(gram, rank, mean=mean)

    return Basis(side("keys_post", key_rank), side("values", value_rank))
