"""LLaMA, Mistral and Qwen2 with a small cache (forms G and R).

    k = RoPE(x W_K)            all n heads of the original, side by side in g groups of n / g heads
    c = k_γ E_γ                [t · d_h] -> [r_k], cached        (`k_down`)
    q̃ = RoPE(x W_Q^j) M_j      [d_h] -> [r_k], M_j = D_γ,iᵀ      (`q_map`)
    o = softmax(q̃ cᵀ / √d_h) v        v = x W_V E, cached as [r_v]; its decoder is inside W_O

Query heads stand in the order of their groups, so grouped-query attention finds them. The scale stays 1/√d_h.

In decoding, the query heads of a group are folded into query positions: [batch, h, 1, r] is viewed as
[batch, g, h/g, r]. The group's keys and values are then read in place. Repeating them for each query head would give
the gain of the small cache away.

With `key_block`, RoPE turns keys within blocks only (`kvteach.models.blocks`). Positions that jump would be read
wrongly; within one call they are refused.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .blocks import Turns, rebuilt, softmax_row, turned


class KvteachLlamaConfig(LlamaConfig):
    """LlamaConfig and the fields of `kvteach.models`."""

    model_type = "kvteach_llama"
    base_model_tp_plan = None  # LLaMA's would shard the basis wrongly
    source_key_value_heads: int | None = None
    key_rank: int | None = None
    value_rank: int | None = None
    key_block: int | None = None
    output_bias: bool = False
    kvteach: dict | None = None


class KvteachMistralConfig(MistralConfig):
    """MistralConfig and the fields of `kvteach.models`."""

    model_type = "kvteach_mistral"
    base_model_tp_plan = None
    source_key_value_heads: int | None = None
    key_rank: int | None = None
    value_rank: int | None = None
    key_block: int | None = None
    output_bias: bool = False
    kvteach: dict | None = None


class KvteachQwen2Config(Qwen2Config):
    """Qwen2Config and the fields of `kvteach.models`."""

    model_type = "kvteach_qwen2"
    base_model_tp_plan = None
    source_key_value_heads: int | None = None
    key_rank: int | None = None
    value_rank: int | None = None
    key_block: int | None = None
    output_bias: bool = False
    kvteach: dict | None = None


class _SmallCache:
    """What the three attention classes have in common."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        h, g, d_h = config.num_attention_heads, config.num_key_value_heads, self.head_dim
        n = config.source_key_value_heads or g
        self.groups, self.value_rank = g, config.value_rank or d_h
        key_rank = config.key_rank or d_h
        self.block = config.key_block
        self.num_key_value_groups = 1  # the attention functions are handed as many query heads as cached ones
        biased = {name: getattr(self, name).bias is not None for name in ("k_proj", "v_proj", "o_proj")}
        self.k_proj = nn.Linear(config.hidden_size, n * d_h, bias=biased["k_proj"])
        self.v_proj = nn.Linear(config.hidden_size, g * self.value_rank, bias=biased["v_proj"])
        self.o_proj = nn.Linear(
            h * self.value_rank, config.hidden_size, bias=biased["o_proj"] or config.output_bias
        )
        self.k_down = nn.Parameter(torch.zeros(g, n // g * d_h, key_rank))
        self.q_map = nn.Parameter(torch.zeros(h, d_h, key_rank))

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        turns=None,
        **kwargs,
    ):
        """As transformers' own; the cache gets [batch, g, tokens, r]. `turns` are those of the pass, for blocks."""
        shape = hidden_states.shape[:-1]  # [batch, tokens]
        # [batch, tokens, heads · width] -> [batch, heads, tokens, width]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, self.groups, -1).transpose(1, 2)
        if self.block:
            key = turned(key, *turns.keys(key))
        else:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            query = torch.einsum("bhld,hdr->bhlr", query, self.q_map)
        # [batch, n, tokens, d_h] -> [batch, g, tokens, t · d_h]
        key = key.unflatten(1, (self.groups, -1)).transpose(2, 3).flatten(3)
        key = torch.einsum("bgld,gdr->bglr", key, self.k_down)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        implementation, window = self.config._attn_implementation, getattr(self, "sliding_window", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        ours = implementation in ("eager", "sdpa")
        folded, heads = shape[1] == 1 and ours, self.q_map.shape[0] // self.groups
        if self.block and folded and window is None:
            return self._decode(query, key, value, attention_mask, turns.asked(query, key.shape[2]))
        if self.block:
            query = turned(query, *turns.queries(query))
            key = rebuilt(key, self.q_map, *turns.stored(key, key.shape[2]))  # [batch, h, …, d_h] both
            value, folded = repeat_kv(value, heads), False
            # kernels that do not form all scores want one width
            wide = max(self.head_dim, self.value_rank)
            query, key, value = (functional.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
        elif folded:
            query = query.reshape(len(query), self.groups, -1, query.shape[-1])  # [batch, g, h/g, r_k]
            kwargs["is_causal"] = False  # these are heads of one position
        elif ours:  # a whole text: for its length only, not for each later token
            key, value = repeat_kv(key, heads), repeat_kv(value, heads)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=window,
            **kwargs,
        )
        output = output[..., : self.value_rank]
        if folded:  # [batch, h/g, g, r_v] -> [batch, 1, h, r_v]
            output = output.transpose(1, 2).reshape(*shape, -1, self.value_rank)
            weights = None if weights is None else weights.flatten(1, 2).unsqueeze(2)
        return self.o_proj(output.reshape(*shape, -1)), weights

    def _decode(self, query: Tensor, latent: Tensor, value: Tensor, mask: Tensor | None, turns):
        """One token reads the blocks where they lie: as `forward` returns. Query [batch, h, 1, d_h], before RoPE."""
        row = softmax_row(query * self.scaling, latent, self.q_map, *turns, self.block, mask).to(value.dtype)
        row = functional.dropout(row, self.attention_dropout, self.training)
        output = row @ value  # [batch, g, h/g, r_v]
        return self.o_proj(output.flatten(1).unsqueeze(1)), row.flatten(1, 2).unsqueeze(2)


class KvteachLlamaAttention(_SmallCache, LlamaAttention):
    """LLaMA's attention on a small cache."""


class KvteachMistralAttention(_SmallCache, MistralAttention):
    """Mistral's attention on a small cache."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


class KvteachQwen2Attention(_SmallCache, Qwen2Attention):
    """Qwen2's attention on a small cache."""


class _SmallCacheBody:
    """The original's body with other attention modules. It warns of positions that its bases were not made for."""

    attention_class: type

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, inputs_embeds=None, **kwargs):
        """As transformers' own."""
        places = kwargs.get("position_ids")
        several = places is not None and places.shape[-1] > 1
        if self.config.key_block and several and not torch.compiler.is_compiling():
            if (places.diff(dim=-1) > 1).any():
                raise ValueError(
                    "position_ids jump; this small cache counts its slots, so they must rise by one from token to token"
                )
        new = input_ids if inputs_embeds is None else inputs_embeds
        if block := self.config.key_block:
            # what the cache holds; a tensor where it is static
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            kwargs["turns"] = Turns(
                self.rotary_emb, past + torch.arange(new.shape[1], device=new.device), block
            )
        reach = (self.config.kvteach or {}).get("reach")
        if reach is not None and not torch.compiler.is_compiling():
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            # A static cache counts on the device; to ask it would hold up every token.
            if isinstance(past, int) and past + new.shape[1] > reach:
                warnings.warn(
                    f"this text is longer than the {reach} positions that the small cache was made for, and worse "
                    f"beyond them: compress with reach={past + new.shape[1]} or more",
                    stacklevel=2,
                )
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )


