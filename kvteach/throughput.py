"""How fast a model decodes: one measurement for every model, original or compressed.

    model, _ = zoo.load("mini-llama")
    models = {"8 heads": model} | {f"{g} heads": throughput.shaped(model, g) for g in (4, 2, 1)}
    found = throughput.sweep(models, contexts=[1024, 8192], batches=[1, 8])
    print(throughput.table(found))

At each point (context × batch) all models are there at once and decode in turns, in one process: A B, B A, A B …
What else runs on the machine then slows all alike, and the *ratio* of two models is that of each turn. The rates that
the prediction is made from are measured in the same turns. The tokens are drawn once, and every model is fed the same
ones: nothing depends on what a model would say. Steps are timed one by one, with CUDA's events on a GPU and a monotonic
clock elsewhere; the first turn warms up.

Speed does not depend on values. So `shaped` makes a compressed model with no calibration, and where a prefill would
take too long the cache is filled with random keys and values; the row says ``"filled": "random"``.

A cache that is small on paper only shows: its bytes are counted in its tensors, and one more step, not timed, runs
under a counter of tensors. ``expands`` is true when that step made a tensor over all cached tokens larger than any that
the cache holds, as repeating keys for each query head does.
"""

import datetime
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median, quantiles

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import convert, cost, roofline, sizes
from .activations import quiet
from .env import bars_off
from .grouping import by_order
from .machine import Machine, Meter, own_numbers, timed
from .memory import Made, Peak, free
from .plan import Plan

CACHES = ("static", "dynamic")
PATIENCE = 5  # seconds of one prefill, as predicted, above which random keys and values take its place
PREFILLS = 3
NO_ROOM = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
)  # in an error's sentence


def shaped(model, plan: Plan | int):
    """A model of the shape that `plan`, or ``Plan(kv_heads=plan)``, would make, without calibration.

    Its attention holds weights that were drawn or are zero: it is as fast as the real one, and says nothing.
    ValueError when the plan does not fit the model.
    """
    plan = plan if isinstance(plan, Plan) else Plan(kv_heads=plan)
    source = sizes.source_of(model.config)
    groups, _, _ = plan.layout(source)
    return convert.build(model, plan, source, [by_order(source.kv_heads, groups)] * source.layers)


def sweep(
    models: dict,
    contexts: Sequence[int] = (1024,),
    batches: Sequence[int] = (1,),
    cache: str = "static",
    steps: int = 4,
    repeats: int = 5,
    prefill: bool | None = None,
    machine: Machine | None = None,
    progress: bool = True,
) -> dict:
    """Measure every model at every point; the first model is what the others are compared with.

    Parameters
    ----------
    models : name -> causal language model, all with one vocabulary, on one device and in one dtype.
    contexts, batches : tokens in the cache when decoding starts, and sequences decoded together.
    cache : "static", written in place, or "dynamic", which ``generate`` uses and which copies itself for each token.
    steps, repeats : tokens decoded in one turn of a model, and turns that are timed.
    prefill : fill the cache by running a text (random tokens) through the model, or with random keys and values.
        None: by text, unless that is expected to take longer than `PATIENCE` seconds.
    machine : for the prediction; when None, its rates are measured in the same turns.

    Returns
    -------
    ``"made with"``: versions, device, threads, load. ``"rows"``, one for each model and point:

    - ``model, context, batch, kv_heads, cache, filled, attention, dtype``
    - ``prefill_seconds, first_token_seconds``: medians, None where the cache was filled at random; ``prefill_ratio``
      to the first model, turn by turn
    - ``step_seconds``, ``step_quartiles``: median and middle half of one step, which decodes `batch` tokens
    - ``tokens_per_second`` = batch / step_seconds, ``speedup`` over the first model, turn by turn
    - ``predicted`` tokens per second and ``predicted_seconds`` by part, from `kvteach.roofline` and the rates in
      ``machine``; ``bound``: tokens per second if weights and cache were read once at full bandwidth and nothing else
      took time
    - ``weight_bytes``, ``cache_bytes`` in the tensors of the cache, which has room for ``cache_tokens``,
      ``peak_bytes``: weights, cache and the most that a step or the prefill held besides (None where the system does
      not tell), ``expands``

    A model that runs out of memory has ``"error"`` in place of what was not measured, and the sweep goes on.

    Raises
    ------
    ValueError : no models, a context or batch below 1, models of several vocabularies, devices or dtypes.
    """
    check(contexts, batches, cache, steps, repeats)
    _comparable(models)
    first = next(iter(models.values()))
    meter = _Known(machine) if machine else _meter(models, batches, cache)
    points = [(context, batch) for context in contexts for batch in batches]
    rows = []
    for context, batch in tqdm(points, "decoding", disable=not progress or bars_off()):
        point = _Point(meter, context, batch, cache, steps, repeats, prefill)
        rows += point.measure(models)
    return {"made with": _made_with(first), "rows": rows}


