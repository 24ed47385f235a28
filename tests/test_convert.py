"""Conversion: a compressed model computes what its basis says, caches what its plan says, and harms nothing."""

import inspect
from itertools import chain

import lively
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import ROTATING, TOLERANCE, logits, make, moments, original
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from kvteach.activations import attention_modules, record
from kvteach.bases import METHODS
from kvteach.calibration import calibrate
from kvteach.convert import compress
from kvteach.grouping import by_order, by_similarity, kept
from kvteach.moments import Source
from kvteach.plan import STOCK, Plan
from kvteach.rope import from_config, placed

POOLED = ("mean-pool", "procrustes", "commuting-stock")  # their ranks are d_h and no other
UNCENTRED = ("weight-svd", "attention-weighted", "blockwise", "commuting-attended", "commuting-stock")


def small(name: str, **plan):
    """The compressed model of a shared original, for the positions that were calibrated."""
    if moments(name).source.rotates and plan.get("basis") != "blockwise":
        plan = {"reach": moments(name).reach} | plan
    return compress(original(name), moments(name), Plan(**plan), progress=False)


def fits(name: str, basis: str) -> bool:
    return not (name.startswith("bloom") and basis.startswith("commuting"))


def close(one, other, name):
    torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[name])


def differ(one, other, by: float = 1e-4) -> bool:
    return bool((one - other).abs().max() > by)


# -- nothing left out, nothing lost -------------------------------------------------------------------------


@pytest.mark.parametrize("name", lively.MODELS)
@pytest.mark.parametrize("basis", METHODS)
def test_all_heads_are_the_original(name, basis):
    if not fits(name, basis):
        pytest.skip("no RoPE to commute with")
    heads = moments(name).source.kv_heads
    grouping = "similarity" if name.endswith("mha") else "order"
    close(logits(small(name, kv_heads=heads, basis=basis, grouping=grouping)), logits(original(name)), name)


@pytest.mark.parametrize("name", lively.MODELS)
@pytest.mark.parametrize("basis", [name for name in METHODS if name not in POOLED])
def test_ratio_one_is_the_original(name, basis):
    if not fits(name, basis):
        pytest.skip("no RoPE to commute with")
    close(logits(small(name, kv_ratio=1, basis=basis)), logits(original(name)), name)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa-bias", "qwen2", "bloom"])
@pytest.mark.parametrize("basis", [name for name in METHODS if name not in UNCENTRED])
def test_full_rank_centred_is_the_original(name, basis):
    if not fits(name, basis):
        pytest.skip("no RoPE to commute with")
    close(logits(small(name, kv_heads=moments(name).source.kv_heads, basis=basis, centred=True)),
          logits(original(name)), name)  # fmt: skip


@pytest.mark.parametrize("name", ["llama-mha", "llama-tied", "bloom", "bloom-untied"])
def test_equal_heads_are_found_and_merged_without_loss(name):
    """Heads 0 and 2 make the same keys and values, so do 1 and 3: two heads hold them all."""
    model = make(name)
    with torch.no_grad():
        for module in attention_modules(model):
            if hasattr(module, "query_key_value"):
                each = (module.query_key_value.weight, module.query_key_value.bias)
                parts = [x.unflatten(0, (4, 3, -1))[:, 1:] for x in each]  # keys and values of each head
            else:
                parts = [x.weight.unflatten(0, (4, -1)) for x in (module.k_proj, module.v_proj)]
            for part in parts:
                part[2:] = part[:2]
    seen = calibrate(model, tiny.ids(5, 40), attention=True, progress=False)
    for layer in range(3):
        assert by_similarity(seen, layer, 2) == [[0, 2], [1, 3]]
    for basis in METHODS:
        if fits(name, basis):
            merged = compress(
                model, seen, Plan(kv_heads=2, basis=basis, grouping="similarity"), progress=False
            )
            close(logits(merged), logits(model), name)
    if name.startswith("llama"):
        for basis in STOCK:
            plan = Plan(kv_heads=2, basis=basis, grouping="similarity", stock=True)
            close(logits(compress(model, seen, plan, progress=False)), logits(model), name)
    apart = compress(model, seen, Plan(kv_heads=2, basis="score-weighted"), progress=False)
    assert differ(logits(apart), logits(model))  # the wrong pairs do lose something


# -- what is left out is what the basis says ----------------------------------------------------------------

