"""A machine as a few rates: from data sheets, or measured here.

`kvteach.roofline` predicts with them. `read` and `matmul` are what data sheets tell. The others say how far real
operations stay behind, and only a measurement tells them: attention with several query heads on one cached head, a
matrix product with a row or a few, a tensor that gets longer, a layer with next to nothing in it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

LAYERS = ("plain", "basis", "blocks")  # kinds of attention, by their small operations
COPIED = (2**20, 2**23, 2**26)  # bytes of the tensors that are copied


class Reading(NamedTuple):
    """How attention reads a cache, as far as its rate depends on it.

    Attributes
    ----------
    readers : query heads of each cached head.
    width : numbers of a cached key.
    block : tokens of a block, 0 where keys are not turned within blocks.
    query : numbers of a query before it is turned and mapped for each block; 0 without blocks.
    """

    readers: int
    width: int
    block: int = 0
    query: int = 0


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
    attend : bytes of keys and values that attention reads; `read` and `matmul` say it where it is not known.
    product : sequences -> bytes of weights that a product with so many rows reads; likewise.
    launch : (kind, sequences) -> seconds of a layer with next to nothing in it: "plain", with a "basis", or with one
        and "blocks". Without those of a kind, "plain" stands for it; 0 where nothing is known.
    overlaps : True where operations are started while others still run, as on a GPU: a step then takes the longer of
        its launches and everything else.
    memory : bytes, None when not known.
    """

    name: str
    read: float
    matmul: float
    copy: dict[int, float] = field(default_factory=dict)
    launch: dict[tuple[str, int], float] = field(default_factory=dict)
    overlaps: bool = False
    attend: dict[Reading, float] = field(default_factory=dict)
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
        for key, taken in self.launch.items():
            if not taken >= 0:
                raise ValueError(f"launch[{key}] is {taken!r}; it should be 0 seconds or more")

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        attend = [reading._asdict() | {"bytes": rate} for reading, rate in self.attend.items()]
        copy = [{"tensor": size, "bytes": rate} for size, rate in self.copy.items()]
        launch = [
            {"kind": kind, "rows": rows, "seconds": taken} for (kind, rows), taken in self.launch.items()
        ]
        plain = {name: getattr(self, name) for name in ("name", "read", "matmul", "overlaps", "memory")}
        product = [{"rows": rows, "bytes": rate} for rows, rate in self.product.items()]
        return plain | {"copy": copy, "attend": attend, "product": product, "launch": launch}

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


def measure(*args, repeats: int = 5, **options) -> Machine:
    """This machine, each rate the median of `repeats` turns; a few seconds on a CPU. The rest as for `Meter`."""
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it should be 1 or more")
    meter = Meter(*args, **options)
    for _ in range(repeats):
        meter.turn()
    return meter.machine()


