"""LLaMA, Mistral and Qwen2 with a small cache (forms G and R).

    k = RoPE(x W_K)            all n heads of the original, side by side in g groups of n / g heads
    c = k_γ E_γ                [t · d_h] -> [r_k], cached        (`k_down`)
    q̃ = RoPE(x W_Q^j) M_j      [d_h] -> [r_k], M_j = D_γ,iᵀ      (`q_map`)
    o = softmax(q̃ cᵀ / √d_h) v        v = x W_V E, cached as [r_v]; its decoder is inside W_O

Query heads stand in the order of their groups, so grouped-query attention finds them. The scale stays 1/√d_h.

In decoding, the query heads of a group are folded into query positions: [batch, h, 1, r] is viewed as
[batch, g, h/g, r]. The group's keys and values are then read in place. Repeating them for each query head would give
the gain of the small cache away.

With `key_block` m, the cache is a row of blocks of m tokens, and keys are turned by their place in their block only.
So at most m positions need a basis, however long the text is. What is missing, the turn by im of block i, is made good
by the reader; RoPE depends on differences only, so nothing is lost:

    c = (x W_K R_s R_imᵀ) E                token in slot s = im … im + m − 1 of the cache
    q̃_i = (x W_Q^j R_S R_imᵀ) M_j          a query in slot S, once for each block that it reads
    q̃_i cᵀ = (x W_Q^j R_S) (c M_jᵀ R_im)ᵀ     or, where many queries read, the keys are rebuilt and turned instead

Where a sliding window drops tokens, keys are rebuilt at every step. Slots are counted, not positions: padding on the
left moves both alike. Positions that jump would be read wrongly; within one call they are refused.
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
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention


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
        if self.block:
            self.rotary = LlamaRotaryEmbedding(config)  # the same for all three
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
        **kwargs,
    ):
        """As transformers' own; the cache gets [batch, g, tokens, r]."""
        shape = hidden_states.shape[:-1]  # [batch, tokens]
        # [batch, tokens, heads · width] -> [batch, heads, tokens, width]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, self.groups, -1).transpose(1, 2)
        if self.block:
            past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
            slots = past + torch.arange(shape[1], device=query.device)  # `past` of a static cache is a tensor
            key = self.turned(key, slots, slots - slots % self.block)
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
            output, weights = self.decode(query, key, value, attention_mask, slots)
            return self.o_proj(output.reshape(*shape, -1)), weights
        if self.block:
            query, key = self.turned(query, slots), self.rebuilt(key, slots)  # [batch, h, …, d_h]
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

    def angles(self, x: Tensor, positions: Tensor, unit: bool = False) -> tuple[Tensor, Tensor]:
        """Cosines and sines for tensors like x, in float32 at least: [1, positions, d_h] both.

        transformers rounds them, so they are not quite a rotation. With `unit` they are: its inverse is its transpose.
        """
        like = x[:0].to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = self.rotary(like, positions[None])
        if not unit:
            return cos, sin
        size = torch.hypot(cos, sin)
        return cos / size, sin / size

    def turned(self, x: Tensor, slots: Tensor, starts: Tensor | None = None) -> Tensor:
        """x R_s R_imᵀ: turned to slots s, and back by the starts im of blocks, where there are any.

        The angles of R_{s−im} are rounded in another way than those of s and im, so it would not be the same.

        Parameters
        ----------
        x : [batch, heads, n, d_h]. slots, starts : [n], or [1] for the same of all.
        """
        wide = _turn(x, *self.angles(x, slots))
        if starts is not None:
            cos, sin = self.angles(x, starts, unit=True)
            wide = _turn(wide, cos, -sin)
        return wide.to(x.dtype)  # two turns, rounded once

    def rebuilt(self, latent: Tensor, slots: Tensor) -> Tensor:
        """The keys that each query head reads, after RoPE: [batch, g, cached, r_k] -> [batch, h, cached, d_h]."""
        cached = latent.shape[2]
        first = (slots[-1] + 1 - cached).clamp(min=0)  # above 0 where a sliding window has dropped tokens
        stored = first + torch.arange(cached, device=latent.device)
        maps = self.q_map.unflatten(0, (self.groups, -1))  # [g, h/g, d_h, r_k]
        keys = torch.einsum("bglr,gjdr->bgjld", latent, maps).flatten(1, 2)
        starts = stored - stored % self.block
        return _turn(keys, *self.angles(keys, starts, unit=True)).to(keys.dtype)

    def decode(self, query: Tensor, latent: Tensor, value: Tensor, mask: Tensor | None, slots: Tensor):
        """One token reads the blocks where they lie: output [batch, h, r_v] and weights [batch, h, 1, cached].

        Parameters
        ----------
        query : [batch, h, 1, d_h], before RoPE. latent, value : the cache, [batch, g, cached, r]. slots : [1].
        """
        cached = latent.shape[2]
        starts = torch.arange(0, cached, self.block, device=latent.device)
        query = self.turned(query * self.scaling, slots, starts)  # [batch, h, blocks, d_h]
        query = torch.einsum("bhnd,hdr->bnhr", query, self.q_map).unflatten(2, (self.groups, -1))
        query = query.transpose(1, 2).contiguous()  # [batch, g, blocks, h/g, r_k]
        whole = cached // self.block
        read = latent[:, :, : whole * self.block].unflatten(2, (whole, self.block))
        scores = _products(read, query[:, :, :whole].mT).flatten(2, 3)  # [batch, g, whole · m, h/g]
        if cached % self.block:
            rest = latent[:, :, whole * self.block :] @ query[:, :, -1].mT  # [batch, g, rest, h/g]
            scores = torch.cat([scores, rest], 2)
        scores = scores.mT  # [batch, g, h/g, cached]
        if mask is not None:  # [batch, 1, 1, cached]: what may be read, or what is added
            hidden = mask[..., :cached]
            scores = scores.masked_fill(~hidden, -torch.inf) if mask.dtype == torch.bool else scores + hidden
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = functional.softmax(scores, -1, dtype=wide).to(value.dtype)
        weights = functional.dropout(weights, self.attention_dropout, self.training)
        return (weights @ value).flatten(1, 2), weights.flatten(1, 2).unsqueeze(2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE with these angles, in the wider dtype of the two."""
    return x * cos + rotate_half(x) * sin


def _products(read: Tensor, query: Tensor) -> Tensor:
    """[batch, g, blocks, m, r] · [batch, g, blocks, r, h/g].

    A product of many matrices copies them first, unless all follow one another in memory. Where the cache does not end
    with a block, only those of one cached head do. On a CPU a product for each of these heads is several times faster
    than the copy; a GPU would wait for so many small ones, and copies the keys.
    """
    if read.is_contiguous() or read.device.type != "cpu":
        return read @ query
    pairs = zip(read.flatten(0, 1), query.flatten(0, 1), strict=True)
    return torch.stack([one @ other for one, other in pairs]).unflatten(0, read.shape[:2])


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
        reach = (self.config.kvteach or {}).get("reach")
        if reach is not None and not torch.compiler.is_compiling():
            new = input_ids if inputs_embeds is None else inputs_embeds
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
