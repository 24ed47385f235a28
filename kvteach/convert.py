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

from dataclasses import asdict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__
from .activations import Attention, attention_modules, read
from .bases import METHODS, Basis
from .env import bars_off
from .evaluate import positions
from .folder import check, shards
from .grouping import by_order, by_similarity
from .moments import Moments, Source
from .offload import device, fetch, is_offloaded, layers_on_disk
from .plan import Plan
from .rope import from_config, placed
from .zoo import check_family


def compress(model, moments: Moments, plan: Plan, progress: bool = True, folder=None):
    """A new model with a small cache; `model` stays as it is, and shares no tensor with it.

    Parameters
    ----------
    model : a LLaMA-, Mistral-, Qwen2- or BLOOM-family model with a language-model head.
    moments : of this very model, from `kvteach.calibration.calibrate`.
    plan : what to make of it.
    folder : a new or empty one for the weights, written layer by layer, so that the new model is never whole in memory.
        An offloaded model needs it. When something goes wrong, it is deleted.

    Returns
    -------
    A transformers ``PreTrainedModel`` of the same dtype, on the same device, in eval mode. With ``plan.stock`` it is of
    the class of `model`, else of one in `kvteach.models`. With `folder` it reads its layers from there when they run.

    Raises
    ------
    ValueError : an architecture that is not supported, an already compressed model, moments of another model, a plan
        that does not fit the model, a basis that came out not finite, or an offloaded model without `folder`.
    FileExistsError, PermissionError : `folder` holds files, or cannot be made.
    """
    family = check_family(model.config)
    folder = None if folder is None else check(folder)
    if plan.sequential:
        raise ValueError(
            "sequential is True; that way reads the text itself: kvteach.sequential.compress(model, windows, plan)"
        )
    source = Source.of(model)
    if moments.source != source:
        raise ValueError(
            "these moments belong to another model (its shape, its weights or its dtype): calibrate this one"
        )
    groups, key_rank, value_rank = plan.layout(source)
    moments, reach = _served(model, moments, plan)
    layers = range(source.layers)
    grouped = [
        by_order(source.kv_heads, groups)
        if plan.grouping == "order"
        else by_similarity(moments, layer, groups)
        for layer in layers
    ]
    if folder is None:
        small = build(model, plan, source, grouped)
    else:
        with torch.device("meta"):
            small = _skeleton(model, plan, source, grouped)
    modules, new = attention_modules(model), attention_modules(small)

    def convert(layer: int) -> None:
        bases = [
            METHODS[plan.basis](moments, layer, group, key_rank, value_rank, plan.centred)
            for group in grouped[layer]
        ]
        fill(new[layer], read(modules[layer]), grouped[layer], bases)
        if reach is not None and any(basis.keys.frequencies is None for basis in bases):
            small.config.kvteach["reach"] = reach  # those that commute with RoPE hold at every position

    bar = tqdm(layers, "compressing", disable=not progress or bars_off())
    if folder is None:
        for layer in bar:
            convert(layer)
        return small
    _write(model, small, convert, bar, folder)
    return type(small).from_pretrained(
        folder,
        dtype=small.dtype,
        device_map=layers_on_disk(family, device(model)),
        attn_implementation=model.config._attn_implementation,
    )


def _served(model, moments: Moments, plan: Plan) -> tuple[Moments, int | None]:
    """The moments at the positions to be served, and how many these are; None where a basis holds at all."""
    source = moments.source
    reach = plan.positions(source, positions(model), moments.reach)
    if plan.block(source):
        from_config(model.config)  # a RoPE whose turns are not fixed is refused
    if reach is not None and reach > moments.reach:
        # every text has a beginning, so its first positions count as much as the rest
        moments = moments + placed(moments, from_config(model.config), reach - moments.reach + 1)
    return moments, reach


def _write(model, small, convert, layers, folder) -> None:
    """Write a model on ``meta``, of which ``convert(layer)`` makes one attention module, layer by layer."""
    new = attention_modules(small)
    names = {module: name for name, module in small.named_modules()}
    blocks = tuple(names[module].rpartition(".")[0] + "." for module in new)  # "model.layers.0.", …
    kept = [name for name in _kept(small) if name not in small.all_tied_weights_keys]
    with shards(small, folder, 1 + len(new)) as write:
        write({name: fetch(model, name) for name in kept if not name.startswith(blocks)})
        for layer in layers:
            module = new[layer].to_empty(device="cpu")
            convert(layer)
            part = {f"{names[module]}.{name}": tensor for name, tensor in module.state_dict().items()}
            write(part | {name: fetch(model, name) for name in kept if name.startswith(blocks[layer])})
            module.to("meta")


