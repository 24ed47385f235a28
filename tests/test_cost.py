"""Bytes, parameters and FLOPs against real cache tensors, real models and PyTorch's own counter."""

import doctest
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvteach import cost
from kvteach.cost import Shape

TINY = {
    "llama-mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
    "llama-mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "mlp_bias": True, "head_dim": 6},
    "llama-tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": None},
    "bloom": {"n_head": 4, "n_layer": 3},
}
HAND = Shape(layers=2, hidden=8, query_heads=4, kv_heads=2, head_dim=2, intermediate=12, vocab=10)


@pytest.fixture(params=TINY)
def model(request):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family = request.param.split("-")[0]
    common = {"hidden_size": 32, "vocab_size": 50}
    if family != "bloom":
        common |= {"num_hidden_layers": 3, "intermediate_size": 40}
    config = transformers.AutoConfig.for_model(family, **common, **TINY[request.param])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_docstrings():
    result = doctest.testmod(cost)
    assert result.attempted >= 2
    assert result.failed == 0


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_cache_bytes_are_the_bytes_of_the_cache(model, dtype, width):
    import torch

    with torch.no_grad():
        cache = model.to(getattr(torch, dtype))(
            torch.ones(3, 7, dtype=torch.long), use_cache=True
        ).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (
        cost.cache_bytes(Shape.from_config(model.config), tokens=7, batch=3, bytes_per_number=width) == held
    )


def test_numpy_integers_do_not_overflow():
    numbers = {
        name: np.int32(getattr(HAND, name)) for name in ("layers", "hidden", "query_heads", "kv_heads")
    }
    large = replace(HAND, **numbers, head_dim=np.int32(2**20))
    assert (
        cost.cache_bytes(large, tokens=np.int32(2**12), bytes_per_number=np.float32(2)) == 2 * 2 * 2 * 2**33
    )
    assert cost.parameters(large) > 0


def test_parameters_are_the_parameters_of_the_model(model):
    shape = Shape.from_config(model.config)
    assert cost.parameters(shape) == model.num_parameters()
    attention = sum(
        p.numel() for name, p in model.named_parameters() if "attention." in name or "self_attn" in name
    )
    assert cost.attention_parameters(shape) == attention