def table(found: dict) -> str:
    """The rows of `sweep` for people; *bound* is the speed-up that the bytes allow."""
    rows, firsts = found["rows"], {}
    prefills, wide = any(row.get("prefill_seconds") for row in rows), max(len(row["model"]) for row in rows)
    lines = [
        f"{'model':<{wide}} {'context':>7} {'batch':>5} {'cache MB':>8} {'prefill s ' if prefills else ''}"
        f"{'ms/step':>8} {'± half':>6} {'tokens/s':>8} {'predicted':>9} {'speed-up':>8} {'bound':>5}"
    ]
    for row in rows:
        first = firsts.setdefault((row["context"], row["batch"]), row)
        line = f"{row['model']:<{wide}} {row['context']:>7} {row['batch']:>5} "
        if "error" in row:
            lines.append(line + row["error"])
            continue
        low, high = row["step_quartiles"]
        before = row["prefill_seconds"]
        filled = f"{'-' if before is None else format(before, '.3f'):>9} " if prefills else ""
        lines.append(
            f"{line}{row['cache_bytes'] / 1e6:>8.1f} {filled}"
            f"{row['step_seconds'] * 1e3:>8.2f} {(high - low) / 2 * 1e3:>6.2f} {row['tokens_per_second']:>8.1f} "
            f"{row['predicted']:>9.1f} {'-' if row['speedup'] is None else format(row['speedup'], '.2f'):>8} "
            f"{row['bound'] / first['bound']:>5.2f}"
            f"{'  expands its cache' if row['expands'] else ''}"
        )
    made = found["made with"]
    lines.append(
        f"{made['device']}, {made['dtype']}, {made['threads']} threads, load {made['load']}, torch {made['torch']}, "
        f"transformers {made['transformers']}"
    )
    return "\n".join(lines)


def _meter(models: dict, batches, cache: str) -> Meter:
    """For the rates that these models need."""
    first = next(iter(models.values()))
    shapes = [cost.Shape.from_config(model.config) for model in models.values()]
    attend = [roofline.reading(one) for one in shapes]
    fused = first.config._attn_implementation != "eager"
    return Meter(first.device, first.dtype, attend, batches, fused, masked=cache == "static")


@dataclass
class _Known:
    """In place of a meter, for a machine that is known."""

    known: Machine

    def clear(self) -> None:
        """Nothing was measured."""

    turn = clear

    def machine(self) -> Machine:
        """The known one."""
        return self.known


# ---------------------------------------------------------------------------------------------------------
# One point