PLANS = {
    "G": dict(kv_heads=1, basis="attention-weighted"),
    "G-blocks": dict(kv_heads=1, basis="blockwise"),  # one block: the same keys by another basis
    "G-similar": dict(kv_heads=2, basis="activation-svd", grouping="similarity"),
    "G-centred": dict(kv_heads=1, basis="score-weighted", centred=True),
    "G-pooled": dict(kv_heads=1, basis="mean-pool", centred=True),
    "R": dict(kv_ratio=0.4, basis="attention-weighted"),
    "R-blocks": dict(kv_ratio=0.4, basis="blockwise"),
    "R-commuting": dict(kv_ratio=0.6, basis="commuting"),
    "S": dict(kv_heads=1, stock=True),
}


def legal(name: str, plan: dict) -> bool:
    heads = moments(name).source.kv_heads
    bloom = name.startswith("bloom")
    unfit = bloom and (plan.get("stock") or plan.get("basis", "").startswith("commuting"))
    return not unfit and heads % plan.get("kv_heads", 1) == 0


CASES = [
    pytest.param(name, plan, id=f"{name}-{key}")
    for name in tiny.MODELS
    for key, plan in PLANS.items()
    if legal(name, plan)
]


def slow_attention(name: str, plan: Plan, ids) -> torch.Tensor:
    """Layer 0 of the original with k̂ and v̂ in place of its keys and values, loop by loop: [batch, tokens, hidden]."""
    model, seen = original(name), moments(name)
    source, module = seen.source, attention_modules(original(name))[0]
    groups, key_rank, value_rank = plan.layout(source)
    grouped = (
        by_order(source.kv_heads, groups) if plan.grouping == "order" else by_similarity(seen, 0, groups)
    )
    first = record(model, ids)[0]
    keys, values = first.keys_post.clone(), first.values.clone()
    for heads in grouped:
        basis = METHODS[plan.basis](seen, 0, heads, key_rank, value_rank, plan.centred)
        for x, side in ((keys, basis.keys), (values, basis.values)):
            for row in x:  # [heads, tokens, d_h]
                wide = torch.cat([row[head] for head in heads], -1)
                mean = 0 if side.mean is None else side.mean
                back = (wide - mean) @ side.encode @ side.decode + mean
                for i, head in enumerate(heads):
                    row[head] = back[:, i * source.head_dim : (i + 1) * source.head_dim]
    tokens = ids.shape[1]
    last = module.dense if name.startswith("bloom") else module.o_proj
    window = getattr(model.config, "sliding_window", None) or tokens
    result = []
    for b in range(len(ids)):
        heads = []
        for j in range(source.query_heads):
            i = j * source.kv_heads // source.query_heads
            scores = first.queries_post[b, j] @ keys[b, i].T / source.head_dim**0.5
            for m in range(tokens):
                for p in range(tokens):
                    if p > m or m - p >= window:
                        scores[m, p] = -torch.inf
                    elif name.startswith("bloom"):
                        scores[m, p] += 2.0 ** (-8 * (j + 1) / source.query_heads) * p  # ALiBi
            heads.append(scores.softmax(-1) @ values[b, i])
        result.append(last(torch.cat(heads, -1)))
    return torch.stack(result)


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_first_layer_against_a_slow_reference(name, plan):
    model, ids, seen = small(name, **plan), tiny.ids(), {}

    def see(module, args, kwargs, output):
        seen["output"] = output[0]
        if name.startswith("bloom"):
            seen["output"] = output[0] - args[1]  # BLOOM's attention adds the residual by itself

    with torch.no_grad():
        handle = attention_of(model)[0].register_forward_hook(see, with_kwargs=True)
        model(ids)
        handle.remove()
        expected = slow_attention(name, Plan(**plan), ids)
    close(seen["output"], expected, name)
    whole = slow_attention(name, Plan(kv_heads=moments(name).source.kv_heads, basis="activation-svd"), ids)
    if moments(name).source.kv_heads > plan.get("kv_heads", 0):
        assert differ(whole, expected)  # something was lost, so the comparison says something


def attention_of(model) -> list:
    """The attention modules of a compressed model."""
    body = model.base_model
    return [block.self_attention for block in body.h] if hasattr(body, "h") else [
        block.self_attn for block in body.layers
    ]  # fmt: skip


@pytest.mark.parametrize("name", ROTATING)
@pytest.mark.parametrize("basis", STOCK)
def test_absorbed_and_unabsorbed_are_one(name, basis):
    heads = moments(name).source.kv_heads
    for groups in (k for k in (1, 2, 4) if heads % k == 0):
        stock = small(name, kv_heads=groups, basis=basis, stock=True)
        assert type(stock) is type(original(name))
        assert not any("k_down" in key or "q_map" in key for key in stock.state_dict())
        apart = small(name, kv_heads=groups, basis=basis)
        close(logits(stock), logits(apart), name)
        close(logits(stock), logits(small(name, kv_heads=groups, basis=basis, stock=True,
                                          grouping="order")), name)  # fmt: skip


