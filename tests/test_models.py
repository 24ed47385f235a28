"""Compressed models at work: the cache, generate, files, and what must stay of transformers."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import lively
import pytest
import tiny
import torch
from lively import TOLERANCE, logits, make, moments, original
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import kvteach
from kvteach import cost
from kvteach.calibration import calibrate
from kvteach.convert import compress
from kvteach.memory import Made
from kvteach.plan import Plan

FORMS = {
    "G": dict(kv_heads=1, basis="attention-weighted"),
    "R": dict(kv_ratio=0.4, basis="attention-weighted"),
    "S": dict(kv_heads=1, stock=True),
    "blocks": dict(kv_ratio=0.4),
    "similar": dict(kv_heads=2, basis="activation-svd", grouping="similarity"),
}
CASES = [
    pytest.param(name, form, id=f"{name}-{form}")
    for name in tiny.MODELS
    for form in FORMS
    if not (name == "bloom" and form in ("S", "blocks"))
    and not (form == "similar" and name not in ("llama-mha", "bloom"))
]
SOME = [("llama-mha", "G"), ("qwen2", "S"), ("mistral", "R"), ("bloom", "similar"), ("llama-gqa", "blocks")]
ROOT = Path(kvteach.__file__).parents[1]


def small(name: str, form: str):
    """The compressed model of a shared original; blocks are so short that a text has several."""
    with mock.patch.object(kvteach.plan, "BLOCK", 4):
        return compress(original(name), moments(name), Plan(**FORMS[form]), progress=False)


def small_float32(name: str, form: str):
    """The same in float32. BLOOM's mask is the least number of its dtype, cast to the float32 of its softmax: in
    float64 that is -inf, and padding, all of whose scores it hides, becomes NaN; transformers' own BLOOM does so too.
    """
    return small(name, form).to(torch.float32)


def sample(model, ids, seed: int = 5, **options):
    torch.manual_seed(seed)
    return model.generate(
        ids,
        attention_mask=options.pop("attention_mask", torch.ones_like(ids)),
        max_new_tokens=8,
        **options,
    )


def left_padded():
    """Two texts of 4 and 9 tokens, as one batch and mask."""
    ids = tiny.ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids.masked_fill(mask == 0, 0), mask


# -- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "form"), CASES)
@torch.no_grad()
def test_token_by_token_is_the_whole_text(name, form, kind):
    model, ids = small(name, form), tiny.ids()
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=ids.shape[1])
    )
    found = [model(ids[:, :4], past_key_values=cache).logits]
    found += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(4, ids.shape[1])]
    torch.testing.assert_close(torch.cat(found, 1), logits(model, ids), rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize(("name", "form"), SOME)
@torch.no_grad()
def test_a_text_in_pieces_is_the_whole_text(name, form):
    model, ids, cache = small(name, form), tiny.ids(), DynamicCache()
    found = [model(piece, past_key_values=cache).logits for piece in ids.split(4, 1)]
    torch.testing.assert_close(torch.cat(found, 1), logits(model, ids), rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama-mha", "mistral"])
@torch.no_grad()
def test_both_ways_of_attention_agree(name, implementation):
    """To float32: eager attention computes its softmax in that."""
    model = small(name, "R")
    expected = logits(model)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    cache = DynamicCache(config=model.config)
    model(tiny.ids()[:, :-1], past_key_values=cache)
    last = model(tiny.ids()[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=9)])
@pytest.mark.parametrize(("name", "form"), CASES)
@torch.no_grad()
def test_all_that_a_step_makes_lives_where_the_model_lives(name, form, kind):
    """On a device without numbers: a tensor made on another, or a number asked for, would be an error there."""
    model, ids = small(name, form).to("meta"), tiny.ids(2, 6).to("meta")
    cache = kind(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    assert model(ids[:, 5:], past_key_values=cache).logits.device.type == "meta"


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "bloom"])
@torch.no_grad()
def test_attention_weights_are_handed_out(name):
    """One row of weights for each query head and token, in decoding as in the whole text."""
    model, ids = small(name, "G"), tiny.ids()
    model.set_attn_implementation("eager")
    whole = model(ids, output_attentions=True).attentions
    cache = DynamicCache()
    model(ids[:, :-1], past_key_values=cache)
    step = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
    for one, all_ in zip(step, whole, strict=True):
        assert one.shape == (2, 4, 1, 11)
        torch.testing.assert_close(one, all_[:, :, -1:], rtol=0, atol=TOLERANCE[name])
        torch.testing.assert_close(one.sum(-1), torch.ones_like(one.sum(-1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "form"), CASES)
@torch.no_grad()
def test_bytes_are_those_that_were_promised(name, form, kind):
    model, ids = small(name, form), tiny.ids(3, 5)  # Mistral's window is 5 tokens: nothing is thrown away yet
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=5)
    model(ids, past_key_values=cache)
    found = sum(x.element_size() * x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    whole, plan = cost.Shape.from_config(original(name).config), Plan(**FORMS[form])
    if plan.form == "R":
        ranks = plan.layout(moments(name).source)[1:]
        expected = cost.cache_bytes(whole, tokens=5, batch=3, bytes_per_number=8, ranks=ranks)
        assert expected < cost.cache_bytes(whole, tokens=5, batch=3, bytes_per_number=8)
    else:
        shrunk = whole.compress(plan.kv_heads, plan.form)
        expected = cost.cache_bytes(shrunk, tokens=5, batch=3, bytes_per_number=8)
    assert found == expected
    assert {layer.keys.untyped_storage().nbytes() for layer in cache.layers} == {
        layer.keys.numel() * 8 for layer in cache.layers
    }  # a slice of something larger would count small and be large


@pytest.mark.parametrize(
    ("name", "form"), [("llama-mha", "G"), ("qwen2", "S"), ("mistral", "R"), ("llama-mha", "R")]
)
@torch.no_grad()
def test_decoding_reads_the_cache_in_place(name, form, monkeypatch):
    model, seen, attend = small(name, form), [], functional.scaled_dot_product_attention

    def watch(query, key, value, *args, **kwargs):
        seen.append((query.shape, key, value))
        return attend(query, key, value, *args, **kwargs)

    cache = DynamicCache()
    model(tiny.ids(), past_key_values=cache)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    model(tiny.ids()[:, :1], past_key_values=cache)
    groups = model.config.num_key_value_heads
    assert len(seen) == len(cache.layers)
    for (query, key, value), layer in zip(seen, cache.layers, strict=True):
        assert key.shape[1] == value.shape[1] == groups and query[1] * query[2] == 4
        assert key.data_ptr() == layer.keys.data_ptr() and value.data_ptr() == layer.values.data_ptr()


class Largest(TorchDispatchMode):
    """The largest tensor with an axis of `tokens` that any operation returned."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.numel = tokens, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor) and self.tokens in x.shape:
                self.numel = max(self.numel, x.numel())
        return found


