"""Conversion: model + moments + plan → a model with a small cache.

With rows of activations on the left, group γ of t key-value heads, encoder E and decoder D = [D_1 … D_t] of its basis:

    keys      W̃_K = [W_K1 … W_Kt] E        W̃_Q^j = W_Q^j D_iᵀ        q̃_j · c = q_j · (k_γ E D)_i = q_j · k̂_i
    values    W̃_V = [W_V1 … W_Vt] E        W̃_O^j = D_i W_O^j         a_j c W̃_O^j = a_j v̂_i W_O^j

(Yu et al., 2024, section 3.3); j is a query head that reads head i of the group. Biases go the same way. RoPE stands
between W_K and the product, so a basis that does not commute with it cannot enter W_K and W_Q: E and D_iᵀ are then kept
as matrices of their own, applied after the rotation (form G or R, `kvteach.models.llama`).

Centred: what E and D describe is x − μ. A constant in all keys moves all scores of a query alike, so nothing is to be
done for it. Softmax weights sum to 1, so the values' constant adds Σ_j (μ − μ E D)_i W_O^j to the output.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__
from .activations import attention_modules, key_weight, output_weight, value_weight
from .bases import METHODS, Basis
from .env import bars_off
from .grouping import by_order, by_similarity
from .moments import Moments, Source
from .plan import Plan
from .zoo import check_family


def compress(model, moments: Moments, plan: Plan, progress: bool = True):
    """A new model with a small cache; `model` stays as it is, and shares no tensor with it.

    Parameters
    ----------
    model : a LLaMA-, Mistral-, Qwen2- or BLOOM-family model with a language-model head.
    moments : of this very model, from `kvteach.calibration.calibrate`.
    plan : what to make of it.

    Returns
    -------
    A transformers ``PreTrainedModel`` of the same dtype, on the same device, in eval mode. With ``plan.stock`` it is of
    the class of `model`, else of one in `kvteach.models`.

    Raises
    ------
    ValueError : an architecture that is not supported, an already compressed model, moments of another model, a plan
        that does not fit the model, or a basis that came out not finite.
    """
    config = model.config
    check_family(config)
    if model.get_output_embeddings() is None:
        raise ValueError("the model has no language-model head: load it with AutoModelForCausalLM")
    source = Source.of(model)
    if moments.source != source:
        raise ValueError(
            "these moments belong to another model (its shape, its weights or its dtype): calibrate this one"
        )
    groups, key_rank, value_rank = plan.layout(source)
    made, bias = {}, _output_bias(config, plan)
    orders = []
    modules = attention_modules(model)
    for layer in tqdm(range(source.layers), "compressing", disable=not progress or bars_off()):
        heads = (
            by_order(source.kv_heads, groups)
            if plan.grouping == "order"
            else by_similarity(moments, layer, groups)
        )
        bases = [
            METHODS[plan.basis](moments, layer, group, key_rank, value_rank, plan.centred) for group in heads
        ]
        made[layer] = _small(
            read(modules[layer]), heads, bases, absorb=plan.stock or not source.rotates, bias=bias
        )
        orders.append(_query_order(source, heads))
    small = _build(model, plan, source, made, orders, (groups, key_rank, value_rank))
    return small.to(next(model.parameters()).device).eval()


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
    """The attention of one module of the LLaMA or BLOOM family."""
    d_h = module.head_dim

    def apart(tensor):  # [heads · d_h, …] or [heads, d_h, …] -> [heads, d_h, …]
        if tensor is None:
            return None
        tensor = tensor.detach().double()
        return (
            tensor
            if tensor.shape[1:2] == (d_h,) and tensor.ndim > 1 and fused
            else tensor.unflatten(0, (-1, d_h))
        )

    fused = hasattr(module, "query_key_value")
    if fused:  # [heads · 3 · d_h] -> [heads, 3, d_h]
        weight = module.query_key_value.weight.unflatten(0, (-1, 3, d_h))
        bias = module.query_key_value.bias.unflatten(0, (-1, 3, d_h))
        query, query_bias, key_bias, value_bias = weight[:, 0], bias[:, 0], bias[:, 1], bias[:, 2]
    else:
        query = module.q_proj.weight
        query_bias, key_bias, value_bias = (
            getattr(module, name).bias for name in ("q_proj", "k_proj", "v_proj")
        )
    last = module.dense if fused else module.o_proj
    output = output_weight(module).detach().double().T.unflatten(0, (-1, d_h))
    return Attention(
        *(apart(part) for part in (query, key_weight(module), value_weight(module))),
        output,
        *(apart(part) for part in (query_bias, key_bias, value_bias)),
        None if last.bias is None else last.bias.detach().double(),
    )


def _small(
    attention: Attention, heads: list[list[int]], bases: list[Basis], absorb: bool, bias: bool
) -> dict[str, Tensor]:
    """Names and float64 weights of the small attention, as nn.Linear keeps them, [out, in].

    Parameters
    ----------
    heads : for each group the key-value heads in it.
    absorb : the keys' basis goes into the weights; else it is returned as `k_down` and `q_map`.
    bias : the output has a bias.
    """
    n = len(attention.key)
    readers = len(attention.query) // n  # query heads that read one key-value head
    queries, query_biases, outputs, keys, values = [], [], [], [], []
    key_biases, value_biases, maps = [], [], []
    constant = torch.zeros(attention.output.shape[-1], dtype=torch.float64)
    if attention.output_bias is not None:
        constant = constant + attention.output_bias.cpu()
    wide = attention.key_bias is not None
    for group, basis in zip(heads, bases, strict=True):
        encode, decode = basis.keys.encode, basis.keys.decode  # [t · d_h, r_k], [r_k, t · d_h]
        parts = [
            part for side in (basis.keys, basis.values) for part in (side.encode, side.decode, side.mean)
        ]
        if not all(part is None or torch.isfinite(part).all() for part in parts):
            raise ValueError(f"the basis of heads {group} holds NaN or infinity: check the calibration text")
        d_h = attention.key.shape[1]
        key = attention.key[group].cpu().flatten(0, 1)  # [t · d_h, hidden]
        value = attention.value[group].cpu().flatten(0, 1)
        keys.append(encode.T @ key if absorb else key)
        values.append(basis.values.encode.T @ value)
        if wide:
            flat = attention.key_bias[group].cpu().ravel()
            key_biases.append(flat @ encode if absorb else flat)
            value_biases.append(attention.value_bias[group].cpu().ravel() @ basis.values.encode)
        mean = basis.values.mean
        for i, head in enumerate(group):
            block = slice(i * d_h, (i + 1) * d_h)
            for j in range(head * readers, (head + 1) * readers):
                query = attention.query[j].cpu()  # [d_h, hidden]
                queries.append(decode[:, block] @ query if absorb else query)
                if wide:
                    flat = attention.query_bias[j].cpu()
                    query_biases.append(decode[:, block] @ flat if absorb else flat)
                maps.append(decode[:, block].T)  # [d_h, r_k]
                output = attention.output[j].cpu()  # [d_h, hidden]
                outputs.append(basis.values.decode[:, block] @ output)
                if mean is not None:
                    rest = mean - mean @ basis.values.encode @ basis.values.decode
                    constant = constant + rest[block] @ output
    found = {
        "q_proj.weight": torch.cat(queries),
        "k_proj.weight": torch.cat(keys),
        "v_proj.weight": torch.cat(values),
        "o_proj.weight": torch.cat(outputs).T,
    }
    if wide:
        found |= {
            "q_proj.bias": torch.cat(query_biases),
            "k_proj.bias": torch.cat(key_biases),
            "v_proj.bias": torch.cat(value_biases),
        }
    if bias:
        found["o_proj.bias"] = constant
    if not absorb:
        found |= {
            "k_down": torch.stack([basis.keys.encode for basis in bases]),
            "q_map": torch.stack(maps),
        }
    return found


def _query_order(source: Source, heads: list[list[int]]) -> list[int]:
    """The original index of each query head of the compressed layer."""
    readers = source.query_heads // source.kv_heads
    return [j for group in heads for head in group for j in range(head * readers, (head + 1) * readers)]


def _output_bias(config, plan: Plan) -> bool:
    """True when the compressed attention's output has a bias."""
    has = config.model_type == "bloom" or (
        config.model_type == "llama" and bool(getattr(config, "attention_bias", False))
    )
    if plan.centred and plan.stock and not has:
        raise ValueError(
            f"centred is True; the mean of the values needs a bias in the output, which a stock {config.model_type} "
            "model has not: leave centred out, or leave stock out"
        )
    return has or plan.centred


