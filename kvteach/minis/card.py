"""The model card of a mini: its weights are written in float16, read back, measured on held-out text and described."""

import copy
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from .. import text
from ..calibration import calibrate
from ..convert import compress
from ..evaluate import Reference, compare
from ..evaluate import perplexity as evaluated
from ..plan import Plan
from ..zoo import check_family
from . import data

BASES = ("mean-pool", "attention-weighted")


def write(name: str, model, tokenizer, folder: Path, tokens: float, text_tokens: int, seconds: float) -> None:
    """Write the model's folder: float16 weights that load as float32, tokenizer, card, and the numbers as JSON."""
    from transformers import AutoModelForCausalLM

    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # what "auto" loads them as
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    rounded = AutoModelForCausalLM.from_pretrained(folder)
    found = measure(rounded, tokenizer) | {"tokens": int(tokens), "seconds": round(seconds)}
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "README.md").write_text(_card(name, rounded, found, text_tokens))


def measure(model, tokenizer) -> dict:
    """Perplexity on the held-out sides, energies of keys and values, and perplexity with fewer key-value heads."""
    held_out = {n: text.windows(tokenizer, 32, 512, "evaluation", n).ids for n in data.TEXTS}
    perplexity = {
        n: round(evaluated(model, ids, progress=False).perplexity, 2) for n, ids in held_out.items()
    }
    read = torch.cat([text.windows(tokenizer, 8, 512, "calibration", n).ids for n in data.TEXTS])
    moments = calibrate(model, read, attention=True, progress=False)
    source, energy = moments.source, {}
    for kind in ("keys_post", "values"):
        spectra = torch.stack([moments.spectrum(kind, layer) for layer in range(source.layers)])
        share = spectra.cumsum(1) / spectra.sum(1, keepdim=True)  # [layers, d]
        d = share.shape[1]
        energy[kind] = {str(part): round(share[:, d // part - 1].mean().item(), 4) for part in (2, 4, 8)}
    few = torch.cat([ids[:8] for ids in held_out.values()])
    reference, ratio = Reference.of(model, few, progress=False), {}
    for basis in BASES:
        ratio[basis] = {}
        for kv_heads in (source.kv_heads // 2**n for n in (1, 2, 3)):
            small = compress(model, moments, Plan(kv_heads=kv_heads, basis=basis), progress=False)
            ratio[basis][str(kv_heads)] = round(compare(small, reference, progress=False).ratio, 3)
    return {"perplexity": perplexity, "energy": energy, "ratio": ratio}


def _card(name: str, model, found: dict, text_tokens: int) -> str:
    config, family = model.config, check_family(model.config)
    position = {"llama": "RoPE", "bloom": "ALiBi"}[family]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))
    rows = "\n".join(
        f"| {basis} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios.values()) + " |"
        for basis, ratios in found["ratio"].items()
    )
    heads = " | ".join(next(iter(found["ratio"].values())))
    energy = "\n".join(
        f"| {kind} | " + " | ".join(f"{share:.3f}" for share in parts.values()) + " |"
        for kind, parts in found["energy"].items()
    )
    perplexity = "\n".join(f"| {n} | {value:.1f} |" for n, value in found["perplexity"].items())
    return f"""# {name}

A {type(model).__name__} with {position} and one key-value head per query head, for looking at caches. It is no
language model to talk to: it is small, and it has read only a little.

- Size: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {config.num_hidden_layers} layers, \
{config.num_attention_heads} heads, hidden size {config.hidden_size}, {config.vocab_size} tokens of byte-level BPE.
- Text: docstrings of installed Python packages (`kvteach/minis/data.py` lists them), and the calibration sides of
  {" and ".join(data.TEXTS)}; {text_tokens / 1e6:.1f} million tokens. The evaluation sides are left
  out, and so is every docstring that stands in one word for word; near copies in other packages were not searched for.
- Training: {found["tokens"] / 1e6:.2f} million tokens in {found["seconds"]} seconds, windows of 512, four a step,
  AdamW; Python {platform.python_version()}, {versions}. Made by
  `python -m kvteach.minis.train {name} --tokens {found["tokens"]}`; seconds are of a busy machine's clock.
- Weights are stored in float16 and load as float32; all numbers here are measured with the stored weights.

Perplexity per token on 32 held-out windows of 512 tokens:

| text | perplexity |
|---|---|
{perplexity}

Energy in the largest half, quarter and eighth of the directions of a layer's cache, mean over layers:

| | 1/2 | 1/4 | 1/8 |
|---|---|---|---|
{energy}

Held-out perplexity with fewer key-value heads, without any training, as a ratio to the whole model (8 windows of each
text; bases calibrated on 8 windows of each calibration side):

| basis, key-value heads | {heads} |
|{"---|" * (len(next(iter(found["ratio"].values()))) + 1)}
{rows}

A model this young has values of low rank: it shows what a method does, not how much a grown model would lose.
"""