@pytest.mark.parametrize("name", ["llama-mha", "bloom"])
@pytest.mark.parametrize("form", ["G", "R"])
@torch.no_grad()
def test_no_step_of_decoding_makes_the_cache_larger(name, form):
    model, cache, tokens = small(name, form), DynamicCache(), 211
    model(tiny.ids(1, tokens - 1), past_key_values=cache)
    with Largest(tokens) as seen:
        model(tiny.ids(1, 1), past_key_values=cache)
    largest = max(layer.keys.numel() for layer in cache.layers)
    assert seen.numel == largest < tokens * 4 * 16


@pytest.mark.parametrize("slots", [224, 230], ids=["whole blocks", "a block begun"])
@pytest.mark.parametrize("form", ["G", "R", "blocks"])
@torch.no_grad()
def test_a_step_on_a_static_cache_copies_no_keys(form, slots):
    model = small("llama-gqa", form)
    if form == "blocks":  # so long that fewer queries than keys are made
        model.config.key_block = 16
        for layer in model.model.layers:
            layer.self_attn.block = 16
    cache = StaticCache(config=model.config, max_cache_len=slots)
    model(tiny.ids(2, 210), past_key_values=cache)
    with Made() as made:
        model(tiny.ids(2, 1), past_key_values=cache)
    assert 2 * max(size for _, size in made.shapes) < min(layer.keys.nbytes for layer in cache.layers)


# -- generate -----------------------------------------------------------------------------------------------

WAYS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.7, top_k=20),
    "beams": dict(do_sample=False, num_beams=3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "form"), SOME)
def test_generate_with_a_cache_is_generate_without(name, form, way):
    model = small(name, form)
    found = sample(model, tiny.ids(2, 6), **WAYS[way])
    assert found.shape == (2, 14)
    assert torch.equal(found, sample(model, tiny.ids(2, 6), use_cache=False, **WAYS[way]))
    if way == "greedy":
        assert torch.equal(found, sample(model, tiny.ids(2, 6), cache_implementation="static", **WAYS[way]))


