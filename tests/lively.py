"""The tiny models of `tiny`, with weights that a mistake shows in, and what conversion asks of them.

Freshly made models have zero biases, norms of one and nearly uniform attention: a lost bias or a wrong head would
hardly move their logits. Here every parameter is drawn again.
"""

from functools import cache

import tiny
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from kvteach.calibration import calibrate

MODELS = tiny.MODELS | {
    "llama-tied": lambda **kw: tiny._make(
        LlamaForCausalLM,
        LlamaConfig(**tiny._LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
        **kw,
    ),
    "bloom-untied": lambda **kw: tiny._make(
        BloomForCausalLM,
        BloomConfig(
            hidden_size=64, n_head=4, n_layer=3, vocab_size=tiny.VOCABULARY, tie_word_embeddings=False
        ),
        **kw,
    ),
}
ROTATING = ("llama-mha", "llama-gqa", "llama-mqa-bias", "mistral", "qwen2")
# BLOOM computes its softmax in float32, whatever its dtype: rounding of 6e-8 enters at every layer.
TOLERANCE = {name: 1e-5 if name.startswith("bloom") else 1e-9 for name in MODELS}


def make(name: str, dtype=torch.float64, seed: int = 0):
    """A model of that kind with lively weights, its own every time."""
    model, generator = MODELS[name](dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # a matrix reads 64 numbers, so its outputs are about 1
            drawn = 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn + (parameter.ndim == 1 and "norm" in name_of(model, parameter)))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # so that every text gets as long as asked
    return model


def name_of(model, wanted) -> str:
    """The name of a parameter, with BLOOM's one oddly named norm called a norm."""
    name = next(name for name, parameter in model.named_parameters() if parameter is wanted)
    return name.replace("ln_f.weight", "norm.weight")


@cache
def original(name: str):
    """One model of each kind, shared: tests leave it as it is."""
    return make(name)


@cache
def moments(name: str):
    """Its moments over 5 windows × 40 tokens, more than any width here."""
    return calibrate(original(name), tiny.ids(5, 40), attention=True, progress=False)


@torch.no_grad()
def logits(model, ids=None, **options) -> torch.Tensor:
    """[batch, tokens, vocabulary], without a cache."""
    return model(tiny.ids() if ids is None else ids, use_cache=False, **options).logits
