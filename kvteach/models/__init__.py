"""Compressed models: small subclasses of transformers' own, one file an architecture.

A compressed model is the original with another attention module. What goes into the cache is already small, so every
cache class of transformers holds it, and ``generate`` needs to know nothing. Importing this module enters the classes
into transformers' tables, so that ``AutoModelForCausalLM.from_pretrained`` finds them; nothing else is touched.

Added to the config of the original:

=========================  ==========================================================================================
``num_key_value_heads``    g, the heads that are cached
``source_key_value_heads`` n, the heads that the original cached
``key_rank``               numbers cached per head and token for keys; None for head_dim
``value_rank``             the same for values
``key_block``              keys are turned by their place in a block of so many tokens; None: by their position
``output_bias``            the attention's output has a bias that the original has not (the mean of centred values)
``head_order``             BLOOM: for each layer the original index of each query head, None when nothing moved
``kvteach``                the plan and what it was made from
=========================  ==========================================================================================
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import bloom, llama

# model_type of the original -> config, body, model with a language-model head
CLASSES = {
    "llama": (llama.KvteachLlamaConfig, llama.KvteachLlamaModel, llama.KvteachLlamaForCausalLM),
    "mistral": (llama.KvteachMistralConfig, llama.KvteachMistralModel, llama.KvteachMistralForCausalLM),
    "qwen2": (llama.KvteachQwen2Config, llama.KvteachQwen2Model, llama.KvteachQwen2ForCausalLM),
    "bloom": (bloom.KvteachBloomConfig, bloom.KvteachBloomModel, bloom.KvteachBloomForCausalLM),
}

for _config, _body, _model in CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _body, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