class KvteachLlamaModel(_SmallCacheBody, LlamaModel):
    """LlamaModel on a small cache."""

    config: KvteachLlamaConfig
    config_class = KvteachLlamaConfig
    attention_class = KvteachLlamaAttention


class KvteachMistralModel(_SmallCacheBody, MistralModel):
    """MistralModel on a small cache."""

    config: KvteachMistralConfig
    config_class = KvteachMistralConfig
    attention_class = KvteachMistralAttention


class KvteachQwen2Model(_SmallCacheBody, Qwen2Model):
    """Qwen2Model on a small cache."""

    config: KvteachQwen2Config
    config_class = KvteachQwen2Config
    attention_class = KvteachQwen2Attention


class _SmallCacheCausalLM:
    """The original's model with a language-model head, on another body."""

    body_class: type

    def __init__(self, config):
        super().__init__(config)
        del self.model  # first, so that two bodies are never in memory
        self.model = self.body_class(config)
        self.post_init()


class KvteachLlamaForCausalLM(_SmallCacheCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM on a small cache."""

    config: KvteachLlamaConfig
    config_class = KvteachLlamaConfig
    body_class = KvteachLlamaModel


class KvteachMistralForCausalLM(_SmallCacheCausalLM, MistralForCausalLM):
    """MistralForCausalLM on a small cache."""

    config: KvteachMistralConfig
    config_class = KvteachMistralConfig
    body_class = KvteachMistralModel


class KvteachQwen2ForCausalLM(_SmallCacheCausalLM, Qwen2ForCausalLM):
    """Qwen2ForCausalLM on a small cache."""

    config: KvteachQwen2Config
    config_class = KvteachQwen2Config
    body_class = KvteachQwen2Model