class _Point:
    """All models at one context and batch."""

    def __init__(self, meter, context, batch, cache, steps, repeats, prefill):
        self.meter, self.context, self.batch, self.cache = meter, context, batch, cache
        self.steps, self.repeats, self.prefill = steps, repeats, prefill
        meter.clear()
        meter.turn()
        self.matmul = meter.machine().matmul  # so that how caches are filled does not change half-way

    def measure(self, models: dict) -> list[dict]:
        """A row for each model."""
        vocabulary = next(iter(models.values())).config.vocab_size
        # the prompt, then the tokens of each turn, a first one for warming up, and one to count tensors in
        tokens = self.context + self.steps * (self.repeats + 1) + 1
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (self.batch, tokens), generator=generator)
        rows, runs = {name: self._about(name, model) for name, model in models.items()}, {}
        with ExitStack() as stack:
            for name, model in models.items():
                stack.enter_context(quiet(model))
                with _out_of_memory(_ended(rows, runs, name)):
                    runs[name] = _Run(model, ids.to(model.device), self)
            self._in_turns(PREFILLS, rows, runs, _Run.fill)
            self._in_turns(self.repeats + 1, rows, runs, _Run.decode)
            for name in list(runs):
                with _out_of_memory(_ended(rows, runs, name)):
                    rows[name] |= runs[name].found()
        self._compare(rows, next(iter(models)), runs)
        for name, model in models.items():
            rows[name] |= self._predicted(model)
        return list(rows.values())

    def _in_turns(self, turns: int, rows: dict, runs: dict, act) -> None:
        """Every model once a turn; each second turn backwards, so that none is always the first."""
        for turn in range(turns):
            names = list(runs)
            for name in names if turn % 2 == 0 else reversed(names):
                with _out_of_memory(_ended(rows, runs, name)):
                    act(runs[name], turn)
            if act is _Run.decode:
                with _out_of_memory(lambda said: None):  # the rates of the turns before stand
                    self.meter.turn()

    def _about(self, name: str, model) -> dict:
        shape = cost.Shape.from_config(model.config)
        implementation = model.config._attn_implementation
        folded = model.config.model_type.startswith("kvteach_")
        return {
            "model": name,
            "context": self.context,
            "batch": self.batch,
            "kv_heads": shape.kv_heads,
            "cache": self.cache,
            "filled": "prefill" if self.by_text(shape) else "random",
            "attention": f"{implementation}, heads folded" if folded else implementation,
            "key_block": shape.key_block,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        }

    def _predicted(self, model) -> dict:
        machine, size = self.meter.machine(), model.dtype.itemsize
        where = cost.Shape.from_config(model.config), self.context, self.batch, size
        parts = roofline.seconds(machine, *where, grows=self.cache == "dynamic")
        plain = replace(where[0], key_block=None)  # reading is the bound, whatever a block costs
        bound = roofline.seconds(replace(machine, attend={}, product={}, launch={}), plain, *where[1:])
        return {
            "predicted": self.batch / sum(parts.values()),
            "predicted_seconds": parts,
            "bound": self.batch / sum(bound.values()),
            "machine": machine.as_dict(),
        }

    def by_text(self, shape: cost.Shape) -> bool:
        """True when a text fills the cache."""
        if self.prefill is not None:
            return self.prefill
        work = self.batch * sum(cost.flops(shape, new=self.context).values())
        return work / self.matmul <= PATIENCE

    def _compare(self, rows: dict, first: str, runs: dict) -> None:
        """Each model beside the first: medians over turns of the ratio within a turn."""
        for name, run in runs.items():
            other = runs.get(first)
            rows[name]["speedup"] = other and _ratio(map(median, other.turns), map(median, run.turns))
            rows[name]["prefill_ratio"] = other and _ratio(run.prefills, other.prefills)


