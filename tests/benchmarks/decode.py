"""Decoding: the original, compressed, native GQA of the same shape, and other ways of running the same native model.

Models of random weights, hidden 512, 6 layers, 8 heads of 64, as the minis are built; batch 8, 8192 tokens in a static
cache, so that a step reads the cache once and copies nothing. `folded` is what transformers and kvteach do for one new
token; `enable_gqa` hands PyTorch the few heads as they are; `repeat_kv` repeats them, as transformers does under
torch.compile and did everywhere before. `in blocks` are compressed models whose keys
are turned within blocks. "attention" is what a step takes beyond one with 16 cached tokens.
"""

from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from kvteach import env, throughput
from kvteach.plan import Plan

SHORT, LONG, BATCH = 16, 8192, 8
STEPS = dict(steps=3, repeats=7, prefill=False, progress=False)
SIZES = dict(
    hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1024, vocab_size=4096
)


def enable_gqa(module, query, key, value, attention_mask, scaling=None, **options):
    """[batch, heads, 1, d] on [batch, g, tokens, d] twice -> [batch, 1, heads, d]."""
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def repeated(module, query, key, value, attention_mask, scaling=None, **options):
    """The same with as many key-value heads as query heads."""
    key, value = (repeat_kv(part, module.num_key_value_groups) for part in (key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


OTHER = {"enable_gqa": enable_gqa, "repeat_kv": repeated}


def native(kv_heads: int, attention: str = "sdpa"):
    """A LLaMA that was never compressed."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=kv_heads))
    model = model.to(env.device(), env.half_dtype())
    model.set_attn_implementation(attention)
    return model


def measure() -> dict:
    """The sweep, and the ratios that are asked about."""
    for name, way in OTHER.items():  # of this process only
        AttentionInterface.register(name, way)
        AttentionMaskInterface.register(name, sdpa_mask)
    mha = native(8)
    models = {"MHA": mha}
    for g in (4, 2, 1):
        by_position = Plan(kv_heads=g, basis="attention-weighted")
        models |= {f"compressed {g}": throughput.shaped(mha, by_position), f"native {g}": native(g)}
        models[f"in blocks {g}"] = throughput.shaped(mha, Plan(kv_heads=g))
    short = throughput.sweep(models, [SHORT], [BATCH], **STEPS)
    long = throughput.sweep(models, [LONG], [BATCH], **STEPS)
    ways = {"folded": models["native 2"]} | {way: native(2, way) for way in OTHER}
    other = throughput.sweep(ways, [LONG], [BATCH], **STEPS)  # apart: repeating takes its time
    found = {"short": short, "long": long, "other ways": other}
    for sweep in found.values():
        print(throughput.table(sweep))
    start, step = ({row["model"]: row["step_seconds"] for row in part["rows"]} for part in (short, long))
    attention = {name: step[name] - start[name] for name in models}
    speedup = {row["model"]: row["speedup"] for row in long["rows"]}
    found["ratios"] = {
        "compressed over native, tokens per second": {
            g: speedup[f"compressed {g}"] / speedup[f"native {g}"] for g in (4, 2, 1)
        },
        "in blocks over compressed, tokens per second": {
            g: speedup[f"in blocks {g}"] / speedup[f"compressed {g}"] for g in (4, 2, 1)
        },
        "attention, speed-up over MHA as a share of h / g": {
            g: attention["MHA"] / attention[f"compressed {g}"] / (8 / g) for g in (4, 2, 1)
        },
        "native 2, folded over another way, tokens per second": {
            row["model"]: 1 / row["speedup"] for row in other["rows"][1:]
        },
        "predicted over measured, tokens per second": {
            row["model"]: row["predicted"] / row["tokens_per_second"] for row in long["rows"]
        },
    }
    for name, ratios in found["ratios"].items():
        print(f"{name}: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()))
    return found
