"""Attention over keys that RoPE has turned within blocks only.

The cache is a row of blocks of m tokens. Keys are turned by their place in their block, so at most m positions need a
basis, however long the text is. What is missing, the turn by im of block i, is made good by the reader; RoPE depends on
differences only, so nothing is lost:

    c = (x W_K R_s R_imᵀ) E                token in slot s = im … im + m − 1 of the cache
    q̃_i = (x W_Q^j R_S R_imᵀ) M_j          a query in slot S, once for each block that it reads
    q̃_i cᵀ = (x W_Q^j R_S) (c M_jᵀ R_im)ᵀ     or, where many queries read, the keys are rebuilt and turned instead

Where a sliding window drops tokens, keys are rebuilt at every step. Slots are counted, not positions: padding on the
left moves both alike.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import rotate_half

Angles = tuple[Tensor, Tensor]  # cosines and sines, [n, d_h] both


def angles(rotary, x: Tensor, slots: Tensor, starts: Tensor | None = None) -> Angles:
    """Those of R_s, or of R_s R_imᵀ where the starts im of blocks are given, in float32 at least.

    The angles of R_{s−im} are rounded in another way than those of s and im, so they would not be quite the same.

    Parameters
    ----------
    rotary : the model's own, (x, positions) -> cosines and sines. x : a tensor like those that are to be turned.
    slots, starts : [n], or [1] for the same slot everywhere.
    """
    like = x[:0].to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (table[0] for table in rotary(like, slots[None]))
    if starts is None:
        return cos, sin
    back, aside = unit(*angles(rotary, x, starts))
    return cos * back + sin * aside, sin * back - cos * aside


def unit(cos: Tensor, sin: Tensor) -> Angles:
    """A rotation, whose inverse is its transpose. transformers rounds the two, so theirs are not quite one."""
    size = torch.hypot(cos, sin)
    return cos / size, sin / size


class Turns:
    """The angles of one pass through a model: all layers turn alike, so each is found once, on each device.

    Parameters
    ----------
    rotary : as for `angles`. slots : of the new tokens, [n]. block : tokens of a block.
    """

    def __init__(self, rotary, slots: Tensor, block: int):
        self.rotary, self.slots, self.block, self.found = rotary, slots, block, {}

    def keys(self, x: Tensor) -> Angles:
        """Of new keys within their blocks, [n, d_h]."""
        return self._once("keys", x, lambda slots: angles(self.rotary, x, slots, self._start(slots)))

    def queries(self, x: Tensor) -> Angles:
        """Of new queries that read keys which were rebuilt, [n, d_h]."""
        return self._once("queries", x, lambda slots: angles(self.rotary, x, slots))

    def stored(self, x: Tensor, cached: int) -> Angles:
        """Of `cached` keys by the start of their block, [cached, d_h]."""

        def find(slots):
            first = (slots[-1] + 1 - cached).clamp(min=0)  # above 0 where a sliding window has dropped tokens
            stored = first + torch.arange(cached, device=x.device)
            return unit(*angles(self.rotary, x, self._start(stored)))

        return self._once(("stored", cached), x, find)

    def asked(self, x: Tensor, cached: int) -> Angles:
        """Of one new query for each block of `cached` keys, [blocks, d_h]."""

        def find(slots):
            return angles(self.rotary, x, slots, torch.arange(0, cached, self.block, device=x.device))

        return self._once(("asked", cached), x, find)

    def _start(self, slots: Tensor) -> Tensor:
        return slots - slots % self.block

    def _once(self, what, x: Tensor, find) -> Angles:
        key = what, x.device
        if key not in self.found:
            self.found[key] = find(self.slots.to(x.device))
        return self.found[key]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE with these angles, rounded once: [..., n or 1, d_h] -> [..., n, d_h]."""
    return torch.addcmul(x * cos, rotate_half(x), sin).to(x.dtype)


def rebuilt(latent: Tensor, maps: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The keys that each query head reads, after RoPE: [batch, h, cached, d_h].

    Parameters
    ----------
    latent : what is cached, [batch, g, cached, r_k]. maps : M_j, [h, d_h, r_k].
    cos, sin : of the turns by the start of each key's block, `unit`, [cached, d_h].
    """
    maps = maps.unflatten(0, (latent.shape[1], -1))  # [g, h/g, d_h, r_k]
    keys = torch.einsum("bglr,gjdr->bgjld", latent, maps).flatten(1, 2)
    return turned(keys, cos, sin)


def softmax_row(
    query: Tensor, latent: Tensor, maps: Tensor, cos: Tensor, sin: Tensor, block: int, mask=None
) -> Tensor:
    """The softmax row of one token, read from the blocks where they lie: [batch, g, h/g, cached], float32 at least.

    Parameters
    ----------
    query : [batch, h, 1, d_h], scaled, before RoPE. latent : what is cached, [batch, g, cached, r_k].
    maps : M_j, [h, d_h, r_k]. cos, sin : of R_S R_imᵀ, [blocks, d_h].
    mask : [batch or 1, 1, 1, cached or more], true where may be read, or what is added.
    """
    batch, groups, cached, _ = latent.shape
    # heads first and in memory so: neither the turn nor the map has to copy [batch, h, blocks, d_h]
    query = turned(query.transpose(0, 1).contiguous(), cos, sin)  # [h, batch, blocks, d_h]
    query = query.flatten(1, 2) @ maps  # [h, batch · blocks, r_k]
    query = query.unflatten(1, (batch, -1)).unflatten(0, (groups, -1))  # [g, h/g, batch, blocks, r_k]
    scores = _products(latent, query.permute(2, 0, 3, 4, 1), block).mT  # [batch, g, h/g, cached]
    if mask is not None:
        mask = mask[..., :cached]
        # the scores are new, so they may be written over; a mask that is added may be of a wider dtype
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return functional.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _products(latent: Tensor, query: Tensor, block: int) -> Tensor:
    """[batch, g, cached, r] · [batch, g, blocks, r, h/g] -> [batch, g, cached, h/g].

    A product of many matrices copies them first, unless all follow one another in memory. Where the cache does not end
    with a block, only those of one cached head do. On a CPU a product for each of these heads is several times faster
    than the copy; a GPU would wait for so many small ones, and copies the keys.
    """
    cached = latent.shape[2]
    whole, rest = cached // block, cached % block
    parts = []
    if whole:
        read = latent[:, :, : whole * block].unflatten(2, (whole, block))  # [batch, g, blocks, m, r]
        asked = query[:, :, :whole]
        if latent.device.type == "cpu" and not read.is_contiguous():
            rows = zip(read, asked, strict=True)
            found = [one @ other for row in rows for one, other in zip(*row, strict=True)]
            found = torch.stack(found).unflatten(0, read.shape[:2])
        else:
            found = read @ asked.mT.contiguous().mT  # r side by side in memory
        parts.append(found.flatten(2, 3))
    if rest:
        parts.append(latent[:, :, whole * block :] @ query[:, :, -1])
    return torch.cat(parts, 2) if whole and rest else parts[0]
