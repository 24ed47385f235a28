"""A machine as a few rates: from data sheets, or measured here.

`kvteach.roofline` predicts with them. `read` and `matmul` are what data sheets tell. The others say how far real
operations stay behind, and only a measurement tells them: attention with several query heads on one cached head, a
matrix product with a row or a few, a tensor that gets longer, a layer with next to nothing in it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

COPIED = (2**20, 2**23, 2**26)  # bytes of the tensors that are copied


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
    """Measure this machine: every operation in turns, each rate the median of `repeats`; some seconds on a CPU.

    Parameters
    ----------
    device : ``cuda`` where there is one, else ``cpu``.
    dtype : torch.float32 by default.
    readers : for each the rate at which attention reads, t query heads on one cached head.
    rows : for each the rate at which a matrix product with so many rows reads weights.
    width : numbers of a head.
    fused : attention is scaled_dot_product_attention; False: two matrix products and a softmax, as in BLOOM.
    megabytes : size of what is read. By default 128, on a GPU 1024: more than any cache of the processor holds.

    Raises
    ------
    ValueError : repeats, readers, rows or megabytes below 1.
    """
    import torch

    from . import env

    device, dtype = torch.device(device or env.device()), dtype or torch.float32
    cuda = device.type == "cuda"
    total = (1024 if cuda else 128) if megabytes is None else megabytes
    for name, value in {
        "repeats": repeats,
        "megabytes": total,
        "readers": min(readers),
        "rows": min(rows),
    }.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it should be 1 or more")
    with torch.random.fork_rng():
        ways = _ways(device, dtype, total * 10**6, sorted(set(readers)), sorted(set(rows)), width, fused)
    took = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for name, (way, _) in ways.items():
                spent = timed(way, device)
                if turn:  # the first warms up
                    took[name].append(spent)
    rates = {name: amount / median(took[name]) for name, (_, amount) in ways.items()}

    def several(kind: str) -> dict:
        return {key: rate for (found, key), rate in rates.items() if found == kind}

    return Machine(
        name=torch.cuda.get_device_name(device) if cuda else "cpu",
        read=rates["read", None],
        matmul=rates["matmul", None],
        copy=several("copy"),
        launch=1 / rates["launch", None],
        attend=several("attend"),
        product=several("product"),
        memory=torch.cuda.get_device_properties(device).total_memory if cuda else None,
    )


def _ways(
    device, dtype, total: int, readers, rows, width: int, fused: bool
) -> dict[tuple, tuple[Callable, int]]:
    """(kind, key) -> what is done, and how many bytes, FLOPs or layers that counts."""
    import torch

    made, size = dict(device=device, dtype=dtype), dtype.itemsize
    attend = torch.nn.functional.scaled_dot_product_attention if fused else _unfused
    linear = torch.nn.functional.linear
    tokens = 8192 if total > 10**8 else 256
    heads = max(total // (2 * tokens * width * size), 1)
    keys, values = (torch.randn(1, heads, tokens, width, **made) for _ in range(2))
    held = keys.nbytes + values.nbytes
    side = 2048 if total > 10**8 else 128
    square = torch.randn(side, side, **made)
    weights = torch.randn(max(held // (side * side * size), 1), side, side, **made)
    ways = {
        ("read", None): (lambda: (keys.amax(), values.amax()), held),
        ("matmul", None): (lambda: square @ square, 2 * side**3),
        ("launch", None): _small_model(device, dtype),
    }
    for tensor in COPIED:  # so many that none stays in the processor
        parts = torch.randn(max(held // tensor, 1), tensor // size, **made)
        lengthen = lambda parts=parts: [torch.cat([part, part[:width]]) for part in parts]  # noqa: E731
        ways["copy", tensor] = (lengthen, parts.nbytes)
    for count in rows:
        states = torch.randn(count, side, **made)
        product = lambda states=states: [linear(states, weight) for weight in weights]  # noqa: E731
        ways["product", count] = (product, weights.nbytes)
    for t in readers:
        query = torch.randn(1, heads, t, width, **made)
        ways["attend", (t, width)] = (lambda query=query: attend(query, keys, values), held)
    return ways


def _unfused(query, keys, values):
    """Attention in three operations: [1, heads, t, d], [1, heads, tokens, d] twice -> [1, heads, t, d]."""
    return (query @ keys.mT).softmax(-1) @ values


def _small_model(device, dtype) -> tuple[Callable, int]:
    """One step of a model of next to nothing, and its layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=1, vocab_size=16)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).to(device, dtype).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, use_cache=True), 4


def timed(way: Callable, device) -> float:
    """Seconds that ``way()`` takes: CUDA's own events on a GPU, a monotonic clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
