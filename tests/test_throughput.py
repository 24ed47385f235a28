"""What a measurement must be, whatever the speed: the same tokens, in turns, every byte counted, nothing hidden."""

import functools
import json

import pytest
import tiny
import torch

from kvteach import cost, throughput
from kvteach.calibration import calibrate
from kvteach.convert import compress
from kvteach.cost import BLOCK
from kvteach.machine import Machine, Meter
from kvteach.memory import Made, Peak
from kvteach.plan import Plan

MACHINE = Machine("none", read=1e10, matmul=1e11)
FEW = dict(steps=2, repeats=2, machine=MACHINE, progress=False)


def pair(name="llama-mha", heads=2, **kw):
    model = tiny.MODELS[name](**kw)
    return {"model": model, "small": throughput.shaped(model, heads)}


def watched(models, monkeypatch) -> list:
    """(name, ids) of every forward pass, in order."""
    seen = []
    for name, model in models.items():
        inner = model.forward

        def forward(*args, _inner=inner, _name=name, **kwargs):
            seen.append((_name, kwargs["input_ids"].clone()))
            return _inner(*args, **kwargs)

        monkeypatch.setattr(model, "forward", forward)
    return seen


@pytest.mark.parametrize("cache", throughput.CACHES)
@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("name, heads", [("llama-mha", 2), ("llama-gqa", 1), ("qwen2", 1), ("bloom", 2)])
def test_a_row_holds_what_the_formulas_say(name, heads, prefill, cache):
    models = pair(name, heads)
    found = throughput.sweep(models, [11, 5], [3], cache=cache, prefill=prefill, **FEW)
    assert [(row["model"], row["context"], row["batch"]) for row in found["rows"]] == [
        ("model", 11, 3), ("small", 11, 3), ("model", 5, 3), ("small", 5, 3)
    ]  # fmt: skip
    for row in found["rows"]:
        shape = cost.Shape.from_config(models[row["model"]].config)
        assert row["cache_tokens"] == row["context"] + 2 * (2 + 1) + 1
        assert row["cache_bytes"] == cost.cache_bytes(shape, row["cache_tokens"], 3, bytes_per_number=8)
        assert row["weight_bytes"] == 8 * cost.parameters(shape)
        assert row["kv_heads"] == shape.kv_heads and row["cache"] == cache and row["dtype"] == "float64"
        assert row["tokens_per_second"] == 3 / row["step_seconds"] and row["steps"] == 4
        low, high = row["step_quartiles"]
        assert 0 < low <= row["step_seconds"] <= high
        assert row["predicted"] == pytest.approx(3 / sum(row["predicted_seconds"].values()))
        assert row["filled"] == ("prefill" if prefill else "random")
        assert (row["prefill_seconds"] is None) is not prefill
        if prefill:
            assert 0 < row["prefill_seconds"] < row["first_token_seconds"]
        assert not row["expands"] and "error" not in row
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["cache_bytes"] + row["weight_bytes"]
    assert found["rows"][0]["speedup"] == 1 and found["rows"][1]["speedup"] > 0
    assert json.loads(json.dumps(found)) == found
    table = throughput.table(found)
    assert len(table.splitlines()) == 6 and "small" in table and "float64, " in table


def test_all_models_decode_the_same_tokens_in_turns(monkeypatch):
    models = pair() | {"third": tiny.MODELS["llama-gqa"]()}
    seen = watched(models, monkeypatch)
    throughput.sweep(models, [9], [2], prefill=True, **FEW)
    streams = {name: [ids for who, ids in seen if who == name] for name in models}
    for name, stream in streams.items():
        assert len(stream) == len(streams["model"]), name
        assert all(torch.equal(one, other) for one, other in zip(stream, streams["model"], strict=True))
    # a warm-up of each, then prefills, then turns of two steps, every second one backwards; at last the counted steps
    a, b, c = models
    there, back = [a, b, c], [c, b, a]
    steps = [name for order in (there, back, there) for name in order for _ in range(2)]
    assert [name for name, _ in seen] == [*there, *there, *back, *there, *steps, *there]
    # no token twice: each step feeds the next of the text
    fed = torch.cat([ids for ids in streams["model"][4:]], 1)
    assert fed.shape == (2, 7) and torch.equal(streams["model"][1], streams["model"][3])


