"""SVD-w: the singular vectors of the weights (the baseline of Yu et al., 2024, section 3).

    [W_K1 … W_Kn] = U S Vᵀ            E = V_r,  D = V_rᵀ            (values alike, with W_V)

No text is needed, and that is its weakness: it treats all inputs as equally likely. Biases are left out, and so is
RoPE: the basis belongs to keys before the rotation and is used on whatever is cached.
"""

from collections.abc import Sequence

from ..moments import Moments
from .basis import Basis, check_group
from .optimal import best_projection


def weight_svd(
    moments: Moments, layer: int, heads: Sequence[int], key_rank: int, value_rank: int, centred: bool = False
) -> Basis:
    """Top right singular vectors of the projections' weights, side by side.

    `error` is ‖W − W E D‖_F², the energy of the weights left out. ValueError as for
    `kvteach.bases.basis.check_group`, and for `centred`.
    """
    heads = check_group(moments, heads, key_rank=key_rank, value_rank=value_rank)
    if centred:
        raise ValueError("weight-svd sees no text and so no mean: centred must be False")
    return Basis(
        best_projection(moments.matrix("keys_weight", layer, heads), key_rank),
        best_projection(moments.matrix("values_weight", layer, heads), value_rank),
    )
