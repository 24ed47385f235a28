"""Sizes: parameters and cache of a model, from its config alone, before anything is loaded.

`kvteach.cost` has the arithmetic; here is what shape a config or a plan has.
"""

from dataclasses import dataclass, replace

from . import cost
from .moments import Source
from .plan import Plan
from .zoo import check_family


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

    @classmethod
    def of_shape(cls, shape: cost.Shape) -> "Sizes":
        """Of a model of this shape."""
        return cls(cost.parameters(shape), cost.cache_bytes(shape, 1, bytes_per_number=1))


def of(config) -> Sizes:
    """Sizes of a model of the LLaMA, Mistral, Qwen2 or BLOOM family as it is, compressed or not."""
    if not config.model_type.startswith("kvteach_"):
        check_family(config)
    return Sizes.of_shape(cost.Shape.from_config(config))


def planned(config, plan: Plan) -> Sizes:
    """Sizes that the model of `config` will have; ValueError when the plan does not fit it."""
    return Sizes.of_shape(planned_shape(config, plan))


def planned_shape(config, plan: Plan) -> cost.Shape:
    """The shape that `plan` makes of the model of `config`; ValueError when it does not fit."""
    check_family(config)
    shape = cost.Shape.from_config(config)
    source = source_of(config)
    groups, key_rank, value_rank = plan.layout(source)
    form = "S" if plan.stock or not source.rotates else "R"
    small = shape.compress(groups, form, key_rank, value_rank)
    return replace(small, out_bias=small.out_bias or plan.centred, key_block=plan.block(source))


def source_of(config) -> Source:
    """The `Source` of a model whose weights were not read."""
    shape = cost.Shape.from_config(config)
    return Source(
        config.model_type, shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim, weights=""
    )
