"""Which heads are cached together.

Heads in one group share d_h directions, so a group is good when its heads' energy lies in few directions. `by_order`
takes neighbours. `by_similarity` builds groups one head at a time: the next head is the one with which the group's best
d_h directions of keys and of values keep the largest share of the energy (ReCalKV and arXiv 2412.20677 group by
similarity too, each with a measure of its own).
"""

import torch

from .moments import Moments


def by_order(heads: int, groups: int) -> list[list[int]]:
    """Neighbours together.

    >>> by_order(4, 2)
    [[0, 1], [2, 3]]
    """
    size = heads // groups
    return [list(range(first, first + size)) for first in range(0, heads, size)]


def by_similarity(moments: Moments, layer: int, groups: int) -> list[list[int]]:
    """Heads that share most directions together; each group starts from the first head that is left."""
    left = list(range(moments.source.kv_heads))
    size, found = len(left) // groups, []
    for _ in range(groups):
        group = [left.pop(0)]
        while len(group) < size:
            best = max(left, key=lambda head: kept(moments, layer, [*group, head]))
            group.append(best)
            left.remove(best)
        found.append(group)
    return found


def kept(moments: Moments, layer: int, heads: list[int]) -> float:
    """Share of the energy that the best d_h directions of these heads keep; keys and values count alike."""
    shares = []
    for kind in ("keys_post", "values"):
        energies = moments.spectrum(kind, layer, heads)
        whole = energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)
        shares.append(float(energies[: moments.source.head_dim].sum() / whole))
    return sum(shares) / 2
