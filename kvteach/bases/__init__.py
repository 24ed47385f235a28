"""Bases: what to keep of a group of heads. One method a file, each a pure function of `kvteach.moments.Moments`.

=======================  ==================================================  ===========  ==========================
name                     keeps                                               ranks        keys pass through RoPE
=======================  ==================================================  ===========  ==========================
``mean-pool``            the mean of the heads                               d_h          yes
``procrustes``           the mean of the heads, turned to one another        d_h          yes
``weight-svd``           the largest directions of the weights               any          no
``activation-svd``       the largest directions of the activations           any          no
``score-weighted``       what queries and the output projection read         any          no
``attention-weighted``   the same, tokens counted as often as they are read  any          no
``blockwise``            the same, keys turned within blocks of tokens only  any          no
``commuting``            ``score-weighted``, each frequency apart            even         yes
``commuting-attended``   ``attention-weighted``, each frequency apart        even         yes
``commuting-stock``      the same, one direction a frequency                 keys: d_h    yes, as an ordinary head
=======================  ==================================================  ===========  ==========================

All have one signature, ``method(moments, layer, heads, key_rank, value_rank, centred=False) -> Basis``, where `heads`
are the key-value heads that are cached together. Two heads of one number each, cached as one number:

>>> import torch
>>> from kvteach.moments import Moments, Source
>>> keys = torch.tensor([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]])  # [tokens, 2 heads · 1]
>>> gram = {"keys_post": (keys.T @ keys)[None], "values": torch.eye(2)[None]}  # [layers, 2, 2]
>>> source = Source("bloom", layers=1, query_heads=2, kv_heads=2, head_dim=1, weights="")
>>> moments = Moments(source, count=3, total={}, gram=gram)
>>> basis = METHODS["activation-svd"](moments, layer=0, heads=[0, 1], key_rank=1, value_rank=1)
>>> keys @ basis.keys.encode @ basis.keys.decode
tensor([[3., 0.],
        [0., 0.],
        [3., 0.]])
>>> round(basis.keys.error, 3)  # E‖x − x̂‖²: a third of 1²
0.333
"""

from collections.abc import Callable
from functools import partial

from . import (
    activation_svd,
    attention_weighted,
    commuting,
    mean_pool,
    procrustes,
    score_weighted,
    weight_svd,
)
from .basis import Basis, Projection

METHODS: dict[str, Callable[..., Basis]] = {
    "mean-pool": mean_pool.mean_pool,
    "procrustes": procrustes.procrustes,
    "weight-svd": weight_svd.weight_svd,
    "activation-svd": activation_svd.activation_svd,
    "score-weighted": score_weighted.score_weighted,
    "attention-weighted": attention_weighted.attention_weighted,
    "blockwise": partial(attention_weighted.attention_weighted, in_blocks=True),
    "commuting": commuting.commuting,
    "commuting-attended": partial(commuting.commuting, attended=True),
    "commuting-stock": partial(commuting.commuting, attended=True, stock=True),
}

_ENERGY = "keys_post", "values"
_SCORES = *_ENERGY, "queries_post", "outputs_weight"
_ATTENDED = "keys_attended", "values_attended", "queries_post", "outputs_weight"
_READS = {
    "mean-pool": _ENERGY,
    "procrustes": _ENERGY,
    "weight-svd": ("keys_weight", "values_weight"),
    "activation-svd": _ENERGY,
    "score-weighted": _SCORES,
    "attention-weighted": _ATTENDED,
    "blockwise": ("keys_in_blocks", "values_attended", "queries_in_blocks", "outputs_weight"),
    "commuting": _SCORES,
    "commuting-attended": _ATTENDED,
    "commuting-stock": _ATTENDED,
}


def reads(name: str, rotates: bool) -> tuple[str, ...]:
    """The kinds of moments that a basis needs of a model, with RoPE or without; LookupError for no basis."""
    method(name)
    return _READS["attention-weighted" if name == "blockwise" and not rotates else name]


def method(name: str) -> Callable[..., Basis]:
    """The method of that name; LookupError names the legal ones."""
    if name not in METHODS:
        raise LookupError(f"no basis {name!r}; it is one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "Basis", "Projection", "method", "reads"]