def test_a_stock_model_can_be_centred_where_the_output_has_a_bias():
    plan = dict(kv_heads=1, basis="mean-pool", centred=True)
    close(
        logits(small("llama-mqa-bias", **plan, stock=True)),
        logits(original("llama-mqa-bias")),
        "llama-mqa-bias",
    )


# -- symmetries of the original that compression must not see -----------------------------------------------


def of_changed(change, plan: Plan, name: str):
    """Logits of the compressed model of a changed original, which computes what the original does."""
    model = make(name)
    with torch.no_grad():
        for module in attention_modules(model):
            change(module)
    close(logits(model), logits(original(name)), name)
    seen = calibrate(model, tiny.ids(5, 40), attention=True, progress=False)
    return logits(compress(model, seen, plan, progress=False))


@settings(max_examples=4)
@given(
    head=st.integers(0, 3),
    key=st.floats(0.2, 5),
    value=st.floats(0.2, 5),
    basis=st.sampled_from(["score-weighted", "attention-weighted", "blockwise", "commuting"]),
)
def test_scale_of_a_head_does_not_matter(head, key, value, basis):
    """k s with q / s gives the same scores, v s with W_O / s the same output; a weighted basis knows that."""
    rows = slice(head * 16, (head + 1) * 16)

    def scale(module):
        module.k_proj.weight[rows] *= key
        module.q_proj.weight[rows] /= key
        module.v_proj.weight[rows] *= value
        module.o_proj.weight[:, rows] /= value

    plan = dict(kv_ratio=0.5, basis=basis, reach=None if basis == "blockwise" else 40)
    changed = of_changed(scale, Plan(**plan), "llama-mha")
    torch.testing.assert_close(changed, logits(small("llama-mha", **plan)), rtol=0, atol=1e-7)


@settings(max_examples=4)
@given(
    order=st.permutations(range(4)),
    plan=st.sampled_from([dict(kv_heads=1), dict(kv_ratio=0.4), dict(kv_heads=1, stock=True)]),
)
def test_order_of_heads_does_not_matter(order, plan):
    def permute(module):
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            projection.weight.copy_(projection.weight.unflatten(0, (4, -1))[order].flatten(0, 1))
        module.o_proj.weight.copy_(module.o_proj.weight.unflatten(1, (4, -1))[:, order].flatten(1))

    changed = of_changed(permute, Plan(**plan, reach=40), "llama-mha")
    torch.testing.assert_close(changed, logits(small("llama-mha", **plan)), rtol=0, atol=1e-7)


# -- positions that the calibration has not reached ------------------------------------------------------------


@pytest.mark.parametrize("name", ROTATING)
@pytest.mark.parametrize("plan", [dict(kv_heads=1), dict(kv_ratio=0.4, basis="activation-svd", centred=True)])
def test_a_longer_reach_moves_the_moments(name, plan):
    seen = moments(name)
    moved = seen + placed(seen, from_config(original(name).config), 400 - seen.reach + 1)
    assert moved.reach == 400
    model = small(name, **plan, reach=400)
    close(
        logits(model), logits(compress(original(name), moved, Plan(**plan, reach=400), progress=False)), name
    )
    if "kv_ratio" in plan or seen.source.kv_heads > 1:  # something is left out
        assert differ(
            logits(model), logits(small(name, **plan))
        )  # and where the rest lies makes a difference
    assert model.config.kvteach["reach"] == 400 and small(name, **plan).config.kvteach["reach"] == seen.reach


@pytest.mark.parametrize("name", ROTATING)
@pytest.mark.parametrize("basis", ["commuting-attended", "mean-pool"])
def test_a_basis_that_commutes_has_no_reach(name, basis):
    found = small(name, kv_heads=1, basis=basis, reach=400)
    assert "reach" not in found.config.kvteach
    close(logits(found), logits(small(name, kv_heads=1, basis=basis)), name)


@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
@pytest.mark.parametrize("basis", METHODS)
def test_moments_of_one_basis_are_enough_at_any_reach(name, basis):
    if not fits(name, basis):
        pytest.skip("no RoPE to commute with")
    model, reach = original(name), None if name == "bloom" or basis == "blockwise" else 400
    seen = calibrate(model, tiny.ids(5, 40), attention=basis, progress=False)
    plan = Plan(kv_heads=1, basis=basis, reach=reach)
    found, expected = (compress(model, held, plan, progress=False) for held in (seen, moments(name)))
    # attention's weights come of another path through transformers, which rounds them to float32
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-5)


