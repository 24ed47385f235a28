"""Tiny random models, one per architecture the package reads. Seeded, float64 unless asked otherwise."""

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 97
_LLAMA = dict(
    hidden_size=64, num_attention_heads=4, num_hidden_layers=3, intermediate_size=96, vocab_size=VOCABULARY
)


def _make(model_class, config, dtype=torch.float64):
    torch.manual_seed(0)
    return model_class(config).to(dtype).eval()


MODELS = {
    "llama-mha": lambda **kw: _make(LlamaForCausalLM, LlamaConfig(**_LLAMA, num_key_value_heads=4), **kw),
    "llama-gqa": lambda **kw: _make(LlamaForCausalLM, LlamaConfig(**_LLAMA, num_key_value_heads=2), **kw),
    "llama-mqa-bias": lambda **kw: _make(
        LlamaForCausalLM, LlamaConfig(**_LLAMA, num_key_value_heads=1, attention_bias=True, head_dim=8), **kw
    ),
    "mistral": lambda **kw: _make(
        MistralForCausalLM, MistralConfig(**_LLAMA, num_key_value_heads=2, sliding_window=5), **kw
    ),
    "qwen2": lambda **kw: _make(Qwen2ForCausalLM, Qwen2Config(**_LLAMA, num_key_value_heads=2), **kw),
    "bloom": lambda **kw: _make(
        BloomForCausalLM, BloomConfig(hidden_size=64, n_head=4, n_layer=3, vocab_size=VOCABULARY), **kw
    ),
}


def ids(batch: int = 2, tokens: int = 11, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, tokens]."""
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
