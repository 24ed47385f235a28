"""Conversion: exact where nothing is dropped, the basis's own error where something is, the same model to its users."""

import subprocess
import sys
from functools import cache

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import kvteach
from kvteach import cost
from kvteach.activations import attention_modules, record
from kvteach.bases import METHODS
from kvteach.calibration import calibrate
from kvteach.convert import compress, small_modules
from kvteach.grouping import by_order, by_similarity
from kvteach.moments import Moments, Source
from kvteach.plan import STOCK, Plan

ROUNDING = 1e-6  # RMSNorm and BLOOM's softmax are float32 inside, whatever the model's dtype
ATTENDED = ("attention-weighted", "commuting-attended", "commuting-stock")
ROTATING = [name for name in tiny.MODELS if name != "bloom"]


@cache
def original(name: str, dtype=torch.float64):
    return tiny.MODELS[name](dtype=dtype)


@cache
def moments(name: str, dtype=torch.float64) -> Moments:
    return calibrate(original(name, dtype), tiny.ids(6, 30, seed=3), attention=True, progress=False)


def small(name: str, plan: Plan, dtype=torch.float64):
    return compress(original(name, dtype), moments(name, dtype), plan, progress=False)


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def step_by_step(model, ids, past=None, **inputs):
    """Logits of one token after another, and the cache."""
    found = []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=past, use_cache=True, **inputs)
            past = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1), past


def full_plans(name: str):
    n = moments(name).source.kv_heads
    for basis in METHODS:
        if name == "bloom" and basis.startswith("commuting"):
            continue
        yield Plan(kv_heads=n, basis=basis)
        if basis not in (*STOCK, "commuting", "commuting-attended") or n == 1:
            yield Plan(kv_ratio=1.0, basis=basis)
        if basis not in (*ATTENDED, "weight-svd"):
            yield Plan(kv_heads=n, basis=basis, centred=True)
        if name != "bloom" and basis in STOCK:
            yield Plan(kv_heads=n, basis=basis, stock=True)
    yield Plan(kv_heads=n, grouping="similarity")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_nothing_dropped_nothing_changed(name):
    ids = tiny.ids(2, 9, seed=5)
    expected = logits(original(name), ids)
    for plan in full_plans(name):
        assert torch.allclose(logits(small(name, plan), ids), expected, atol=ROUNDING), plan


def half_plans(name: str):
    yield Plan(kv_heads=1)
    yield Plan(kv_ratio=0.5)
    yield Plan(kv_heads=1, basis="activation-svd", centred=True)
    if name != "bloom":
        yield Plan(kv_heads=1, stock=True)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_decoding_with_a_cache_equals_the_full_forward_and_the_cache_is_as_small_as_predicted(name):
    ids = tiny.ids(2, 4, seed=6)  # mistral's sliding window keeps 5 tokens
    shape = cost.Shape.from_config(original(name).config)
    for plan in half_plans(name):
        model = small(name, plan)
        found, past = step_by_step(model, ids)
        assert torch.allclose(found, logits(model, ids), atol=ROUNDING), plan
        held = sum(x.numel() * x.element_size() for layer in past.layers for x in (layer.keys, layer.values))
        groups, key_rank, value_rank = plan.layout(moments(name).source)
        ranks = (groups * key_rank, groups * value_rank)
        assert held == cost.cache_bytes(shape, tokens=4, batch=2, bytes_per_number=8, ranks=ranks)
        if plan.form != "R":
            assert held == cost.cache_bytes(shape.compress(1), tokens=4, batch=2, bytes_per_number=8)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_what_attention_computes_is_what_the_basis_says(name):
    """Layer 0 again, by hand: the original's keys and values, each replaced by its projection, read by its queries."""
    model, ids, layer = original(name), tiny.ids(1, 5, seed=7), 0
    seen, block = record(model, ids)[layer], attention_modules(model)[layer]
    plan, source = Plan(kv_ratio=0.5, basis="score-weighted", centred=True), moments(name).source
    _, key_rank, value_rank = plan.layout(source)
    heads = range(source.kv_heads)
    basis = METHODS[plan.basis](moments(name), layer, heads, key_rank, value_rank, centred=True)

    def projected(x, side):  # [1, n, tokens, d_h], through the latent and back
        flat = x[0].transpose(0, 1).flatten(1) - side.mean
        back = flat @ side.encode @ side.decode + side.mean
        return back.unflatten(1, (source.kv_heads, -1)).transpose(0, 1)  # [n, tokens, d_h]

    readers = source.query_heads // source.kv_heads
    keys = projected(seen.keys_post, basis.keys).repeat_interleave(readers, 0)
    values = projected(seen.values, basis.values).repeat_interleave(readers, 0)
    scores = seen.queries_post[0] @ keys.mT / source.head_dim**0.5  # [query heads, tokens, tokens]
    if name == "bloom":
        alibi = model.transformer.build_alibi_tensor(torch.ones_like(ids), source.query_heads, torch.float64)
        scores = scores + alibi
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    last = block.dense if name == "bloom" else block.o_proj
    expected = last(out.transpose(0, 1).flatten(1))  # [tokens, hidden]

    compressed, kept = small(name, plan), []
    module = small_modules(compressed)[layer]
    last = module.dense if name == "bloom" else module.o_proj
    last.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    logits(compressed, ids)
    assert torch.allclose(kept[0], expected, atol=ROUNDING)


