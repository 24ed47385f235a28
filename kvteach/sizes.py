"""Sizes: parameters, cache and moments of a model, from its config alone, before anything is loaded.

A layer of n key-value heads and h query heads of d_h numbers, cached as g heads of r_k and r_v, has

    absorbed             W_Q [d, h·r_k]   W_K [d, g·r_k]                             W_V [d, g·r_v]   W_O [h·r_v, d]
    keys after RoPE      W_Q [d, h·d_h]   W_K [d, n·d_h]   E [n·d_h, r_k]   M [h·d_h, r_k]    W_V and W_O the same

With g = n and r = d_h, absorbed, it is the original.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from . import cost
from .moments import Moments, Source
from .plan import Plan
from .zoo import FAMILIES, check_family

# What kvteach.cost.Shape reads of a config; a compressed one has them too.
_FIELDS = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Sizes:
    """What a model takes.

    Attributes
    ----------
    parameters : as ``model.num_parameters()`` counts them.
    cached : numbers in the cache for each token, all layers.
    """

    parameters: int
    cached: int


def of(config) -> Sizes:
    """Sizes of a model of the LLaMA, Mistral, Qwen2 or BLOOM family as it is, compressed or not."""
    if not config.model_type.startswith("kvteach_"):
        check_family(config)
        shape = _shape(config, getattr(config, "num_key_value_heads", None))
        return _count(shape, shape.kv_heads, shape.head_dim, shape.head_dim, True, False)
    shape = _shape(config, config.source_key_value_heads)
    ranks = config.key_rank or shape.head_dim, config.value_rank or shape.head_dim
    absorbed = _family(config) == "bloom"
    return _count(shape, config.num_key_value_heads, *ranks, absorbed, getattr(config, "output_bias", False))


def planned(config, plan: Plan) -> Sizes:
    """Sizes that the model of `config` will have; ValueError when the plan does not fit it."""
    shape, source = _source(config)
    absorbed = plan.stock or not source.rotates
    return _count(shape, *plan.layout(source), absorbed, plan.centred)


def moments(config, attention: bool = False) -> int:
    """Bytes of the sums that `kvteach.calibration.calibrate` collects; a run holds them twice."""
    with torch.device("meta"):
        empty = Moments.zeros(_source(config)[1], attention)
    return sum(tensor.nbytes for tensor in (*empty.gram.values(), *empty.total.values()))


def _source(config) -> tuple[cost.Shape, Source]:
    """An original's shape, and its identity but for the weights."""
    check_family(config)
    shape = _shape(config, getattr(config, "num_key_value_heads", None))
    widths = shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim
    return shape, Source(config.model_type, *widths, weights="")


def _family(config) -> str:
    return FAMILIES[config.model_type.removeprefix("kvteach_")]


def _shape(config, kv_heads: int | None) -> cost.Shape:
    """The original's shape."""
    fields = {name: getattr(config, name, None) for name in _FIELDS}
    model_type = config.model_type.removeprefix("kvteach_")
    return cost.Shape.from_config(
        SimpleNamespace(**fields, model_type=model_type, num_key_value_heads=kv_heads)
    )


def _count(
    shape: cost.Shape, groups: int, key_rank: int, value_rank: int, absorbed: bool, biased: bool
) -> Sizes:
    """Sizes of `shape` with this attention; `biased` when its output has a bias that the original may not have."""
    d, h, d_h = shape.hidden, shape.query_heads, shape.head_dim
    queries, keys = (h * key_rank, groups * key_rank) if absorbed else (h * d_h, shape.kv_heads * d_h)
    values = groups * value_rank
    basis = 0 if absorbed else (shape.kv_heads + h) * d_h * key_rank
    biases = shape.qkv_bias * (queries + keys + values) + (shape.out_bias or biased) * d
    attention = d * (queries + keys + values + h * value_rank) + basis + biases
    rest = cost.parameters(shape) - cost.attention_parameters(shape)
    # in numbers, not bytes: one byte each
    cached = cost.cache_bytes(shape, 1, bytes_per_number=1, ranks=(groups * key_rank, groups * value_rank))
    return Sizes(rest + shape.layers * attention, cached)
