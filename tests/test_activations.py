"""What is recorded is what the model computes: the cache itself is the witness."""

import pytest
import tiny
import torch

from kvteach.activations import attention_modules, observe, record


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def test_recorded_keys_and_values_are_the_cached_ones(model):
    ids = tiny.ids()
    recorded = record(model, ids)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert len(recorded) == len(attention_modules(model)) == len(cache.layers)
    for layer, cached in zip(recorded, cache.layers, strict=True):
        kept = cached.keys.shape[-2]  # a sliding-window cache keeps the last tokens only
        assert torch.equal(layer.keys_post[..., -kept:, :], cached.keys)
        assert torch.equal(layer.values[..., -kept:, :], cached.values)


def test_attention_follows_from_the_recorded_queries_and_keys(model):
    if model.config.model_type == "mistral":
        pytest.skip("its sliding window is shorter than the text; the other models cover the formula")
    for layer in record(model, tiny.ids(), attention=True):
        groups = layer.queries_post.shape[1] // layer.keys_post.shape[1]
        keys = layer.keys_post.repeat_interleave(groups, 1)
        # [batch, heads, tokens, d_h] · [batch, heads, d_h, tokens] -> [batch, heads, tokens, tokens]
        scores = layer.queries_post @ keys.mT / keys.shape[-1] ** 0.5
        tokens = scores.shape[-1]
        if model.config.model_type == "bloom":  # slopes 2^(-8 j / heads); a constant per row does not matter
            heads = scores.shape[1]
            slopes = torch.tensor([2 ** (-8 * (j + 1) / heads) for j in range(heads)], dtype=scores.dtype)
            scores = scores + slopes[:, None, None] * torch.arange(tokens)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        assert torch.allclose(scores.softmax(-1), layer.attention, atol=1e-6)


def test_rope_keeps_norms_and_leaves_position_zero_alone(model):
    for layer in record(model, tiny.ids()):
        assert torch.allclose(layer.keys_pre.norm(dim=-1), layer.keys_post.norm(dim=-1))
        assert torch.allclose(layer.queries_pre.norm(dim=-1), layer.queries_post.norm(dim=-1))
        assert torch.allclose(layer.keys_pre[:, :, 0], layer.keys_post[:, :, 0])
        turned = not torch.allclose(layer.keys_pre[:, :, 1:], layer.keys_post[:, :, 1:])
        assert turned == (model.config.model_type != "bloom")


def test_pre_is_what_the_projections_give(model):
    if model.config.model_type == "bloom":
        pytest.skip("one fused projection; nothing is rotated, so the cache has told already")
    seen = {}
    module = attention_modules(model)[1]
    handles = [
        getattr(module, name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    layer = record(model, tiny.ids())[1]
    for handle in handles:
        handle.remove()
    for found, name in ((layer.queries_pre, "q_proj"), (layer.keys_pre, "k_proj")):
        assert torch.equal(found.transpose(1, 2).flatten(2), seen[name])


def test_no_hook_stays_and_the_attention_path_comes_back(model):
    before = model.config._attn_implementation
    record(model, tiny.ids(), attention=True)
    assert hooks(model) == 0
    assert model.config._attn_implementation == before

    def refuse(layer, activations):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), observe(model, refuse, attention=True):
        model(tiny.ids())
    assert hooks(model) == 0
    assert model.config._attn_implementation == before

    with pytest.raises(IndexError), observe(model, lambda layer, activations: None):
        model(torch.tensor([[10**6]]))  # the forward itself fails
    assert hooks(model) == 0


def test_observing_changes_no_output(model):
    ids = tiny.ids()
    with torch.no_grad():
        plain = model(ids).logits
        with observe(model, lambda layer, activations: None):
            watched = model(ids).logits
    assert torch.equal(plain, watched)


def test_two_observers_see_the_same():
    model, seen = tiny.MODELS["llama-gqa"](), []
    with (
        observe(model, lambda n, a: seen.append(("outer", n))),
        observe(model, lambda n, a: seen.append(("inner", n))),
    ):
        model(tiny.ids())
    assert sorted(seen) == sorted((who, n) for who in ("outer", "inner") for n in range(3))


def test_padding_is_recorded_where_it_stands():
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids(1, 6)
    alone = record(model, ids)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0, 0] + [1] * 6])
    with_padding = record(model, padded, attention_mask=mask)
    # values have no position; in the last layer they depend on what was attended to, so on the mask
    assert torch.allclose(with_padding[-1].values[:, :, 3:], alone[-1].values)
    unmasked = record(model, padded)
    assert not torch.allclose(unmasked[-1].values[:, :, 3:], alone[-1].values)


def test_other_architectures_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=10))
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; kvteach reads llama, .*bloom"):
        record(model, torch.tensor([[1]]))


def test_a_filled_cache_is_refused_when_attention_is_asked_for():
    model = tiny.MODELS["llama-gqa"]()
    with torch.no_grad():
        cache = model(tiny.ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="whole text in one forward pass"):
        with observe(model, lambda layer, activations: None, attention=True):
            model(tiny.ids(1, 2), past_key_values=cache)
