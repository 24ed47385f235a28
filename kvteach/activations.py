"""Keys, values and queries of a forward pass, layer by layer.

`observe` calls a function with each layer's `Activations` while the model runs, so that nothing need be kept;
`record` keeps them all, for pages and tests. Both use PyTorch's own hooks and remove them whatever happens.

LLaMA family: queries, keys and values are three projections; RoPE turns queries and keys by their position before
the keys are cached. BLOOM: one fused projection, laid out ``[head, 3, head_dim]``; ALiBi adds to the scores, so
what is cached was never rotated and the ``_pre`` and ``_post`` tensors are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .offload import fetch
from .zoo import check_family


@dataclass(frozen=True)
class Activations:
    """One layer's tensors, each ``[batch, heads, tokens, head_dim]``; nothing is copied.

    Attributes
    ----------
    queries_pre, queries_post : before and after RoPE, query heads.
    keys_pre, keys_post : before and after RoPE, key-value heads. ``keys_post`` is what the cache stores.
    values : key-value heads; RoPE never touches them.
    attention : softmax weights ``[batch, query heads, tokens, tokens]``, or None when they were not asked for.
    """

    queries_pre: Tensor
    queries_post: Tensor
    keys_pre: Tensor
    keys_post: Tensor
    values: Tensor
    attention: Tensor | None = None


@contextmanager
def observe(model, see: Callable[[int, Activations], None], attention: bool = False) -> Iterator[None]:
    """Within this context every forward pass of `model` calls ``see(layer, activations)`` after each layer's attention.

    Keys and values of tokens that a cache already holds are not seen again.

    Parameters
    ----------
    model : a LLaMA- or BLOOM-family model (`kvteach.zoo.FAMILIES`), with or without its language-model head.
    see : called in layer order; the tensors it gets live only as long as it keeps them.
    attention : also hand over the softmax weights. The model then runs its ``eager`` attention, the only one that
        forms them: memory grows with tokens².

    Raises
    ------
    ValueError : another architecture; with `attention`, at the forward pass, a model called with a filled cache.
    """
    family = check_family(model.config)
    watch = _watch_llama if family == "llama" else _watch_bloom
    with ExitStack() as stack:  # unwinds also when the forward, or `see`, raises
        if attention:
            stack.enter_context(eager(model))
        for layer, module in enumerate(attention_modules(model)):
            for handle in watch(layer, module, see, attention):
                stack.callback(handle.remove)
        yield


def record(
    model, input_ids: Tensor, attention_mask: Tensor | None = None, attention: bool = False
) -> list[Activations]:
    """One forward pass without gradients, all layers kept.

    Parameters
    ----------
    input_ids : [batch, tokens].
    attention_mask : [batch, tokens], 0 at padding, as transformers takes it. Padded positions are recorded too.

    Returns
    -------
    One `Activations` per layer.
    """
    kept = []
    with observe(model, lambda layer, activations: kept.append(activations), attention), quiet(model):
        model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )  # no head: no logits
    return kept


@contextmanager
def eager(model) -> Iterator[None]:
    """The attention that forms softmax weights within; the model's own comes back."""
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(implementation)


@contextmanager
def quiet(model) -> Iterator[None]:
    """No gradients and no dropout within; every module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def attention_modules(model) -> list[nn.Module]:
    """The attention module of each layer, in order; of a compressed model too."""
    body = model.base_model
    return (
        [block.self_attention for block in body.h]
        if hasattr(body, "h")
        else [block.self_attn for block in body.layers]
    )


@dataclass(frozen=True)
class Attention:
    """One layer's attention in float64, heads apart. Weights are [heads, d_h, hidden], biases [heads, d_h] or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor  # [query heads, d_h, hidden], W_O^j
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    output_bias: Tensor | None  # [hidden]


def read(module) -> Attention:
    """The attention of one module of the LLaMA or BLOOM family, on the CPU."""
    d_h, fused = module.head_dim, hasattr(module, "query_key_value")

    def held(projection):  # weight, and bias or None, in float64
        found = (
            None if tensor is None else fetch(projection, name).cpu().double()
            for name, tensor in (("weight", projection.weight), ("bias", projection.bias))
        )
        return tuple(found)

    def apart(tensor):  # [heads · d_h, …] -> [heads, d_h, …]
        return None if tensor is None else tensor.unflatten(0, (-1, d_h))

    if fused:  # [heads · 3 · d_h, …] -> [heads · d_h, …] for queries, keys and values
        weight, bias = (
            part.unflatten(0, (-1, 3, d_h)).transpose(0, 1).flatten(1, 2)
            for part in held(module.query_key_value)
        )
    else:
        weight, bias = zip(
            *(held(part) for part in (module.q_proj, module.k_proj, module.v_proj)), strict=True
        )
    output, output_bias = held(module.dense if fused else module.o_proj)
    return Attention(
        *(apart(part) for part in weight), apart(output.T), *(apart(part) for part in bias), output_bias
    )


def _watch_llama(layer: int, module: nn.Module, see, attention: bool) -> Iterator:
    """Hooks on the three projections, and on the attention module for the rotation it was handed."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    projected = {}

    def keep(name):
        def hook(projection, inputs, output):
            # [batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim], a view
            projected[name] = output.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)

        return hook

    def finish(module, args, kwargs, output):
        query, key, value = (projected.pop(name) for name in ("q_proj", "k_proj", "v_proj"))
        cos, sin = (table.to(key.device) for table in kwargs["position_embeddings"])  # layers may lie apart
        query_post, key_post = apply_rotary_pos_emb(query, key, cos, sin)
        weights = output[1] if attention else None
        _see(layer, see, Activations(query, query_post, key, key_post, value, weights))

    for name in ("q_proj", "k_proj", "v_proj"):
        yield getattr(module, name).register_forward_hook(keep(name))
    yield module.register_forward_hook(finish, with_kwargs=True)


def _watch_bloom(layer: int, module: nn.Module, see, attention: bool) -> Iterator:
    """Hooks on the fused projection, and on the attention module for its softmax weights."""
    fused = []

    def finish(module, args, output):
        # [batch, tokens, heads * 3 * head_dim] -> three of [batch, heads, tokens, head_dim], views
        per_head = fused.pop().unflatten(-1, (module.num_heads, 3, module.head_dim))
        query, key, value = per_head.permute(3, 0, 2, 1, 4)
        weights = output[1] if attention else None
        _see(layer, see, Activations(query, query, key, key, value, weights))

    yield module.query_key_value.register_forward_hook(
        lambda projection, inputs, output: fused.append(output)
    )
    yield module.register_forward_hook(finish)


def _see(layer: int, see, activations: Activations) -> None:
    """Hand over one layer. Softmax weights wider than the queries mean that a filled cache was passed in."""
    weights = activations.attention
    if weights is not None and weights.shape[-1] != weights.shape[-2]:
        raise ValueError(
            "observe needs the whole text in one forward pass; this one continued from a filled cache"
        )
    see(layer, activations)