def test_turns_that_change_with_the_text_cannot_be_moved():
    config = tiny.MODELS["llama-mha"]().config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny._make(LlamaForCausalLM, config)
    seen = calibrate(model, tiny.ids(3, 20), attention=True, progress=False)
    for plan in (Plan(kv_heads=1, reach=90), Plan(kv_heads=1)):
        with pytest.raises(ValueError, match=r"'dynamic'.* reach=N\) and calibrate on windows of N tokens"):
            compress(model, seen, plan, progress=False)
    compress(model, seen, Plan(kv_heads=1, reach=20), progress=False)
    with pytest.raises(ValueError, match="rope_type is 'dynamic'"):
        calibrate(model, tiny.ids(3, 20), attention="blockwise", progress=False)


# -- grouping -----------------------------------------------------------------------------------------------


@given(size=st.integers(1, 8), groups=st.integers(1, 8))
def test_neighbours_partition_the_heads(size, groups):
    found = by_order(size * groups, groups)
    assert [len(group) for group in found] == [size] * groups
    assert [*chain(*found)] == list(range(size * groups))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_similar_heads_partition_the_heads(name, groups):
    for layer in range(3):
        found = by_similarity(moments(name), layer, groups)
        assert {len(group) for group in found} == {4 // groups}
        assert sorted(chain(*found)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_kept_is_a_share(name):
    assert kept(moments(name), 0, [2]) == pytest.approx(1)
    shares = [kept(moments(name), 0, list(range(n))) for n in range(1, 5)]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert kept(moments(name), 0, [1, 3]) == pytest.approx(kept(moments(name), 0, [3, 1]))


# -- the original and everything else stay as they are ------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "llama-tied", "qwen2", "bloom"])
def test_the_original_is_untouched_and_shares_nothing(name):
    model = original(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    model.train()  # a mode is the caller's own
    made = small(name, kv_heads=2)
    assert model.training and not made.training
    model.eval()
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    both = [
        {x.untyped_storage().data_ptr() for x in (*each.parameters(), *each.buffers())}
        for each in (model, made)
    ]
    assert not both[0] & both[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():  # and so it stays when the small one is trained
        for parameter in made.parameters():
            parameter += 1
        made.generation_config.max_new_tokens = 7
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.generation_config.max_new_tokens != 7


def test_tied_embeddings_stay_tied():
    for name, tied in {"llama-tied": True, "llama-mha": False, "bloom": True, "bloom-untied": False}.items():
        made = small(name, kv_heads=2)
        assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) is tied, name


def test_small_models_live_together():
    one, two = small("llama-mha", kv_heads=2), small("llama-mha", kv_ratio=0.25)
    before = logits(one), logits(two)
    three = small("llama-mha", kv_heads=1, stock=True)
    logits(three)
    assert torch.equal(logits(one), before[0]) and torch.equal(logits(two), before[1])
    assert differ(*before) and differ(before[0], logits(three))


def test_nothing_random_is_drawn():
    torch.manual_seed(3)
    expected = torch.rand(4)
    one = small("llama-mha", kv_heads=2)
    torch.manual_seed(3)
    assert torch.equal(logits(one), logits(small("llama-mha", kv_heads=2)))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "bloom"])
def test_dtype_is_kept(name, dtype):
    model = make(name, dtype)
    seen = calibrate(model, tiny.ids(5, 40), attention=True, progress=False)
    for plan in (
        dict(kv_heads=2),
        dict(kv_ratio=0.5),
        dict(kv_heads=2, basis="score-weighted", centred=True),
    ):
        made = compress(model, seen, Plan(**plan), progress=False)
        assert {parameter.dtype for parameter in made.parameters()} == {dtype} == {made.dtype}
        found = logits(made)
        assert found.dtype == dtype and found.isfinite().all()


def test_sizes_come_from_the_plan():
    made = small("llama-mha", kv_heads=2)
    assert made.config.num_key_value_heads == 2 and made.config.source_key_value_heads == 4
    assert (made.config.key_rank, made.config.value_rank) == (16, 16)
    made = small("bloom", kv_ratio=0.25)
    assert (made.config.num_key_value_heads, made.config.key_rank, made.config.value_rank) == (1, 16, 16)
    assert made.config.model_type == "kvteach_bloom"


# -- texts that hardly say anything -------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [torch.full((2, 8), 5), torch.tensor([[7]])], ids=["one-word", "one-token"])
@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_degenerate_calibration(name, ids):
    model = original(name)
    seen = calibrate(model, ids, attention=True, progress=False)
    for basis in METHODS:
        if not fits(name, basis):
            continue
        plans = [dict(kv_heads=2, grouping="similarity")]
        plans += [] if basis in POOLED else [dict(kv_ratio=0.5)]
        plans += [] if basis in UNCENTRED else [dict(kv_heads=1, centred=True)]
        for plan in plans:
            made = compress(model, seen, Plan(**plan, basis=basis), progress=False)
            assert logits(made).isfinite().all(), (basis, plan)


# -- what is refused ----------------------------------------------------------------------------------------


def refuse(message: str, model=None, seen=None, name: str = "llama-mha", **plan):
    with pytest.raises(ValueError, match=message):
        compress(model or original(name), seen or moments(name), Plan(**plan), progress=False)


def test_moments_of_another_model():
    refuse("belong to another model.*calibrate this one", model=make("llama-mha", seed=1), kv_heads=2)
    refuse("belong to another model", model=make("llama-mha", torch.float32), kv_heads=2)
    refuse("belong to another model", model=original("llama-gqa"), kv_heads=1)


@pytest.mark.parametrize("plan", [dict(kv_heads=2), dict(kv_ratio=0.5)])
@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_a_compressed_model(name, plan):
    refuse(
        "compressed already: take the one that it was made from", small(name, **plan), name=name, kv_heads=1
    )
    with pytest.raises(ValueError, match="compressed already"):
        calibrate(small(name, **plan), tiny.ids(), progress=False)


def test_another_architecture():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    refuse("'gpt2' is not supported; kvteach reads llama, mistral, qwen2, bloom", model, kv_heads=1)


@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
def test_a_body_without_a_head(name):
    refuse("no language-model head: load it with AutoModelForCausalLM",
           original(name).base_model, name=name, kv_heads=1)  # fmt: skip


def test_a_basis_that_needs_attention():
    plain = calibrate(original("llama-mha"), tiny.ids(5, 40), progress=False)
    refuse("keys_in_blocks.*calibrate with attention=True", seen=plain, kv_heads=2)
    refuse("keys_attended.*calibrate with attention=True", seen=plain, kv_heads=2, basis="attention-weighted")


def test_centred_without_a_place_for_the_mean():
    for name in ("llama-mha", "mistral", "qwen2"):
        refuse("centred is True; .*leave centred out, or leave stock out",
               name=name, kv_heads=1, stock=True, basis="mean-pool", centred=True)  # fmt: skip


def test_centred_where_the_basis_has_no_mean():
    for basis in ("attention-weighted", "blockwise", "commuting-attended", "weight-svd"):
        refuse("centred", kv_heads=2, basis=basis, centred=True)


def test_heads_that_do_not_fit_this_model():
    refuse("kv_heads is 4; for 2 key-value heads it must be one of 1, 2", name="llama-gqa", kv_heads=4)


def test_no_rope_to_commute_with():
    refuse("bloom model has no RoPE", name="bloom", kv_heads=2, basis="commuting")
    refuse("bloom model has no RoPE.*leave stock out", name="bloom", kv_heads=2, stock=True)


def test_nan():
    broken = make("llama-mha")
    with torch.no_grad():
        attention_modules(broken)[1].k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1, batch 0: keys_pre hold NaN or infinity"):
        calibrate(broken, tiny.ids(), progress=False)
    seen = calibrate(original("llama-mha"), tiny.ids(5, 40), attention=True, progress=False)
    seen.gram["values"][2] = torch.nan
    with pytest.raises((ValueError, RuntimeError)):
        compress(original("llama-mha"), seen, Plan(kv_heads=2, basis="activation-svd"), progress=False)
    seen = calibrate(original("llama-mha"), tiny.ids(5, 40), progress=False)
    seen.total["values"][2] = torch.nan
    refuse("NaN", seen=seen, kv_heads=2, basis="mean-pool", centred=True)


def test_the_docstring_names_every_error():
    text = inspect.getdoc(compress)
    assert all(word in text for word in ("architecture", "already compressed", "another model", "not finite"))
    assert Source.of(original("llama-mha")) == moments("llama-mha").source
    assert isinstance(small("llama-mha", kv_heads=2), LlamaForCausalLM)


def test_names_at_the_top():
    import kvteach

    assert kvteach.compress is compress and kvteach.Plan is Plan