def _build(model, plan: Plan, source: Source, made: dict, orders: list, layout):
    """The compressed model: the original's weights, copied, with `made` in place of each layer's attention."""
    from .models import CLASSES

    groups, key_rank, value_rank = layout
    fields = model.config.to_dict()
    for name in ("architectures", "model_type", "transformers_version", "dtype"):
        fields.pop(name, None)
    fields["num_key_value_heads"] = groups
    if plan.stock:
        config_class, model_class = type(model.config), type(model)
    else:
        config_class, _, model_class = CLASSES[model.config.model_type]
        fields |= {
            "source_key_value_heads": source.kv_heads,
            "key_rank": key_rank,
            "value_rank": value_rank,
        }
        if source.rotates:
            fields["output_bias"] = plan.centred
        elif orders[0] != sorted(orders[0]) or any(order != orders[0] for order in orders):
            fields["head_order"] = orders
    fields["kvteach"] = {
        "version": __version__,
        "plan": plan.as_dict(),
        "source": asdict(source),
    }
    config = config_class(**fields)
    state = model.state_dict()
    layers = [name for name, module in model.named_modules() if module in attention_modules(model)]
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(tuple(f"{at}." for at in layers))
    }
    for layer, at in enumerate(layers):
        for name, tensor in made[layer].items():
            name = name if source.rotates else name.replace("o_proj", "dense")
            state[f"{at}.{name}"] = tensor
    with torch.random.fork_rng():  # a new model draws weights, all of which are replaced
        small = model_class._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    small.load_state_dict(state)
    small.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return small
