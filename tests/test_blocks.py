"""Keys turned within blocks: the same scores as with RoPE, however the cache is cut, read and filled."""

import copy

import pytest
import tiny
import torch
from lively import original
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from kvteach import calibration, cost, plan, sequential
from kvteach.convert import compress
from kvteach.plan import Plan

WINDOWS, TOKENS = tiny.ids(4, 24, seed=3), 19
NAMES = [name for name in tiny.MODELS if name != "bloom"]
ROUNDING = 1e-9
SINGLE = 1e-5  # where something is float32 inside, as the softmax of eager attention


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch):
    """So that a short text has several, and the last of them is not full."""
    for module in (plan, calibration):
        monkeypatch.setattr(module, "BLOCK", 4)


def small(name: str, **dial):
    model, made = original(name), Plan(**dial or {"kv_ratio": 0.5})
    return compress(model, calibration.calibrate(model, WINDOWS, attention="blockwise", progress=False), made,
                    progress=False)  # fmt: skip


def step_by_step(model, ids, cache, first: int = 5):
    with torch.no_grad():
        found = [model(ids[:, :first], past_key_values=cache).logits]
        found += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(first, ids.shape[1])]
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_dropped_nothing_changed(name):
    ids = tiny.ids(2, TOKENS, seed=5)
    with torch.no_grad():
        expected = original(name)(ids).logits
        for dial in ({"kv_ratio": 1.0}, {"kv_heads": original(name).config.num_key_value_heads}):
            layer_by_layer = sequential.compress(original(name), WINDOWS, Plan(**dial), progress=False)
            for model in (small(name, **dial), layer_by_layer):
                assert model.config.key_block == 4 and "reach" not in model.config.kvteach
                torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["dynamic", "aligned", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_is_the_whole_text(name, kind):
    """Cached blocks are read where they lie, the whole text by rebuilding its keys: two ways to the same scores."""
    model, ids = small(name), tiny.ids(2, TOKENS, seed=5)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=20 if kind == "aligned" else 23)
    )
    with torch.no_grad():
        torch.testing.assert_close(step_by_step(model, ids, cache), model(ids).logits, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_eager_and_sdpa_agree_and_hand_out_weights(name):
    model, ids = small(name), tiny.ids(2, TOKENS, seed=5)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("eager")
        whole = model(ids, output_attentions=True)
        torch.testing.assert_close(whole.logits, expected, rtol=0, atol=SINGLE)
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache, output_attentions=True)
    for one, all_ in zip(step.attentions, whole.attentions, strict=True):
        row = all_[:, :, -1:, -one.shape[-1] :]  # a sliding window has dropped the first
        torch.testing.assert_close(one, row, rtol=0, atol=SINGLE)


@pytest.mark.parametrize("name", ["llama-mha", "mistral", "qwen2"])
def test_padding_changes_nothing(name):
    """Slots move, distances do not. With all directions kept: what is dropped depends on the place in a block."""
    model, text = small(name, kv_ratio=1.0).float(), tiny.ids(1, 9, seed=7)
    alone = model.generate(text, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 9:]
    for padding in range(1, 6):
        ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), text], 1)
        mask = (torch.arange(9 + padding) >= padding).long()[None]
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(padded[0, 9 + padding :], alone), padding


def test_a_key_depends_on_its_place_in_the_block_only():
    """The same token, wherever its block stands, is cached as the same numbers: no position is unheard of."""
    model, cache = small("llama-mha"), DynamicCache()
    with torch.no_grad():
        model(torch.full((1, 16), 7), past_key_values=cache)
    blocks = cache.layers[0].keys.unflatten(2, (4, 4))  # of the first layer, whose input is the token alone
    torch.testing.assert_close(blocks, blocks[:, :, :1].expand_as(blocks), rtol=0, atol=SINGLE)
    assert not torch.allclose(blocks[..., 0, :], blocks[..., 1, :])


def test_positions_that_jump_are_refused():
    model, ids = small("llama-mha"), tiny.ids(1, 6)
    with pytest.raises(ValueError, match=r"position_ids jump; .* must rise by one"):
        model(ids, position_ids=torch.tensor([[0, 2, 4, 6, 8, 10]]))
    with torch.no_grad():  # where they begin does not matter
        later = model(ids, position_ids=torch.arange(30, 36)[None]).logits
        torch.testing.assert_close(later, model(ids).logits, rtol=0, atol=ROUNDING)


def test_saved_and_loaded(tmp_path):
    model, ids = small("llama-gqa"), tiny.ids(2, TOKENS, seed=5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, ids = small("llama-gqa"), tiny.ids(2, TOKENS, seed=5)
    with torch.no_grad():
        expected = model(ids).logits
    half = small("llama-gqa").to(dtype)
    found = step_by_step(half, ids, DynamicCache())
    assert found.dtype == dtype
    plain = original("llama-gqa")  # half precision alone, without a basis
    with torch.no_grad():
        exact, rough = plain(ids).logits, copy.deepcopy(plain).to(dtype)(ids).logits
    rounding = (rough.double() - exact).norm() / exact.norm()
    assert (found.double() - expected).norm() < 3 * rounding * expected.norm()


@pytest.mark.parametrize("length", [20, 23], ids=["aligned", "ragged"])
def test_a_step_compiles_to_one_graph(length):
    model, ids = small("llama-gqa"), tiny.ids(2, TOKENS, seed=5)
    expected = step_by_step(model, ids, StaticCache(config=model.config, max_cache_len=length))[:, -1:]
    cache = StaticCache(config=model.config, max_cache_len=length)
    step_by_step(model, ids[:, :-1], cache)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_bytes_and_flops_are_counted():
    """The same cache as without blocks; a step maps its queries once a block, a text rebuilds its keys."""
    model, ids, cache = small("llama-gqa", kv_ratio=0.25), tiny.ids(2, 8), DynamicCache()
    model(ids, past_key_values=cache)
    shape = cost.Shape.from_config(model.config)
    found = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert found == cost.cache_bytes(shape, tokens=8, batch=2, bytes_per_number=8)
    plain = cost.replace(shape, key_block=None)
    one_map = 2 * shape.layers * shape.query_heads * shape.head_dim * shape.key_rank
    for cached, blocks in ((3, 1), (4, 2), (7, 2), (8, 3)):
        step, before = (cost.flops(one, new=1, cached=cached) for one in (shape, plain))
        assert step["basis"] - before["basis"] == (blocks - 1) * one_map
        assert step["attention"] == before["attention"]
    whole, before = (cost.flops(one, new=8) for one in (shape, plain))
    assert whole["basis"] == before["basis"]  # a key for each token instead of a query
    wide = 2 * 64 * shape.layers * shape.query_heads * (shape.head_dim - shape.key_rank)
    assert whole["attention"] - before["attention"] == wide