@pytest.mark.parametrize(
    ("name", "form"), [*SOME[:-1], ("llama-mqa-bias", "G"), ("llama-gqa", "S"), ("bloom", "R")]
)
def test_a_padded_batch_is_its_rows_alone(name, form):
    model = small_float32(name, form)
    ids, mask = left_padded()
    together = sample(model, ids, attention_mask=mask, do_sample=False)
    for row, (text, seen) in enumerate(zip(ids, mask, strict=True)):
        alone = sample(model, text[seen == 1][None], do_sample=False)
        assert torch.equal(together[row, -8:], alone[0, -8:])
    # Without RoPE in the basis (forms G and R) a latent depends on its position, so padding must not count.
    positions = {} if name == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    scores = logits(model, ids, attention_mask=mask, **positions)[0, 5:]
    torch.testing.assert_close(scores, logits(model, ids[:1, 5:])[0], rtol=0, atol=2e-5)
    assert sample(model, ids, attention_mask=mask, do_sample=True).shape == (2, 17)
    assert sample(model, ids, attention_mask=mask, do_sample=False, num_beams=2).shape == (2, 17)


def test_bloom_in_float64_pads_no_worse_than_the_original():
    """NaN at padding comes from transformers (see `small_float32`), so both have it or neither."""
    ids, mask = left_padded()
    both = [
        logits(model, ids, attention_mask=mask).isfinite()
        for model in (original("bloom"), small("bloom", "G"))
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("form", ["G", "blocks"])
def test_quantised_cache(form):
    """transformers quantises what a layer is handed, so a small cache is quantised as any other."""
    pytest.importorskip("optimum.quanto", reason="no backend for a quantised cache is installed")
    model = small_float32("llama-mha", form)
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 4, "residual_length": 4}
    found = sample(model, tiny.ids(2, 6), cache_implementation="quantized", cache_config=config)
    assert found.shape == (2, 14)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache moves layers to a GPU and back")
@pytest.mark.parametrize("form", ["G", "blocks"])
def test_offloaded_cache(form):
    model = small_float32("llama-mha", form).cuda()
    ids = tiny.ids(2, 6).cuda()
    found = sample(model, ids, do_sample=False, cache_implementation="offloaded")
    assert torch.equal(found, sample(model, ids, do_sample=False))


@pytest.mark.parametrize(("name", "form"), SOME)
def test_a_small_model_can_be_trained(name, form):
    model = small(name, form).train()
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    for key, parameter in model.named_parameters():
        if "k_proj.bias" in key and name == "bloom":  # a constant in all keys: softmax does not see it
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@torch.no_grad()
def test_a_step_compiles_in_one_graph():
    """Tracing only: what the C++ compiler makes of the graph is its own affair."""
    model, ids = small("llama-mha", "G"), tiny.ids()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids, past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    found = step(ids[:, :1], past_key_values=cache).logits
    whole = logits(model, torch.cat([ids, ids[:, :1]], 1))[:, -1:]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
    torch._dynamo.reset()


# -- files --------------------------------------------------------------------------------------------------

SAME = 1e-12  # weights come back to the bit, but lie elsewhere in memory, and matrix products may add in another order

READ = """
import json, os, sys
folder, first, *names = sys.argv[1:]
if first == "kvteach":
    import kvteach
import torch
import transformers.modeling_utils as utils
import transformers.models.llama.modeling_llama as llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

def state():
    return dict(llama.LlamaAttention.__dict__), dict(utils.ALL_ATTENTION_FUNCTIONS), llama.apply_rotary_pos_emb

if first == "transformers":  # as anyone's script would be: without this package a model is refused
    try:
        AutoModelForCausalLM.from_pretrained(os.path.join(folder, names[0]))
    except ValueError as error:
        print(error)
    before = state()
    import kvteach
    import kvteach.convert
    assert state() == before
assert not any("kvteach" in type(finder).__module__ for finder in sys.meta_path)  # it waited no longer than needed
config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=5)
assert type(AutoModelForCausalLM.from_config(config)) is llama.LlamaForCausalLM
found = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(os.path.join(folder, name))
    with torch.no_grad():
        found[name] = model(torch.load(os.path.join(folder, "ids.pt")), use_cache=False).logits
torch.save(found, os.path.join(folder, first + ".pt"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a saved model of every family and form."""
    folder = tmp_path_factory.mktemp("saved")
    torch.save(tiny.ids(), folder / "ids.pt")
    for case in CASES:
        name, form = case.values
        small(name, form).save_pretrained(folder / f"{name}-{form}")
    return folder


