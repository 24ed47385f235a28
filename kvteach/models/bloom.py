"""BLOOM with a small cache (forms G, S and R are one: ALiBi adds to the scores, so every basis goes into the weights).

    c = x W_K E            [r_k], cached            q̃ = x W_Q^j D_γ,iᵀ
    o = softmax(q̃ cᵀ / √d_h + slope_j · position) v

The h / g query heads of a group are query positions of one matrix product, so keys and values are never repeated.
ALiBi's slopes belong to the query heads of the original; where grouping moved heads, `head_order` finds them.
"""

import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, BloomModel
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add


class KvteachBloomConfig(BloomConfig):
    """BloomConfig and the fields of `kvteach.models`."""

    model_type = "kvteach_bloom"
    num_key_value_heads: int | None = None
    source_key_value_heads: int | None = None
    key_rank: int | None = None
    value_rank: int | None = None
    head_order: list | None = None
    kvteach: dict | None = None


class KvteachBloomAttention(BloomAttention):
    """BLOOM's attention on a small cache."""

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        hidden, h, g = self.hidden_size, self.num_heads, config.num_key_value_heads or self.num_heads
        key_rank, value_rank = config.key_rank or self.head_dim, config.value_rank or self.head_dim
        self.groups, self.order = g, config.head_order[layer_idx] if config.head_order else None
        del self.query_key_value
        self.q_proj = nn.Linear(hidden, h * key_rank)
        self.k_proj = nn.Linear(hidden, g * key_rank)
        self.v_proj = nn.Linear(hidden, g * value_rank)
        self.dense = nn.Linear(h * value_rank, hidden)

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        """As transformers' own; the cache gets [batch, g, tokens, r]."""
        batch, length, _ = hidden_states.shape

        def heads(x, count):  # [batch, tokens, count · r] -> [batch, count, tokens, r]
            return x.view(batch, length, count, -1).transpose(1, 2)

        query = heads(self.q_proj(hidden_states), self.num_heads)
        key = heads(self.k_proj(hidden_states), self.groups)
        value = heads(self.v_proj(hidden_states), self.groups)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)

        bias = alibi.view(batch, self.num_heads, 1, -1)  # slope · position, [batch, h, 1, cached]
        if self.order is not None:
            bias = bias[:, self.order]
        folded = query.reshape(batch, self.groups, -1, query.shape[-1])  # [batch, g, h/g · tokens, r_k]
        scores = (folded * self.inv_norm_factor @ key.mT).view(batch, self.num_heads, length, -1)
        scores += bias  # in place: of a long text this is the largest tensor there is
        if attention_mask is not None:
            scores += attention_mask  # [batch, 1, tokens, cached]
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        weights = self.attention_dropout(weights)
        output = (
            weights.view(batch, self.groups, -1, weights.shape[-1]) @ value
        )  # [batch, g, h/g · tokens, r_v]
        output = output.view(batch, self.num_heads, length, -1).transpose(1, 2).reshape(batch, length, -1)
        output = dropout_add(self.dense(output), residual, self.hidden_dropout, self.training)
        return output, weights


class KvteachBloomModel(BloomModel):
    """BloomModel on a small cache."""

    config: KvteachBloomConfig
    config_class = KvteachBloomConfig

    def __init__(self, config):
        super().__init__(config)
        for index, block in enumerate(self.h):
            block.self_attention = KvteachBloomAttention(config, index)
        self.post_init()


class KvteachBloomForCausalLM(BloomForCausalLM):
    """BloomForCausalLM on a small cache."""

    config: KvteachBloomConfig
    config_class = KvteachBloomConfig

    def __init__(self, config):
        super().__init__(config)
        del self.transformer  # first, so that two bodies are never in memory
        self.transformer = KvteachBloomModel(config)
        self.post_init()
