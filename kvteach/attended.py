"""Attention-weighted sums of one text: tokens count as often as they are read.

A softmax row a of query head j reads keys k_m. A shift common to all scores changes nothing, so the error of a row
is the variance of its score errors under the row itself, and what that needs of the keys is their covariance,

    Cov_a(k) = Σ_m a_m k_mᵀ k_m − (a K)ᵀ (a K) = Kᵀ (diag(a) − aᵀa) K

Of the values only what attention hands on, a V, reaches W_O.

Keys that are turned within blocks only (`kvteach.models.llama`) are met by another query in each block, q_i =
q R_{−im}. The queries of two blocks are taken as unrelated, so of the square of the mean only its parts within a block
are left. With a_i the part of the row in block i, and each query counted by what it reads there:

    keys      Σ_i K_iᵀ (diag(a_i) − a_iᵀ a_i) K_i          queries      Σ_i (Σ a_i) q_iᵀ q_i

(a_i is no softmax row of its own: its sum is the share that the block has. To divide by it loses more.)

All functions sum over rows and over the heads that are handed in. With h heads and l tokens, d numbers a token:
softmax weights are [h, l, l], rows of keys and values [l, d]. Sums are float64.
"""

import torch
from torch import Tensor

from .rope import rotation


def spread(keys: Tensor, weights: Tensor) -> Tensor:
    """Σ Cov_a(k): [d, d]."""
    keys = keys - keys.mean(0)  # invisible to a covariance; left in, it would eat digits
    rows = keys.double()
    found = rows.T @ (weights.sum((0, 1), dtype=rows.dtype)[:, None] * rows)
    for head in weights:  # [h, l, d] would be large
        read = (head.to(keys.dtype) @ keys).double()
        found -= read.T @ read
    return found


def spread_in_blocks(keys: Tensor, weights: Tensor, block: int) -> Tensor:
    """The same in blocks: [d, d]. `keys` are turned within their block."""
    found = 0
    for start in range(0, len(keys), block):
        inside = keys[start : start + block].double()  # [m, d]
        # earlier queries do not see this block
        rows = weights[:, start:, start : start + block].double()  # [h, later tokens, m]
        mixed = rows.sum((0, 1)).diag() - (rows.mT @ rows).sum(0)  # [m, m]: far fewer numbers than [d, d]
        found = found + inside.T @ (mixed @ inside)
    return found


def handed_on(values: Tensor, weights: Tensor) -> Tensor:
    """Σ (a V)ᵀ (a V): [d, d]."""
    found = 0
    for head in weights:
        read = (head.to(values.dtype) @ values).double()
        found = found + read.T @ read
    return found


def queries_in_blocks(queries: Tensor, weights: Tensor, block: int, frequencies: Tensor) -> Tensor:
    """Σ_i (Σ a_i) q_iᵀ q_i, heads apart: [h, d_h, d_h]. `queries` are [h, l, d_h], as RoPE turns them."""
    queries, found = queries.double(), 0
    for start in range(0, queries.shape[1], block):
        later = queries[:, start:]
        share = weights[:, start:, start : start + block].sum(
            -1, True, dtype=torch.float64
        )  # [h, later tokens, 1]
        turn = rotation(-start, frequencies).to(queries.device)  # the sum is turned, not each query
        found = found + turn.T @ ((share * later).mT @ later) @ turn
    return found


def wide(x: Tensor) -> Tensor:
    """[heads, tokens, d_h] -> [tokens, heads * d_h], in float32 at least."""
    return x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