class Meter:
    """Measures a machine in turns, so that something else can be measured in between.

    Parameters
    ----------
    device : ``cuda`` where there is one, else ``cpu``.
    dtype : torch.float32 by default.
    attend : the rates at which attention reads.
    rows : sequences: the rates at which matrix products with so many rows read weights, and what their layers launch.
    fused : attention is scaled_dot_product_attention; False: two matrix products and a softmax, as in BLOOM.
    masked : attention is given a mask, as for a static cache: on a GPU that is another kernel.
    megabytes : what is read, and held meanwhile. By default 128, on a GPU 512: more than any processor's own cache.

    Raises
    ------
    ValueError : a number below 1, a block without a query or a query without a block.
    """

    def __init__(
        self,
        device=None,
        dtype=None,
        attend: Sequence[Reading] = (Reading(1, 64),),
        rows: Sequence[int] = (1,),
        fused: bool = True,
        masked: bool = False,
        megabytes: int | None = None,
    ):
        import torch

        from . import env

        self.device = torch.device(device or env.device())
        if megabytes is None:
            megabytes = 512 if self.device.type == "cuda" else 128
        attend = [Reading(*one) for one in attend]
        if odd := [one for one in attend if one.block < 0 or (one.block > 0) != (one.query > 0)]:
            raise ValueError(f"attend has {odd[0]}; block and query should both be 0, or both 1 or more")
        lowest = {"megabytes": megabytes, "attend": min(min(key[:2]) for key in attend), "rows": min(rows)}
        for name, value in lowest.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it should be 1 or more")
        with own_numbers(self.device):
            made = dict(device=self.device, dtype=dtype or torch.float32)
            self.ways = _ways(
                torch.randn(megabytes * 2**20 // made["dtype"].itemsize, **made), attend, rows, fused, masked
            )
        self.took = {name: [] for name in self.ways}
        self.turn()
        self.clear()  # that was to warm up

    def turn(self) -> None:
        """Every operation, each time after one that is not counted."""
        import torch

        with torch.no_grad():
            for name, (way, _) in self.ways.items():
                # In the middle of a text all is warm. But a layer meets the processor as its weights have left it.
                layer = name[0] == "launch"
                before = self.ways["product", name[1][1]][0] if layer else way
                for _ in range(3 if layer else 1):  # short times scatter most
                    timed(before, self.device)
                    self.took[name].append(timed(way, self.device))

    def clear(self) -> None:
        """Forget all turns."""
        self.took = {name: [] for name in self.ways}

    def machine(self) -> Machine:
        """The medians of all turns."""
        import torch

        rates = {name: amount / median(self.took[name]) for name, (_, amount) in self.ways.items()}

        def several(kind: str) -> dict:
            return {key: rate for (found, key), rate in rates.items() if found == kind}

        card = torch.cuda.get_device_properties(self.device) if self.device.type == "cuda" else None
        return Machine(
            name=card.name if card else "cpu",
            read=rates["read", None],
            matmul=rates["matmul", None],
            copy=several("copy"),
            overlaps=card is not None,
            launch={key: 1 / rate for key, rate in several("launch").items()},
            attend=several("attend"),
            product=several("product"),
            memory=card.total_memory if card else None,
        )


def _ways(flat, attend, rows, fused: bool, masked: bool) -> dict[tuple, tuple[Callable, int]]:
    """(kind, key) -> what is done, and how many bytes, FLOPs or layers that counts. All of it reads `flat`."""
    import torch

    made, size, count = dict(device=flat.device, dtype=flat.dtype), flat.itemsize, flat.numel()
    small = count < 2**22
    # so large that a GPU is busy for longer than it takes to start the product
    side = 128 if small else 4096 if flat.device.type == "cuda" else 1024
    weights = _split(flat, side * side).view(-1, side, side)
    ways = {
        ("read", None): (lambda: flat.amax(), flat.nbytes),
        ("matmul", None): (lambda: weights[0] @ weights[1], 2 * side**3),
    }
    for tensor in COPIED:
        parts = _split(flat, min(tensor // size, count))  # so many that none stays in the processor
        lengthen = lambda parts=parts: [torch.cat([part, part[:64]]) for part in parts]  # noqa: E731
        ways["copy", tensor] = (lengthen, parts.nbytes)
    for number in sorted(set(rows)):
        states = torch.randn(number, side, **made)
        product = lambda states=states: [torch.nn.functional.linear(states, weight) for weight in weights]  # noqa: E731
        ways["product", number] = (product, weights.nbytes)
        ways |= {("launch", (kind, number)): _small_model(kind, number, **made) for kind in LAYERS}
    for reading in sorted(set(attend)):
        ways["attend", reading] = _attention(flat, reading, 256 if small else 8192, fused, masked)
    return ways


def _attention(flat, reading: Reading, tokens: int, fused: bool, masked: bool) -> tuple[Callable, int]:
    """Attention of one new token over as many cached heads as `flat` holds, and the bytes of their keys and values.

    With blocks half a block is added, as most caches end within one.
    """
    import torch

    from .models.blocks import softmax_row

    made = dict(device=flat.device, dtype=flat.dtype)
    t, width, block, wide = reading
    tokens += block // 2
    heads = max(flat.numel() // (2 * tokens * width), 1)
    keys, values = flat[: 2 * heads * tokens * width].view(2, heads, 1, tokens, width)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=flat.device) if masked else None
    if block:
        query, maps = torch.randn(heads, t, 1, wide, **made), torch.randn(t, wide, width, **made)
        turns = torch.ones(2, -(-tokens // block), wide, device=flat.device)
        row = lambda: softmax_row(query, keys, maps, *turns, block, mask)  # noqa: E731
        return lambda: row().to(flat.dtype) @ values, keys.nbytes + values.nbytes
    attention = torch.nn.functional.scaled_dot_product_attention if fused else _unfused
    query = torch.randn(heads, 1, t, width, **made)
    return lambda: attention(query, keys, values, mask), keys.nbytes + values.nbytes


def _split(flat, size: int):
    """[numbers] -> [parts, size]; what is left over is left out."""
    return flat[: len(flat) // size * size].view(-1, size)


def _unfused(query, keys, values, mask):
    """Attention in four operations: [heads, 1, t, d], [heads, 1, tokens, d] twice -> [heads, 1, t, d]."""
    scores = query @ keys.mT
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ values


def _small_model(kind: str, sequences: int, device, dtype) -> tuple[Callable, int]:
    """One step of a model of next to nothing, and its layers."""
    import torch

    from .models.llama import KvteachLlamaConfig, KvteachLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=16, intermediate_size=16, num_attention_heads=1, num_hidden_layers=4, vocab_size=16
    )
    if kind == "plain":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = KvteachLlamaForCausalLM(
            KvteachLlamaConfig(**sizes, key_block=64 if kind == "blocks" else None)
        )
    model = model.to(device, dtype).eval()
    ids = torch.zeros(sequences, 1, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, use_cache=True), 4


def timed(way: Callable, device) -> float:
    """Seconds that ``way()`` takes: CUDA's own events on a GPU, a monotonic clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    import torch

    with torch.cuda.device(device):  # events count on the stream of the current one
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def own_numbers(device):
    """A context whose random numbers leave the generators as they were."""
    import torch

    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