class _Run:
    """One model at one point: its cache, and the seconds of its steps."""

    def __init__(self, model, ids: Tensor, point: _Point):
        self.model, self.ids, self.point = model, ids, point
        self.shape = cost.Shape.from_config(model.config)
        self.peak, self.before = Peak(model.device), Peak(model.device)  # of a step, and of the prefill
        self.turns: list[list[float]] = []
        self.prefills: list[float] = []
        self.firsts: list[float] = []
        self.past, self.at = None, point.context
        model(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1)  # warm up

    def fill(self, turn: int) -> None:
        """A cache of `context` tokens: by text in each turn, at random in the first."""
        by_text = self.point.by_text(self.shape)
        if turn and not by_text:
            return
        self.past = None  # the old one goes before the new one comes
        self._room()
        self.past = self._empty()
        if not by_text:
            with own_numbers(self.model.device):
                self._draw()
            return
        with self.before:
            self._prefill()

    def _room(self) -> None:
        """Refuse what cannot fit: when a CPU's memory ends, the system kills the process without an error."""
        need = cost.cache_bytes(self.shape, self.ids.shape[1], self.point.batch, self.model.dtype.itemsize)
        if self.model.device.type == "cpu" and (room := free()) is not None and need > room:
            raise MemoryError(f"the cache takes {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free")

    def _empty(self):
        from transformers import DynamicCache, StaticCache

        if self.point.cache == "dynamic":
            return DynamicCache(config=self.model.config)
        return StaticCache(config=self.model.config, max_cache_len=self.ids.shape[1])

    def _prefill(self) -> None:
        """Times until the cache is filled, and until the first new token is known."""
        prompt, kept, device = self.ids[:, : self.point.context], [], self.model.device
        options = dict(past_key_values=self.past, use_cache=True, logits_to_keep=1)
        filled = timed(lambda: kept.append(self.model(input_ids=prompt, **options)), device)
        self.prefills.append(filled)
        self.firsts.append(filled + timed(lambda: kept[0].logits[:, -1].argmax(-1).cpu(), device))

    def _draw(self) -> None:
        """Random keys and values, through the cache's own `update`."""
        made = dict(dtype=self.model.dtype, device=self.model.device)
        for layer in range(self.shape.layers):
            key, value = (
                torch.randn(self.point.batch, self.shape.kv_heads, self.point.context, width, **made)
                for width in self.shape.widths
            )
            self.past.update(key, value, layer)

    def _step(self) -> None:
        """One token of every sequence."""
        self.model(input_ids=self.ids[:, self.at : self.at + 1], past_key_values=self.past, use_cache=True)
        self.at += 1

    def decode(self, turn: int) -> None:
        """`steps` tokens; those of the first turn warm up."""
        spent = [timed(self._step, self.model.device) for _ in range(self.point.steps)]
        if turn:
            self.turns.append(spent)

    def found(self) -> dict:
        """What was measured, and one more step under the counters."""
        every = [spent for turn in self.turns for spent in turn]
        with self.peak, Made() as made:
            self._step()
        layers = self.past.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        slots = layers[0].keys.shape[-2]
        largest = max(tensor.nbytes for tensor in tensors)
        # the weights of softmax are over all cached tokens too, a number in fp32 at most for each query head
        scores = (
            self.point.batch * self.model.config.num_attention_heads * slots * max(4, tensors[0].itemsize)
        )
        cache = sum(tensor.nbytes for tensor in tensors)
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        # the prefill made the cache as well
        beyond = max(self.peak.bytes or 0, (self.before.bytes or 0) - cache)
        middle = median(every)
        return {
            "prefill_seconds": median(self.prefills) if self.prefills else None,
            "first_token_seconds": median(self.firsts) if self.firsts else None,
            "step_seconds": middle,
            "step_quartiles": [quantiles(every, n=4)[i] for i in (0, 2)] if len(every) > 1 else [middle] * 2,
            "steps": len(every),
            "tokens_per_second": self.point.batch / middle,
            "cache_bytes": cache,
            "cache_tokens": slots,
            "peak_bytes": None if self.peak.bytes is None else weights + cache + beyond,
            "expands": made.largest(slots) > max(largest, scores),
        }


def _ratio(above, below) -> float | None:
    """Median of the ratios, one a turn; None without any."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return median(ratios) if ratios else None


def _ended(rows: dict, runs: dict, name: str):
    """What is done when `name` has no room: its row says so, and its run ends."""

    def tell(said: str) -> None:
        rows[name]["error"] = f"out of memory: {said}" if said else "out of memory"
        runs.pop(name, None)

    return tell


@contextmanager
def _out_of_memory(tell) -> Iterator[None]:
    """Within, running out of memory is no error: ``tell(why)`` is called."""
    try:
        yield
        return
    except (MemoryError, torch.OutOfMemoryError) as error:
        said = str(error)
    except RuntimeError as error:  # the CPU's allocator has no class of its own, nor have CUDA's libraries
        said = str(error)
        if not any(words in said.lower() for words in NO_ROOM):
            raise
    tell(" ".join(said.split())[:120])  # out here the traceback, which holds the tensors, is gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _made_with(model) -> dict:
    device = model.device
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} {device.type}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def check(contexts, batches, cache: str = "static", steps: int = 1, repeats: int = 1) -> None:
    """Raise ValueError for points that `sweep` cannot measure, before anything is loaded."""
    counts = {"context": contexts, "batch": batches, "steps": [steps], "repeats": [repeats]}
    for name, values in counts.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it should be a whole number, 1 or more")
    if not (len(contexts) and len(batches)):
        raise ValueError("contexts and batches should each have a number or more")
    if cache not in CACHES:
        raise ValueError(f"cache is {cache!r}; it should be one of {', '.join(CACHES)}")


def _comparable(models: dict) -> None:
    if not models:
        raise ValueError("models is empty; give a name and a model, or several")
    for what, see in {
        "vocabularies": lambda model: model.config.vocab_size,
        "devices": lambda model: str(model.device),
        "dtypes": lambda model: str(model.dtype),
    }.items():
        seen = {name: see(model) for name, model in models.items()}
        if len(set(seen.values())) > 1:
            raise ValueError(
                f"the models have different {what}: {seen}; only those that decode the same tokens on one device in "
                "one dtype can be compared"
            )