def fill(module, attention: Attention, heads: list[list[int]], bases: list[Basis], decoders=None) -> None:
    """Give a small attention module its weights; nn.Linear keeps them as [out, in].

    Parameters
    ----------
    module : with `k_down` and `q_map` it keeps the keys' basis apart, else the basis goes into the weights.
    heads : for each group the key-value heads in it.
    decoders : for each group those of its query heads, keys' [readers of the group, r_k, d_h] and values'; by default
        D_i of the basis, the same for all that read head i.
    """
    absorb, last = not hasattr(module, "k_down"), "dense" if hasattr(module, "dense") else "o_proj"
    biased = attention.key_bias is not None
    readers = len(attention.query) // len(attention.key)  # query heads that read one key-value head
    parts = {name: [] for name in ("q_proj", "k_proj", "v_proj", last)}
    biases = {name: [] for name in ("q_proj", "k_proj", "v_proj")}
    maps, constant = [], torch.zeros(attention.output.shape[-1], dtype=torch.float64)
    if attention.output_bias is not None:
        constant = attention.output_bias.clone()
    for number, (group, basis) in enumerate(zip(heads, bases, strict=True)):
        sides = (basis.keys, basis.values)
        held = [part for side in sides for part in (side.encode, side.decode, side.mean) if part is not None]
        if not all(torch.isfinite(part).all() for part in held):
            raise ValueError(f"the basis of heads {group} holds NaN or infinity: check the calibration text")
        encode = basis.keys.encode  # [t · d_h, r_k]
        key_decoders, value_decoders = (
            decoders[number] if decoders else (_each(side, len(group), readers) for side in sides)
        )
        reading = readers_of(group, readers)
        key = attention.key[group].flatten(0, 1)  # [t · d_h, hidden]
        parts["k_proj"].append(encode.T @ key if absorb else key)
        parts["v_proj"].append(basis.values.encode.T @ attention.value[group].flatten(0, 1))
        query = attention.query[reading]  # [readers of the group, d_h, hidden]
        parts["q_proj"].append((key_decoders @ query if absorb else query).flatten(0, 1))
        parts[last].append((value_decoders @ attention.output[reading]).flatten(0, 1))
        maps.append(key_decoders.mT)  # [readers of the group, d_h, r_k]
        if biased:
            key = attention.key_bias[group].ravel()  # [t · d_h]
            query = attention.query_bias[reading]  # [readers of the group, d_h]
            biases["k_proj"].append(key @ encode if absorb else key)
            biases["v_proj"].append(attention.value_bias[group].ravel() @ basis.values.encode)
            biases["q_proj"].append(((key_decoders @ query[..., None])[..., 0] if absorb else query).ravel())
        if (mean := basis.values.mean) is not None:
            rest = (mean - mean @ basis.values.encode @ basis.values.decode).unflatten(0, (len(group), -1))
            # Σ_j (μ − μ E D)_i W_O^j: [readers of the group, 1, d_h] · [readers of the group, d_h, hidden]
            each = rest.repeat_interleave(readers, 0)[:, None] @ attention.output[reading]
            constant = constant + each.sum((0, 1))
    found = {f"{name}.weight": torch.cat(part) for name, part in parts.items()}
    found[f"{last}.weight"] = found[f"{last}.weight"].T
    if biased:
        found |= {f"{name}.bias": torch.cat(part) for name, part in biases.items()}
    if getattr(module, last).bias is not None:
        found[f"{last}.bias"] = constant
    if not absorb:
        found |= {"k_down": torch.stack([basis.keys.encode for basis in bases]), "q_map": torch.cat(maps)}
    module.load_state_dict(found)


def _each(side, heads: int, readers: int) -> Tensor:
    """The decoder of each query head: [r, t · d_h] -> [t · readers, r, d_h]."""
    return side.decode.unflatten(1, (heads, -1)).transpose(0, 1).repeat_interleave(readers, 0)


def readers_of(group: list[int], readers: int) -> list[int]:
    """The query heads that read the heads of a group, in the order of the compressed layer."""
    return [j for head in group for j in range(head * readers, (head + 1) * readers)]


def build(model, plan: Plan, source: Source, grouped: list[list[list[int]]]):
    """The compressed model with the original's weights, copied, but for those of attention, which `fill` sets.

    `grouped` holds for each layer the groups of key-value heads. ValueError as for `compress`.
    """
    if is_offloaded(model):
        raise ValueError("the model is offloaded: give kvteach.compress a folder for the new weights")
    small = _skeleton(model, plan, source, grouped)
    weights = model.state_dict()
    small.load_state_dict({name: weights[name] for name in _kept(small)}, strict=False)
    return small.to(device(model))


def _kept(small) -> list[str]:
    """Names of the weights that are those of the original: all but attention's."""
    inside = (".self_attn.", ".self_attention.")
    return [name for name in small.state_dict() if not any(part in name for part in inside)]


def _skeleton(model, plan: Plan, source: Source, grouped: list[list[list[int]]]):
    """The compressed model with weights of no meaning, on PyTorch's default device."""
    from .models import CLASSES

    if model.get_output_embeddings() is None:
        raise ValueError("the model has no language-model head: load it with AutoModelForCausalLM")
    groups, key_rank, value_rank = plan.layout(source)
    fields = model.config.to_dict()
    for name in ("architectures", "model_type", "transformers_version", "dtype"):
        fields.pop(name, None)
    fields["num_key_value_heads"] = groups
    if plan.stock:
        if plan.centred and not getattr(model.config, "attention_bias", False):
            raise ValueError(
                f"centred is True; the mean of the values needs a bias in the output, which this "
                f"{model.config.model_type} model has not: leave centred out, or leave stock out"
            )
        config_class, model_class = type(model.config), type(model)
    else:
        config_class, _, model_class = CLASSES[model.config.model_type]
        fields |= {"source_key_value_heads": source.kv_heads, "key_rank": key_rank, "value_rank": value_rank}
        readers = source.query_heads // source.kv_heads
        orders = [readers_of([head for group in heads for head in group], readers) for heads in grouped]
        if source.rotates:
            fields |= {"output_bias": plan.centred, "key_block": plan.block(source)}
        elif any(order != sorted(order) for order in orders):
            fields["head_order"] = orders
    fields["kvteach"] = {"version": __version__, "plan": plan.as_dict(), "source": asdict(source)}
    config = config_class(**fields)
    with torch.random.fork_rng(devices=[]):  # a new model draws weights, all of which are replaced
        small = model_class._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    small.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return small.eval()
