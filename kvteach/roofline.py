"""What a machine could do: the bytes and FLOPs of a decoding step against the rates of a device.

One step reads every weight once, and the keys and values of every sequence. With rates in bytes and FLOPs a second,

    weights     bytes of weights / product    or, where it is not known,  max(bytes / read, FLOPs / matmul)
    attention   bytes of cache / attend       or, where it is not known,  max(bytes / read, FLOPs / matmul)
    copy        bytes of cache / copy, where each token makes the cache a new tensor, as in transformers' DynamicCache
    launch      layers × the seconds of a layer with next to nothing in it: Python, and the start of each operation

    T = weights + attention + copy + launch seconds,       batch / T tokens a second

`read` is what the memory gives. `attend` is what attention gets of it: how fast scaled_dot_product_attention reads keys
and values when t = h / g query heads read each cached head; `product` what a matrix product with a row for each sequence
gets. On a CPU both fall as t or the batch grows: narrow products are far from the FLOPs of square ones. Without the two,
without copies and launches, T is the roofline (Williams et al., 2009).

Where nothing is known of the machine, the line T = a + b · x, with x the share g / h of the cache, is fitted to
measured steps: a is what does not depend on the cache, 1 + b / a the largest speed-up that a smaller cache can give.

    >>> shape = PAPER["LLaMA-2-7B"].shape
    >>> step = seconds(DATASHEETS["A100 80GB"], shape.compress(8, "G"), cached=2048, batch=32)
    >>> round(32 / sum(step.values()))
    3097
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from . import cost


@dataclass(frozen=True)
class Machine:
    """The rates of a device for one dtype, per second.

    Attributes
    ----------
    read : bytes read from memory.
    matmul : FLOPs of a large matrix product.
    copy : bytes of one tensor -> bytes that are copied when tensors of this size or larger get longer by a token; half
        of `read` where it is not known, as each byte is read and written. On a CPU tensors above some 32 MB are slow:
        the system hands out fresh pages for each.
    attend : (query heads of each cached head, its width) -> bytes of keys and values that attention reads;
        `read` and `matmul` say it where it is not known.
    product : sequences -> bytes of weights that a product with so many rows reads; likewise.
    launch : seconds, of a layer with next to nothing in it.
    memory : bytes, None when not known.
    """

    name: str
    read: float
    matmul: float
    copy: dict[int, float] = field(default_factory=dict)
    launch: float = 0
    attend: dict[tuple[int, int], float] = field(default_factory=dict)
    product: dict[int, float] = field(default_factory=dict)
    memory: float | None = None

    def __post_init__(self):
        """Refuse rates that no machine has."""
        rates = {"read": self.read, "matmul": self.matmul, "memory": self.memory}
        rates |= {f"copy[{key}]": rate for key, rate in self.copy.items()}
        rates |= {f"attend[{key}]": rate for key, rate in self.attend.items()}
        rates |= {f"product[{key}]": rate for key, rate in self.product.items()}
        for name, rate in rates.items():
            if rate is not None and not rate > 0:  # NaN is not above 0 either
                raise ValueError(f"{name} is {rate!r}; it should be above 0")
        if not self.launch >= 0:
            raise ValueError(f"launch is {self.launch!r}; it should be 0 seconds or more")

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        attend = [
            {"readers": readers, "width": width, "bytes": rate}
            for (readers, width), rate in self.attend.items()
        ]
        copy = [{"tensor": size, "bytes": rate} for size, rate in self.copy.items()]
        plain = {name: getattr(self, name) for name in ("name", "read", "matmul", "launch", "memory")}
        product = [{"rows": rows, "bytes": rate} for rows, rate in self.product.items()]
        return plain | {"copy": copy, "attend": attend, "product": product}

    def copies(self, size: float) -> float:
        """Bytes of tensors of that size which are copied in a second."""
        known = [rate for least, rate in sorted(self.copy.items()) if least <= size]
        return known[-1] if known else self.copy[min(self.copy)] if self.copy else self.read / 2


# Vendors' data sheets: bandwidth of the memory, dense fp16 on the tensor cores. Nobody reaches them.
DATASHEETS = {
    "T4": Machine("T4", read=320e9, matmul=65e12, memory=16e9),
    "A100 80GB": Machine("A100 80GB", read=2039e9, matmul=312e12, memory=80e9),
    "H100 SXM": Machine("H100 SXM", read=3350e9, matmul=989e12, memory=80e9),
}


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
    "weights", "attention", "copy" and "launch", in seconds.
    """
    moved = cost.decode_bytes(shape, cached, batch, bytes_per_number, bytes_per_number)
    work = cost.flops(shape, new=1, cached=cached)
    attention = batch * work.pop("attention")

    def part(size, flops, known):
        return size / known if known else max(size / machine.read, flops / machine.matmul)

    product = machine.product.get(batch)
    attend = machine.attend.get((shape.query_heads // shape.kv_heads, shape.widths[0]))
    return {
        "weights": part(moved["weights"], batch * sum(work.values()), product),
        "attention": part(moved["cache"], attention, attend),
        # a layer's keys are one tensor, its values another
        "copy": grows * moved["cache"] / machine.copies(moved["cache"] / shape.layers / 2),
        "launch": shape.layers * machine.launch,
    }


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


# ---------------------------------------------------------------------------------------------------------
# The rates of this device


COPIED = (2**20, 2**23, 2**26)  # bytes of the tensors that are copied


def measure(
    device: str | None = None,
    dtype=None,
    readers: Sequence[int] = (1,),
    rows: Sequence[int] = (1,),
    width: int = 64,
    fused: bool = True,
    repeats: int = 5,
    megabytes: int | None = None,
) -> Machine:
    """Measure the rates of a device, in turns and each the median of `repeats`; about two seconds on a CPU.

    Parameters
    ----------
    device : ``cuda`` where there is one, else ``cpu``.
    dtype : torch.float32 by default.
    readers : for each the rate at which attention reads, t query heads on one cached head.
    rows : for each the rate at which a matrix product with so many rows reads weights.
    width : numbers of a head.
    fused : attention is scaled_dot_product_attention; False: two matrix products and a softmax, as in BLOOM.
    megabytes : size of what is read. By default 128, on a GPU 1024: more than any cache of the processor holds.
    """
    import torch

    from . import env

    device = torch.device(device or env.device())
    dtype = dtype or torch.float32
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it should be 1 or more")
    total = (megabytes or (1024 if device.type == "cuda" else 128)) * 10**6
    size = torch.empty((), dtype=dtype).element_size()
    made = dict(device=device, dtype=dtype)
    tokens = 8192 if total > 10**8 else 256
    heads = max(total // (2 * tokens * width * size), 1)
    keys, values = torch.randn(1, heads, tokens, width, **made), torch.randn(1, heads, tokens, width, **made)
    side = 2048 if total > 10**8 else 128
    square = torch.randn(side, side, **made)
    held = keys.nbytes + values.nbytes
    attend = torch.nn.functional.scaled_dot_product_attention if fused else _unfused
    layer, layers = _small_model(device, dtype)
    # name -> what is done, and how many bytes or FLOPs it counts
    ways = {
        "read": (lambda: (keys.amax(), values.amax()), held),
        "matmul": (lambda: square @ square, 2 * side**3),
        "launch": (layer, layers),
    }
    for tensor in COPIED:  # `held` bytes in tensors of that size, so that none stays in the processor
        tensor = min(tensor, held)
        parts = torch.randn(held // tensor, tensor // size, **made)
        ways["copy", tensor] = (
            lambda parts=parts: [torch.cat([part, part[:width]]) for part in parts],
            parts.nbytes,
        )
    side = 1024 if total > 10**8 else 64
    weights = torch.randn(max(held // (4 * side * side * size), 1), 4 * side, side, **made)
    for count in sorted(set(rows)):
        states = torch.randn(count, side, **made)
        ways["product", count] = (
            lambda states=states: [torch.nn.functional.linear(states, weight) for weight in weights],
            weights.nbytes,
        )
    for t in sorted(set(readers)):
        query = torch.randn(1, heads, t, width, **made)
        ways["attend", t] = (lambda query=query: attend(query, keys, values), held)
    took = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for name, (way, _) in ways.items():
                spent = timed(way, device)
                if turn:  # the first warms up
                    took[name].append(spent)
    rates = {name: amount / median(took[name]) for name, (_, amount) in ways.items()}
    sizes = [(key, rate) for key, rate in rates.items() if isinstance(key, tuple)]
    return Machine(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        read=rates.pop("read"),
        matmul=rates.pop("matmul"),
        copy={size: rate for (kind, size), rate in sizes if kind == "copy"},
        launch=1 / rates.pop("launch"),
        product={count: rate for (kind, count), rate in sizes if kind == "product"},
        attend={(t, width): rate for (kind, t), rate in sizes if kind == "attend"},
        memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    )


def _unfused(query, keys, values):
    """Attention in three operations: [1, heads, t, d], [1, heads, tokens, d] twice -> [1, heads, t, d]."""
    return (query @ keys.mT).softmax(-1) @ values


def _small_model(device, dtype):
    """One step of a model of next to nothing, and its layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=1, vocab_size=16)
    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).to(device, dtype).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, use_cache=True), 4


def timed(way, device) -> float:
    """Seconds that ``way()`` takes: CUDA's own events on a GPU, a monotonic clock elsewhere."""
    import torch

    if device.type != "cuda":
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