NAMES = [case.id for case in CASES]


@pytest.mark.parametrize("first", ["kvteach", "transformers"])
def test_a_fresh_process_reads_what_was_saved(folder, first):
    """Whichever is imported first. Importing this package leaves transformers' LLaMA as it is, and needed it is."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, str(folder), first, *NAMES]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert ("kvteach_llama" in ran.stdout) == (first == "transformers")
    found = torch.load(folder / f"{first}.pt")
    for case in CASES:
        name, form = case.values
        torch.testing.assert_close(found[case.id], logits(small(name, form)), rtol=0, atol=SAME)


def test_the_plan_is_in_the_config(folder):
    for case in CASES:
        name, form = case.values
        config = json.loads((folder / case.id / "config.json").read_text())
        assert Plan(**config["kvteach"]["plan"]) == Plan(**FORMS[form])
        assert config["kvteach"]["version"] == kvteach.__version__
        assert config["kvteach"]["source"] == vars(moments(name).source)
        stock = form == "S"
        assert (
            config["model_type"] == original(name).config.model_type
            if stock
            else "kvteach_" in config["model_type"]
        )
        assert "auto_map" not in config
        assert {file.suffix for file in (folder / case.id).iterdir()} == {".json", ".safetensors"}


def test_sharded_files(tmp_path):
    for name, form in (("llama-mha", "G"), ("bloom", "R"), ("llama-tied", "G")):
        model = small(name, form)
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=SAME)
        state = model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
        assert again.dtype == torch.float64 and type(again) is type(model)
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied is (name != "llama-mha")


def test_saved_again_is_the_same(tmp_path):
    model = small("bloom", "similar")
    model.save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_zoo_loads_a_folder(tmp_path):
    from kvteach import zoo

    original_folder = zoo.NAMES["mini-llama"].folder
    model = small("llama-mha", "G")
    model.save_pretrained(tmp_path)
    for file in original_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    again, tokenizer = zoo.load(str(tmp_path), device="cpu")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=SAME)
    assert not again.training
    assert tokenizer("a")["input_ids"]


def test_a_named_model_from_end_to_end():
    from kvteach import zoo

    for name in ("mini-llama", "mini-bloom"):
        model, tokenizer = zoo.load(name, device="cpu")
        ids = tokenizer("Return the number of items in a container.", return_tensors="pt").input_ids
        seen = calibrate(model, ids, attention=True, progress=False)
        model_8 = compress(model, seen, Plan(kv_heads=8), progress=False)
        torch.testing.assert_close(logits(model_8, ids), logits(model, ids), rtol=0, atol=1e-3)
        text = compress(model, seen, Plan(kv_heads=2), progress=False).generate(ids, max_new_tokens=4)
        assert text.shape[1] <= ids.shape[1] + 4


def test_the_original_runs_on_as_before():
    model = make("llama-mha")
    before = logits(model)
    logits(small("llama-mha", "G"))
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(lively.original("llama-mha")), before)


# -- positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lively.ROTATING)
def test_a_text_beyond_the_reach_is_warned_of(name):
    model = compress(original(name), moments(name), Plan(kv_heads=1, reach=50), progress=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tiny.ids(1, 50))
    with torch.no_grad(), pytest.warns(UserWarning, match="longer than the 50 positions .* with reach=51"):
        model(tiny.ids(1, 51))
    with pytest.warns(UserWarning, match="longer than the 50 positions"):  # the cache counts
        sample(model, tiny.ids(1, 45))
    with torch.no_grad(), pytest.warns(UserWarning, match="longer than the 50 positions"):
        model(inputs_embeds=model.get_input_embeddings()(tiny.ids(1, 51)))


def test_what_holds_everywhere_does_not_warn():
    plans = [("llama-gqa", dict(kv_heads=1, stock=True)), ("llama-gqa", dict(kv_heads=1, basis="commuting"))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, plan in [*plans, ("llama-gqa", dict(kv_heads=1)), ("bloom", dict(kv_heads=1))]:
            compress(original(name), moments(name), Plan(**plan), progress=False)(tiny.ids(1, 60))