@pytest.mark.parametrize("name", ROTATING)
@pytest.mark.parametrize("basis", STOCK)
def test_absorbed_equals_applied_after_the_rotation(name, basis):
    ids = tiny.ids(2, 9, seed=8)
    stock, own = (small(name, Plan(kv_heads=1, basis=basis, stock=stock)) for stock in (True, False))
    assert type(stock) is type(original(name)) and type(own) is not type(stock)
    assert torch.allclose(logits(stock, ids), logits(own, ids), atol=ROUNDING)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_order_of_heads_and_scale_do_not_matter(name):
    """Grouping by similarity moves heads; with one group it may not change anything."""
    ids = tiny.ids(2, 9, seed=9)
    plans = [Plan(kv_heads=1, grouping=grouping) for grouping in ("order", "similarity")]
    first, second = (logits(small(name, plan), ids) for plan in plans)
    assert torch.allclose(first, second, atol=ROUNDING)


def test_similarity_finds_heads_that_were_made_alike():
    d_h, twins = 4, {0: 2, 1: 3}
    rows = torch.randn(200, 4, d_h, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, other in twins.items():
        rows[:, other] = rows[:, one] @ torch.linalg.qr(rows[:d_h, one]).Q
    flat = rows.flatten(1)
    gram = (flat.T @ flat)[None]
    source = Source("bloom", layers=1, query_heads=4, kv_heads=4, head_dim=d_h, weights="")
    found = by_similarity(Moments(source, 200, {}, {"keys_post": gram, "values": gram}), 0, 2)
    assert found == [[0, 2], [1, 3]]
    assert by_order(6, 2) == [[0, 1, 2], [3, 4, 5]]


# -----------------------------------------------------------------------------------------------------
# What its users do with it


@pytest.mark.parametrize("name", ["llama-mha", "llama-mqa-bias", "mistral", "qwen2", "bloom"])
@pytest.mark.parametrize("plan", [Plan(kv_heads=1), Plan(kv_ratio=0.5)])
def test_generate(name, plan):
    model, ids = small(name, plan, torch.float32), tiny.ids(2, 6, seed=2)
    options = dict(max_new_tokens=5, pad_token_id=0, eos_token_id=None)
    greedy = model.generate(ids, **options)
    by_hand = ids
    for _ in range(5):
        by_hand = torch.cat([by_hand, logits(model, by_hand)[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, by_hand)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), greedy)
    assert torch.equal(model.generate(ids, use_cache=False, **options), greedy)
    beams = [model.generate(ids, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams)
    samples = []
    for _ in range(2):
        torch.manual_seed(1)
        samples.append(model.generate(ids, do_sample=True, **options))
    assert torch.equal(*samples)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    padded = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 2:], **options)
    assert torch.equal(padded[:1, 2:], alone)


@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_decoding_reads_the_cache_in_place(name, monkeypatch):
    """Neither repeated for each query head nor copied: what is multiplied is the cache's own memory."""
    model, ids = small(name, Plan(kv_heads=2)), tiny.ids(1, 6)
    _, past = step_by_step(model, ids)
    handed, plain = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **rest: (
            handed.append((query, key, rest)),
            plain(query, key, value, **rest),
        )[1],
    )
    with torch.no_grad():
        model(ids[:, :1], past_key_values=past, use_cache=True)
    for layer, (query, key, rest) in enumerate(handed):
        assert query.shape == (1, 2, 2, 16) and key.shape == (1, 2, 7, 16) and not rest["is_causal"]
        assert key.data_ptr() == past.layers[layer].keys.data_ptr()
    assert len(handed) == (0 if name == "bloom" else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
def test_the_dtype_is_kept(name, dtype):
    model = small(name, Plan(kv_ratio=0.5), dtype)
    assert model.dtype == dtype and all(weight.dtype == dtype for weight in model.parameters())
    assert torch.isfinite(logits(model, tiny.ids())).all()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_original_is_left_alone(name):
    model = original(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    one, other = small(name, Plan(kv_heads=1)), small(name, Plan(kv_ratio=0.5))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in one.state_dict().values()}
    ids = tiny.ids()
    first = logits(one, ids)
    logits(other, ids)
    assert torch.equal(logits(one, ids), first)
    with torch.no_grad():
        for weight in one.parameters():
            weight.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


RELOAD = """
import sys, torch
{first}
from transformers import AutoModelForCausalLM
{second}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(9)[None]).logits, sys.argv[1] + "/logits.pt")
"""


def in_a_fresh_process(folder, first="", second=""):
    code = RELOAD.format(first=first, second=second)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "bloom"])