def test_the_made_up_model_is_as_large_as_the_real_one():
    model = tiny.MODELS["llama-mha"]()
    moments = calibrate(model, tiny.ids(8), attention=True, progress=False)
    for plan in (Plan(kv_heads=2), Plan(kv_heads=1, stock=True), Plan(kv_ratio=0.5)):
        made, real = throughput.shaped(model, plan), compress(model, moments, plan, progress=False)
        assert type(made) is type(real) and made.dtype == real.dtype
        sizes = [{name: x.shape for name, x in one.named_parameters()} for one in (made, real)]
        assert sizes[0] == sizes[1]
    with pytest.raises(ValueError, match="kv_heads is 3; for 4 key-value heads"):
        throughput.shaped(model, 3)


@pytest.mark.parametrize("cache", throughput.CACHES)
def test_a_model_that_repeats_its_keys_is_told(cache):
    """transformers' eager attention repeats them for each query head; its sdpa and our folded heads do not."""
    models = {"folded": pair(heads=1)["small"], "eager": tiny.MODELS["llama-mqa-bias"]()}
    models["eager"].set_attn_implementation("eager")
    rows = throughput.sweep(models, [40], [2], cache=cache, **FEW)["rows"]
    assert [row["expands"] for row in rows] == [False, True]
    assert "expands its cache" in throughput.table(
        {"rows": rows, "made with": throughput._made_with(models["eager"])}
    )


def out_of_memory(kind, words):
    def forward(*args, **kwargs):
        if kwargs["input_ids"].shape == (3, 1):
            raise kind(words)
        return forward.inner(*args, **kwargs)

    return forward


@pytest.mark.parametrize(
    "kind, words",
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (MemoryError, ""),
    ],
)
@pytest.mark.parametrize("broken", ["model", "small"])
def test_out_of_memory_is_a_row_and_the_sweep_goes_on(monkeypatch, kind, words, broken):
    models = pair()
    forward = out_of_memory(kind, words)
    forward.inner = models[broken].forward
    monkeypatch.setattr(models[broken], "forward", forward)
    found = throughput.sweep(models, [6], [3, 2], **FEW)
    rows = {(row["model"], row["batch"]): row for row in found["rows"]}
    assert len(rows) == 4 and [key for key, row in rows.items() if "error" in row] == [(broken, 3)]
    assert rows[broken, 3]["error"].startswith("out of memory") and "step_seconds" not in rows[broken, 3]
    other = "small" if broken == "model" else "model"
    assert rows[other, 3]["speedup"] == (None if broken == "model" else 1)
    assert rows["small", 2]["speedup"] > 0
    assert "out of memory" in throughput.table(found)
    json.dumps(found)


def test_rates_stand_where_there_is_no_room_to_measure_them_again(monkeypatch):
    class Full(Meter):
        turns = 0

        def turn(self):
            Full.turns += 1
            if Full.turns > 2:  # to warm up, and before the first point is measured
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().turn()

    monkeypatch.setattr(throughput, "Meter", functools.partial(Full, megabytes=1))
    rows = throughput.sweep(pair(), [4], [2], prefill=False, **FEW | {"machine": None})["rows"]
    assert Full.turns > 2 and all(row["predicted"] > 0 and "error" not in row for row in rows)


def test_a_prefill_that_makes_the_cache_does_not_count_it_twice(monkeypatch):
    class Told(Peak):
        made = 0

        def __init__(self, device):
            super().__init__(device)
            Told.made += 1
            self.told = 7 if Told.made % 2 else 5 * 10**9  # of a step, then of the prefill

        def __exit__(self, *error):
            self.bytes = self.told

    monkeypatch.setattr(throughput, "Peak", Told)
    for prefill, beyond in ((True, 5 * 10**9), (False, None)):
        for row in throughput.sweep(pair(), [4], [2], prefill=prefill, **FEW)["rows"]:
            assert row["peak_bytes"] == row["weight_bytes"] + (beyond or row["cache_bytes"] + 7)


def test_what_cannot_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(throughput, "free", lambda: 10_000)
    rows = throughput.sweep(pair(), [4, 4000], [1], **FEW)["rows"]
    # 4 heads · 16 · 2 · 3 layers · 8 bytes a token: 3072; 11 tokens are too many, those of two heads are too
    assert all(row["error"].startswith("out of memory: the cache takes") for row in rows)