@pytest.mark.parametrize("new, cached", [(5, 0), (1, 6), (3, 6)])
def test_flops_are_what_pytorch_counts(model, new, cached):
    """Its counter sees matrix products only. Some transformers write LLaMA's rotation angles as one more."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.ones(1, new, dtype=torch.long)
    with torch.no_grad():
        past = model(torch.ones(1, cached, dtype=torch.long)).past_key_values if cached else None
        with FlopCounterMode(display=False) as counter:
            model(tokens, past_key_values=past, use_cache=True)
    shape = Shape.from_config(model.config)
    ours = sum(cost.flops(shape, new=new, cached=cached, logits=new).values())
    angles = new * shape.head_dim  # positions times d_h / 2 frequencies: left out by us
    assert counter.get_total_flops() - ours in ((0,) if model.config.model_type == "bloom" else (0, angles))


@pytest.mark.parametrize("attention", [False, True, "blockwise", "score-weighted"])
def test_moments_and_their_flops_are_what_calibration_has(model, attention):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kvteach.activations import record
    from kvteach.calibration import _layer_sums, calibrate
    from kvteach.cost import BLOCK
    from kvteach.rope import from_config

    length = BLOCK + 6  # a block, and a part of one
    shape, tokens = Shape.from_config(model.config), torch.ones(1, length, dtype=torch.long)
    moments = calibrate(model, tokens, attention=attention, progress=False)
    kinds = moments.gram.keys() | moments.weight.keys()
    held = [sum(x.nbytes for x in part.values()) for part in (moments.gram, moments.total, moments.weight)]
    assert cost.moments_bytes(shape, kinds) == {"sums": held[0] + held[1], "weights": held[2]}
    layers = record(model, tokens, attention=attention in (True, "blockwise"))
    turns = from_config(model.config) if "keys_in_blocks" in kinds else None
    with FlopCounterMode(display=False) as counter:
        for activations in layers:
            _layer_sums(activations, kinds, turns)
    ours = cost.calibration_flops(shape, length, kinds)
    assert counter.get_total_flops() == ours["attended"] + ours["grams"]
    assert ours["forward"] == sum(cost.flops(shape, new=length, logits=0).values())


@pytest.mark.parametrize(
    "family, settings, expected",
    [
        ("llama", {"intermediate_size": 11008}, 6_738_415_616),  # LLaMA-2-7B
        (
            "llama",  # Llama-3-8B
            {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
            8_030_261_248,
        ),
        ("bloom", {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}, 7_069_016_064),
    ],
)
def test_published_sizes(family, settings, expected):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **settings)
    assert cost.parameters(Shape.from_config(config)) == expected


def test_by_hand():
    assert cost.cache_bytes(HAND, tokens=1, bytes_per_number=1) == 2 * 2 * 2 * 2
    assert cost.attention_parameters(HAND) == 2 * (2 * 8 * 8 + 2 * 8 * 4)
    assert cost.parameters(HAND) == 384 + 2 * 3 * 8 * 12 + 5 * 8 + 10 * 8
    step = cost.flops(HAND, new=1, cached=9)
    assert step == {
        "projections": 2 * 384,
        "basis": 0,
        "attention": 2 * 2 * (4 * 2 * 10 + 4 * 2 * 10),
        "mlp": 2 * 2 * 288,
        "head": 2 * 80,
    }
    assert cost.flops(HAND, new=4, causal=True)["attention"] == 2 * 2 * 10 * (8 + 8)
    read = cost.decode_bytes(HAND, cached=9, batch=3)
    assert read == {"weights": 2 * cost.parameters(HAND), "cache": 3 * 9 * 32}
    assert cost.intensity(HAND, cached=9, batch=3) == 3 * sum(step.values()) / (
        read["weights"] + read["cache"]
    )
    untied = replace(HAND, tied=False)
    assert cost.decode_bytes(untied, 0)["weights"] == read["weights"]


heads = st.sampled_from([(8, 8), (8, 4), (8, 2), (8, 1), (6, 3)])
counts = st.integers(0, 5000)


@st.composite
def shapes(draw):
    query, kv = draw(heads)
    sizes = [draw(st.integers(1, 64)) for _ in range(5)]
    flags = dict(
        zip(("gated", "qkv_bias", "out_bias", "tied"), draw(st.tuples(*[st.booleans()] * 4)), strict=True)
    )
    return Shape(sizes[0], sizes[1], query, kv, *sizes[2:], **flags)


@given(shapes(), counts, counts, st.integers(1, 9))
def test_cache_is_linear_in_tokens_batch_and_heads(shape, a, b, batch):
    assert cost.cache_bytes(shape, a) + cost.cache_bytes(shape, b) == cost.cache_bytes(shape, a + b)
    assert cost.cache_bytes(shape, a, batch) == batch * cost.cache_bytes(shape, a)
    mha = replace(shape, kv_heads=shape.query_heads)
    assert cost.cache_bytes(mha, a) * shape.kv_heads == cost.cache_bytes(shape, a) * shape.query_heads
    width = shape.kv_heads * shape.head_dim
    assert cost.cache_bytes(shape, a, ranks=(width, width)) == cost.cache_bytes(shape, a)
    assert cost.cache_bytes(shape, a, ranks=[(width, 0)] * shape.layers) * 2 == cost.cache_bytes(shape, a)


@given(shapes(), st.integers(1, 40), st.integers(1, 40))
def test_prefill_in_two_parts_costs_what_the_mask_says(shape, a, b):
    """With the causal count, prefilling a then b tokens is prefilling a + b."""
    whole = cost.flops(shape, new=a + b, logits=0, causal=True)
    first = cost.flops(shape, new=a, logits=0, causal=True)
    second = cost.flops(shape, new=b, cached=a, logits=0, causal=True)
    assert whole == {part: first[part] + second[part] for part in whole}


@given(shapes(), counts)
def test_fewer_kv_heads_leave_the_attention_flops_alone(shape, cached):
    mha = replace(shape, kv_heads=shape.query_heads)
    for g in (1, 2):
        small = mha.compress(g)
        before, after = cost.flops(mha, cached=cached), cost.flops(small, cached=cached)
        assert after["attention"] == before["attention"]
        assert after["projections"] < before["projections"]
        assert cost.parameters(small) < cost.parameters(mha)


@given(shapes())
def test_forms_cache_the_same_and_differ_in_weights(shape):
    mha = replace(shape, kv_heads=shape.query_heads)
    stock, grouped, layer = (mha.compress(2, form) for form in "SGL")
    assert cost.cache_bytes(stock, 5) == cost.cache_bytes(grouped, 5) == cost.cache_bytes(layer, 5)
    h, d_h, t = mha.query_heads, mha.head_dim, mha.query_heads // 2
    back = (h - 2) * d_h * (shape.hidden + shape.qkv_bias)  # W_K stays at the source width
    extra = shape.layers * (2 * t * d_h * d_h + h * d_h * d_h + back)
    assert cost.attention_parameters(grouped) == cost.attention_parameters(stock) + extra
    extra = shape.layers * (2 * d_h * h * d_h + back)
    assert cost.attention_parameters(layer) == cost.attention_parameters(stock) + extra


def test_ranks_are_whole_heads_when_they_are_as_wide():
    """Form R is form G with heads of another width; numbers by hand."""
    mha = replace(HAND, kv_heads=4)
    assert mha.compress(2, "R") == mha.compress(2, "R", 2, 2) == mha.compress(2, "G", 2)
    latent = mha.compress(1, "R", key_rank=3, value_rank=5)
    assert cost.cache_bytes(latent, tokens=7) == 7 * 2 * 2 * (3 + 5)
    basis = 4 * 2 * 3 + 4 * 2 * 3  # E [n · d_h, r_k], M [h · d_h, r_k]
    weights = 8 * (4 * 2 + 4 * 2 + 5 + 4 * 5)  # W_Q, W_K, W_V, W_O
    assert cost.attention_parameters(latent) == 2 * (weights + basis)
    step = cost.flops(latent, cached=9)
    assert step["projections"] == 2 * 2 * weights and step["basis"] == 2 * 2 * basis
    assert step["attention"] == 2 * 2 * 10 * 4 * (3 + 5)
    absorbed = mha.compress(1, "S", 3, 5)
    assert cost.attention_parameters(absorbed) == 2 * 8 * (4 * 3 + 3 + 5 + 4 * 5)


def test_the_layer_wide_form_multiplies_the_score_flops():
    """g times the scores; values stay. Per head: q is g·d_h long."""
    mha = replace(HAND, kv_heads=4)
    for g in (1, 2, 4):
        layer = mha.compress(g, "L")
        assert cost.flops(layer, cached=9)["attention"] == 2 * 2 * 10 * (8 * g + 8)
    assert cost.flops(mha.compress(2, "L"))["basis"] == 2 * 2 * (4 * 8 + 4 * 2 * 4)
    assert cost.flops(mha.compress(2, "G"))["basis"] == 2 * 2 * (2 * 4 * 2 + 4 * 2 * 2)
    assert cost.flops(mha.compress(2, "S"))["basis"] == 0


def test_plain_config_objects_are_enough():
    config = SimpleNamespace(
        model_type="llama",
        num_hidden_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=None,
        intermediate_size=12,
        vocab_size=10,
        tie_word_embeddings=True,
    )
    assert Shape.from_config(config) == replace(HAND, kv_heads=4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: replace(HAND, kv_heads=3), "kv_heads is 3; it should divide query_heads (4): 1, 2, 4"),
        (lambda: replace(HAND, layers=0), "layers is 0; it should be 1 or more"),
        (lambda: replace(HAND, head_dim=2.5), "head_dim is 2.5; it should be a whole number"),
        (lambda: replace(HAND, vocab=None), "vocab is None; it should be a whole number, 1 or more"),
        (lambda: replace(HAND, form="X"), "form is 'X'; it should be one of S, G, R, L"),
        (lambda: HAND.compress(1, "G", key_rank=3), "key_rank is 3; form G caches whole heads: leave it out"),
        (lambda: HAND.compress(1, "L", value_rank=3), "value_rank is 3; form L caches whole heads"),
        (lambda: HAND.compress(1, "R", key_rank=0), "key_rank is 0; it should be 1 or more"),
        (lambda: HAND.compress(1, "R", value_rank=1.5), "value_rank is 1.5; it should be a whole number"),
        (lambda: HAND.compress(2, "S", 1, 1).compress(1), 'form is "S" already'),
        (
            lambda: replace(HAND, source_kv_heads=3),
            "source_kv_heads is 3; it should be a multiple of kv_heads (2)",
        ),
        (lambda: HAND.compress(4), "source_kv_heads is 2"),
        (lambda: HAND.compress(1, "G").compress(1), 'form is "G" already'),
        (lambda: Shape.from_config(SimpleNamespace(model_type="gpt2")), "llama, mistral, qwen2, bloom"),
        (lambda: cost.cache_bytes(HAND, tokens=-1), "tokens is -1; it should be 0 or more"),
        (lambda: cost.cache_bytes(HAND, tokens=1, batch=0), "batch is 0; it should be 1 or more"),
        (lambda: cost.cache_bytes(HAND, tokens=1, bytes_per_number=0), "bytes_per_number is 0"),
        (lambda: cost.cache_bytes(HAND, tokens=1, bytes_per_number=np.nan), "bytes_per_number is nan"),
        (lambda: cost.cache_bytes(HAND, tokens=1, ranks=[(1, 1)] * 3), "one pair (keys, values) or 2 pairs"),
        (lambda: cost.cache_bytes(HAND, tokens=1, ranks=(1, 2, 3)), "one pair (keys, values) or 2 pairs"),
        (lambda: cost.cache_bytes(HAND, tokens=1, ranks=(1, -2)), "rank of values is -2"),
        (lambda: cost.flops(HAND, new=0), "new is 0"),
        (lambda: cost.flops(HAND, cached=-1), "cached is -1"),
        (lambda: cost.flops(HAND, new=2, logits=3), "logits is 3; it should be 0 to new (2)"),
        (lambda: cost.decode_bytes(HAND, 1, weight_bytes="fp16"), "weight_bytes is 'fp16'"),
        (lambda: cost.intensity(HAND, 1, batch=0), "batch is 0"),
    ],
)
def test_refusals_name_the_field_and_the_legal_values(call, words):
    with pytest.raises(ValueError) as refusal:
        call()
    assert words in str(refusal.value)