def test_what_is_saved_loads_in_a_fresh_process(name, tmp_path):
    model = small(name, Plan(kv_ratio=0.5))
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = logits(model, torch.arange(9)[None])
    for order in ({"first": "import kvteach"}, {"second": "import kvteach"}):
        done = in_a_fresh_process(tmp_path, **order)
        assert done.returncode == 0, done.stderr
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-12)
    refused = in_a_fresh_process(tmp_path)
    assert refused.returncode != 0 and model.config.model_type in refused.stderr
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.kvteach["plan"] == Plan(kv_ratio=0.5).as_dict()


def test_a_stock_model_needs_no_kvteach(tmp_path):
    model = small("llama-mha", Plan(kv_heads=2, stock=True))
    model.save_pretrained(tmp_path)
    done = in_a_fresh_process(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = logits(model, torch.arange(9)[None])
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-12)


def test_import_changes_nothing_in_transformers():
    code = (
        "from transformers.models.llama.modeling_llama import LlamaAttention\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "before = LlamaAttention.forward, dict(functions)\n"
        "import kvteach, kvteach.models\n"
        "assert before == (LlamaAttention.forward, dict(functions))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -----------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({}, "kv_heads or kv_ratio"),
        ({"kv_heads": 1, "kv_ratio": 0.5}, "one of the two"),
        ({"kv_ratio": 0}, "above 0 and at most 1"),
        ({"kv_ratio": 1.5}, "above 0 and at most 1"),
        ({"kv_ratio": float("nan")}, "above 0 and at most 1"),
        ({"kv_heads": 1, "grouping": "taste"}, "order, similarity"),
        ({"kv_ratio": 0.5, "stock": True}, "needs kv_heads"),
    ],
)
def test_a_plan_nobody_can_follow(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan(**arguments)


def test_an_unknown_basis():
    with pytest.raises(LookupError, match="attention-weighted"):
        Plan(kv_heads=1, basis="best")


@pytest.mark.parametrize(
    "name, plan, sentence",
    [
        ("llama-mha", Plan(kv_heads=3), "kv_heads is 3; .* one of 1, 2, 4"),
        ("llama-mha", Plan(kv_heads=0), "one of 1, 2, 4"),
        ("llama-mha", Plan(kv_heads=2.0), "one of 1, 2, 4"),
        ("llama-mha", Plan(kv_ratio=0.001), "at least 2 of 64 numbers"),
        ("bloom", Plan(kv_heads=1, stock=True), "leave stock out"),
        ("llama-mha", Plan(kv_heads=1, stock=True, basis="activation-svd"), "commuting-stock, mean-pool"),
        ("llama-mha", Plan(kv_heads=1, stock=True, basis="mean-pool", centred=True), "leave centred out"),
        ("llama-mha", Plan(kv_heads=1, centred=True), "centred must be False"),
        ("llama-mha", Plan(kv_ratio=0.5, basis="mean-pool"), "makes one head of the group"),
    ],
)
def test_a_plan_this_model_cannot_follow(name, plan, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(name, plan)


def test_models_that_are_refused():
    model, plan = original("llama-mha"), Plan(kv_heads=1)
    with pytest.raises(ValueError, match="belong to another model"):
        compress(model, moments("llama-gqa"), plan)
    with pytest.raises(ValueError, match="no language-model head"):
        compress(model.model, moments("llama-mha"), plan)
    with pytest.raises(ValueError, match="compressed already"):
        compress(small("llama-mha", plan), moments("llama-mha"), plan)
    plain = calibrate(model, tiny.ids(), progress=False)
    with pytest.raises(ValueError, match="attention=True"):
        compress(model, plain, plan, progress=False)


@pytest.mark.parametrize("ids", [torch.full((2, 8), 5), torch.tensor([[5]])])
@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
def test_a_poor_text_gives_finite_weights(name, ids):
    found = calibrate(original(name), ids, attention=True, progress=False)
    for plan in half_plans(name):
        model = compress(original(name), found, plan, progress=False)
        assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_names_at_the_top():
    assert kvteach.compress is compress and kvteach.Plan is Plan