def test_what_is_made_is_neither_a_view_nor_in_place():
    x = torch.ones(3, 5)
    with Made() as made:
        x.t().view(5, 3)[1:].add_(1)
        y = x.repeat(2, 1)
        y[:, :1].mul_(2)
    assert made.largest(5) == y.nbytes and made.largest(6) == y.nbytes and made.largest(4) == 0


def test_the_peak_is_what_was_held_within():
    held = Peak(torch.device("cpu"))
    with held:
        torch.ones(2**24).sum()  # 64 MB, above what the allocator keeps for later
    if held.bytes is None:
        pytest.skip("this system does not tell how much memory was held")
    first = held.bytes
    assert 0.9 * 2**26 < first < 2**28
    with held:
        pass
    assert held.bytes == first  # the most over all uses


def test_other_errors_are_errors(monkeypatch):
    models = pair()
    forward = out_of_memory(RuntimeError, "shapes do not match")
    forward.inner = models["small"].forward
    monkeypatch.setattr(models["small"], "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        throughput.sweep(models, [6], [3], **FEW)


def test_models_come_back_as_they_were():
    models = pair(dtype=torch.float32)
    models["model"].train()
    state = torch.get_rng_state()
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    throughput.sweep(models, [6], [1], prefill=False, **FEW)
    assert torch.equal(state, torch.get_rng_state())
    assert models["model"].training and not models["small"].training and torch.is_grad_enabled()
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_long_prefill_is_replaced_by_random_keys():
    """2 seconds at the rate of one machine, two weeks at that of another."""
    slow = Machine("slow", read=1e10, matmul=1)
    rows = throughput.sweep(pair(), [6], [1], **FEW | {"machine": slow})["rows"]
    assert [row["filled"] for row in rows] == ["random", "random"]
    assert [row["filled"] for row in throughput.sweep(pair(), [6], [1], **FEW)["rows"]] == ["prefill"] * 2


def test_the_machine_is_measured_for_these_models_in_their_turns(monkeypatch):
    order = []

    class Small(Meter):
        def turn(self):
            order.append("meter")
            super().turn()

    monkeypatch.setattr(throughput, "Meter", functools.partial(Small, megabytes=1))
    models = pair() | {"latent": throughput.shaped(tiny.MODELS["llama-mha"](), Plan(kv_ratio=0.5))}
    rows = throughput.sweep(models, [4], [2, 1], prefill=False, **FEW | {"machine": None})["rows"]
    for row in rows:
        found = {tuple(one.values())[:4] for one in row["machine"]["attend"]}
        assert found == {(1, 16, 0, 0), (2, 16, BLOCK, 16), (4, 32, BLOCK, 16)}
        assert {one["rows"] for one in row["machine"]["product"]} == {1, 2}
    assert len(order) == 1 + 2 * (1 + 3)  # to warm up; at each of two points one before, then one a turn


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(contexts=[0]), "context is 0; it should be a whole number, 1 or more"),
        (dict(batches=[0]), "batch is 0; it should be a whole number, 1 or more"),
        (dict(batches=[1.5]), "batch is 1.5"),
        (dict(contexts=[float("nan")]), "context is nan"),
        (dict(contexts=[]), "contexts and batches should each have a number or more"),
        (dict(steps=0), "steps is 0"),
        (dict(repeats=True), "repeats is True"),
        (dict(cache="paged"), "cache is 'paged'; it should be one of static, dynamic"),
        (dict(models={}), "models is empty"),
    ],
)
def test_refusals(change, words):
    asked = dict(models={"model": tiny.MODELS["llama-mha"]()}, contexts=[4], batches=[1]) | FEW | change
    with pytest.raises(ValueError) as refusal:
        throughput.sweep(asked.pop("models"), **asked)
    assert words in str(refusal.value)


def test_models_that_cannot_be_compared():
    one, other = tiny.MODELS["llama-mha"](), tiny.MODELS["llama-mha"](dtype=torch.float32)
    with pytest.raises(ValueError, match=r"different dtypes: \{'a': 'torch.float64', 'b': "):
        throughput.sweep({"a": one, "b": other}, [4], [1], **FEW)
    other = tiny.MODELS["llama-mha"]()
    other.resize_token_embeddings(98)
    with pytest.raises(ValueError, match=r"different vocabularies: \{'a': 97, 'b': 98\}"):
        throughput.sweep({"a": one, "b": other}, [4], [1], **FEW)
