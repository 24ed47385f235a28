"""What a machine could do: the bytes and FLOPs of a decoding step against the rates of a device.

One step reads every weight once, and the keys and values of every sequence. With rates in bytes and FLOPs a second,

    weights     bytes of weights / product    or, where it is not known,  max(bytes / read, FLOPs / matmul)
    attention   bytes of cache / attend       or, where it is not known,  max(bytes / read, FLOPs / matmul)
    copy        bytes of cache / copy, where each token makes the cache a new tensor, as in transformers' DynamicCache
    launch      layers × the seconds of a layer with next to nothing in it: Python, and the start of each operation

    T = weights + attention + copy + launch seconds,       batch / T tokens a second

where operations start while others run, as on a GPU, launch is only what is longer than all the rest.

`read` is what the memory gives. `attend` is what attention gets of it: how fast it reads keys and values when t = h / g
query heads read each cached head, at once or in blocks, for each of which a query is turned and mapped. `product` is
what a matrix product with one row for each sequence gets. On a CPU both fall as t or the batch grows: narrow products
are far from the FLOPs of square ones. With neither, without copies and launches, T is the roofline (Williams et al.,
2009).

Where nothing is known of the machine, the line T = a + b · x, with x the share g / h of the cache, is fitted to
measured steps: a is what does not depend on the cache, 1 + b / a the largest speed-up that a smaller cache can give.

    >>> from kvteach.machine import DATASHEETS
    >>> shape = PAPER["LLaMA-2-7B"].shape
    >>> step = seconds(DATASHEETS["A100 80GB"], shape.compress(8, "G"), cached=2048, batch=32)
    >>> round(32 / sum(step.values()))
    3097
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import cost
from .machine import Machine, Reading


def seconds(
    machine: Machine,
    shape: cost.Shape,
    cached: int,
    batch: int = 1,
    bytes_per_number: float = 2,
    grows: bool = False,
) -> dict[str, float]:
    """One step of decoding, by part; the sum is the whole. Parameters as in `cost.decode_bytes`.

    Parameters
    ----------
    grows : each token makes the cache a new, longer tensor, as in DynamicCache.

    Returns
    -------
    "weights", "attention", "copy" and "launch", in seconds; of launches what the others do not cover.
    """
    work = cost.flops(shape, new=1, cached=cached)
    once = cost.flops(replace(shape, key_block=None), new=1, cached=cached)["basis"]
    moved = cost.decode_bytes(shape, cached, batch, bytes_per_number, bytes_per_number)
    # with blocks attention maps a query for each
    attention = batch * (work.pop("attention") + work.pop("basis") - once)

    def part(size, flops, known):
        return size / known if known else max(size / machine.read, flops / machine.matmul)

    taken = {
        "weights": part(moved["weights"], batch * (once + sum(work.values())), machine.product.get(batch)),
        "attention": part(moved["cache"], attention, machine.attend.get(reading(shape))),
        # a layer's keys are one tensor, its values another
        "copy": grows * moved["cache"] / machine.copies(moved["cache"] / shape.layers / 2),
    }
    kind = "blocks" if shape.key_block else "basis" if shape.form in ("G", "R") else "plain"
    launch = shape.layers * machine.launch.get((kind, batch), machine.launch.get(("plain", batch), 0))
    return taken | {"launch": max(launch - sum(taken.values()), 0) if machine.overlaps else launch}


def reading(shape: cost.Shape) -> Reading:
    """What the rate of attention depends on: a key of `Machine.attend`."""
    readers, (width, _) = shape.query_heads // shape.kv_heads, shape.widths
    return Reading(readers, width, *((shape.key_block, shape.head_dim) if shape.key_block else ()))


def fit(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """a and b of T = a + b · x with the smallest relative errors, Σ ((a + b · x) / T − 1)².

    ValueError for fewer than two different x, other lengths, or a time that is not above 0.
    """
    x, measured = np.asarray(x, float), np.asarray(seconds, float)
    if x.ndim != 1 or x.shape != measured.shape:
        raise ValueError(
            f"x and seconds should be two lists of one length; got {x.shape} and {measured.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError("x and seconds should be finite, and seconds above 0")
    if len(set(x.tolist())) < 2:
        raise ValueError(f"x has {len(set(x.tolist()))} different values; a line needs two or more")
    rows = np.stack([np.ones_like(x), x], 1) / measured[:, None]
    a, b = np.linalg.lstsq(rows, np.ones_like(x))[0]
    return float(a), float(b)


# ---------------------------------------------------------------------------------------------------------
# The paper's three columns of tokens per second


@dataclass(frozen=True)
class Column:
    """Tokens per second of one model by key-value heads."""

    shape: cost.Shape
    speed: dict[int, float]


def _llama(layers: int, hidden: int, heads: int, intermediate: int) -> cost.Shape:
    return cost.Shape(layers, hidden, heads, heads, hidden // heads, intermediate, vocab=32000, tied=False)


_BLOOM = cost.Shape(
    layers=30, hidden=4096, query_heads=32, kv_heads=32, head_dim=128, intermediate=16384, vocab=250880,
    gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True, embedding_norm=True,
)  # fmt: skip

# Yu et al. (2024), arXiv 2406.07056: one A100 80GB, 2048 tokens in the cache. The batch is not told.
PAPER = {
    "LLaMA-2-7B": Column(_llama(32, 4096, 32, 11008), {32: 8.05, 16: 13.41, 8: 20.81}),
    "LLaMA-2-13B": Column(_llama(40, 5120, 40, 13824), {40: 5.04, 20: 8.60, 10: 13.93}),
    "BLOOMZ-7B1": Column(_BLOOM, {32: 8.56, 16: 14.41, 8: 23.24, 4: 34.78}),
}


@dataclass(frozen=True)
class Implied:
    """What a column of tokens per second says about the run that nobody described, read as steps per second.

    Attributes
    ----------
    a, b : seconds; T = a + b · g / h.
    error : the largest relative error of the line.
    ceiling : the speed-up that no cache at all would give.
    batch : sequences whose whole cache takes b seconds to read once.
    fits : sequences that the memory has room for beside the weights.
    passes : how often `fits` sequences must be read or written in b seconds. Above 1, a step moves its cache more than
        once (or slower than the data sheet says).
    """

    a: float
    b: float
    error: float
    ceiling: float
    batch: float
    fits: int
    passes: float


def implied(column: Column, machine: Machine, cached: int = 2048, bytes_per_number: float = 2) -> Implied:
    """Fit T = a + b · g / h to a column and read b as traffic of the cache on `machine`."""
    if machine.memory is None:
        raise ValueError(f"the memory of {machine.name!r} is not known: give Machine(memory=…) in bytes")
    shape, share = column.shape, [heads / column.shape.kv_heads for heads in column.speed]
    steps = [1 / speed for speed in column.speed.values()]
    a, b = fit(share, steps)
    one = cost.cache_bytes(shape, cached, bytes_per_number=bytes_per_number)
    room = machine.memory - cost.parameters(shape) * bytes_per_number
    fits = max(int(room // one), 0)
    batch = b * machine.read / one
    error = max(abs((a + b * x) / step - 1) for x, step in zip(share, steps, strict=True))
    return Implied(a, b, error, (a + b) / a, batch, fits, batch / fits if fits else float("inf"))
