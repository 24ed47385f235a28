"""Sequential conversion: each layer is compressed on what the compressed layers before it make.

One-shot conversion calibrates all layers on the original model, but layer ℓ of the compressed model reads a residual
stream that has drifted. Two streams are carried through the layers side by side, X of the original and Y of the
compressed model. In each layer:

1. Queries, keys, values and softmax rows A_j are taken from Y. For each query head j they give its own second moments
   of the group that it reads, G_j = Σ_q Cov_{A_j[q]}(k) for keys and (A_j V)ᵀ (A_j V) for values. With RoPE, keys are
   as the cache will hold them, turned within their block only (`kvteach.models.llama`). Queries are as the blocks
   meet them, each as often as it reads the block; `kvteach.attended` has the sums of both.
2. `bases.shared` finds the encoder of each group, and a decoder for each query head. Decoders apart cost nothing: the
   query map and W_O are apart for each query head anyway.
3. W_O is fitted again. With Z what the small attention hands to W_O, the drift is taken back as far as it goes:

       min over W of ‖Y + Z W − (X + original attention of X)‖² + ridge · ‖W − W_O‖²

4. Both streams go on through the rest of the layer.

One pass over the layers, no gradients. Held are the two streams (windows · tokens · hidden numbers each), one window's
attention, and for one layer 2 · h matrices of (t · d_h)², for groups of t heads, and one of (h · r_v)², in float64.
"""

import hashlib
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .activations import Activations, Attention, attention_modules, observe, quiet, read
from .attended import handed_on, queries_in_blocks, spread, spread_in_blocks, wide
from .bases import Basis, Projection
from .bases.shared import shared_encoder
from .convert import build, fill, readers_of
from .env import bars_off
from .evaluate import checked_ids
from .files import load_tensors, save_tensors
from .grouping import by_order
from .models.blocks import Turns
from .moments import Source
from .plan import Plan
from .rope import from_config, rotate

RIDGE = 0.3  # of the mean diagonal of ZᵀZ; a tenth of it loses 1 % more at a third of the cache of SmolLM2


def compress(model, windows, plan: Plan, path=None, progress: bool = True):
    """A new model with a small cache, converted layer by layer on `windows`; `model` stays as it is.

    Parameters
    ----------
    model : a LLaMA-, Mistral-, Qwen2- or BLOOM-family model with a language-model head.
    windows : `kvteach.text.Windows`, or token ids [windows, tokens].
    plan : its dial; everything else as it is by default.
    path : a file that finished layers are kept in. A run that was stopped goes on from there, with the same result to
        the last bit. By default nothing is kept.

    The ridge keeps W_O near its old value in directions that the text says little about.

    Raises
    ------
    ValueError : what `kvteach.convert.compress` raises for model and plan; a plan of another kind; bad windows; RoPE
        whose angles change with the length of the text; a file at `path` of another model, text or plan.
    """
    ids = checked_ids(model, windows)
    if len({weight.device for weight in model.parameters()}) > 1:
        raise ValueError(
            "the layers lie on several devices, or are offloaded; layer by layer a model is converted on one: load it "
            "on one, or leave sequential out"
        )
    plan = replace(plan, sequential=True)
    source = Source.of(model)
    groups, *_ = plan.layout(source)
    block = plan.block(source)
    turns = None if block is None else from_config(model.config)  # radians a token
    heads = by_order(source.kv_heads, groups)
    small = build(model, plan, source, [heads] * source.layers)
    before, after = attention_modules(model), attention_modules(small)
    stream, seen = _Stream(model, ids), deque(maxlen=1)  # of what runs: the last layer and window
    digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
    kept = _Kept(
        path,
        {"model": asdict(source), "text": [digest, *ids.shape], "plan": plan.as_dict() | {"block": block}},
    )
    with (
        quiet(model),
        tqdm(total=source.layers * len(ids), desc="compressing", disable=not progress or bars_off()) as bar,
    ):
        x = stream.begin()  # [windows, tokens, hidden]
        y = x.clone()
        done = kept.load(x, y, after)
        bar.update(done * len(ids))
        for layer in range(done, source.layers):
            grams, queries = [_empty(group, source, x.device) for group in heads], 0
            # Only here, so that both streams go on through the same kind of attention, rounded alike.
            with observe(model, lambda layer, found: seen.append(found), attention=True):
                for row in range(len(ids)):
                    stream.attend(model, layer, y, row)
                    found = seen.pop()
                    queries = queries + _queries(found, block, turns)
                    for number, group in enumerate(heads):
                        reading = readers_of(group, source.query_heads // source.kv_heads)
                        _add(grams[number], found, group, reading, block, turns)
                    bar.update()
            attention = read(before[layer])
            bases, decoders = _bases([gram.cpu() for gram in grams], queries.cpu(), attention, plan, source)
            fill(after[layer], attention, heads, bases, decoders)
            _refit(stream, model, small, layer, x, y)
            kept.save(layer + 1, x, y, after)
    return small


def _queries(found: Activations, block: int | None, turns: Tensor | None) -> Tensor:
    """Σ qᵀq of one window [query heads, d_h, d_h], as the keys are met."""
    queries = found.queries_post[0].double()  # [query heads, tokens, d_h]
    if block is None:
        return queries.mT @ queries
    return queries_in_blocks(queries, found.attention[0], block, turns)


def _empty(group: list[int], source: Source, device) -> Tensor:
    """Zeros for the G_j of keys and of values of each query head that reads the group."""
    readers, width = len(group) * (source.query_heads // source.kv_heads), len(group) * source.head_dim
    return torch.zeros(readers, 2, width, width, dtype=torch.float64, device=device)


def _add(
    grams: Tensor, found: Activations, group: list[int], reading: list[int], block: int | None, turns
) -> None:
    """Add those of one window, in place: with one group they are the largest that is held."""
    keys, values = found.keys_post[0, group], wide(found.values[0, group])  # [tokens, t · d_h]
    if block is not None:
        keys = rotate(found.keys_pre[0, group], torch.arange(len(values)) % block, turns)
    keys = wide(keys)
    rows = found.attention[0, reading].unsqueeze(1)  # [readers, 1, tokens, tokens]
    for gram, weights in zip(grams, rows, strict=True):
        gram[0] += spread(keys, weights) if block is None else spread_in_blocks(keys, weights, block)
        gram[1] += handed_on(values, weights)


def _bases(grams: list[Tensor], queries: Tensor, attention: Attention, plan: Plan, source: Source):
    """One basis a group, and the decoders of its query heads: keys' [readers of the group, r_k, d_h] and values'.

    `grams` holds [readers of the group, 2, t · d_h, t · d_h] for each group, `queries` Σ qᵀq [query heads, d_h, d_h].
    """
    groups, *ranks = plan.layout(source)
    weights = queries, attention.output @ attention.output.mT  # [query heads, d_h, d_h] both
    bases, decoders = [], []
    for gram, group in zip(grams, by_order(source.kv_heads, groups), strict=True):
        reading = readers_of(group, source.query_heads // source.kv_heads)
        sides, apart = [], []
        for side, rank in enumerate(ranks):
            encode, decode, left = shared_encoder(gram[:, side], weights[side][reading], rank)
            sides.append(Projection(encode, encode.T, None, left))  # each reader has a decoder of its own
            apart.append(decode)
        bases.append(Basis(*sides))
        decoders.append(tuple(apart))
    return bases, decoders


def _refit(stream: "_Stream", model, small, layer: int, x: Tensor, y: Tensor) -> None:
    """Fit W_O of the small layer again, and move both streams behind the layer, in place."""
    module = attention_modules(small)[layer]
    last, kept, gram, cross = module.dense if hasattr(module, "dense") else module.o_proj, [], 0, 0
    handle = last.register_forward_pre_hook(lambda module, args: kept.append(args[0][0]))
    try:
        for row in range(len(x)):
            base, added = stream.attend(model, layer, x, row)
            goal = base + added
            base, _ = stream.attend(small, layer, y, row)
            z = kept.pop().double()  # [tokens, h · r_v]
            target = goal - base if last.bias is None else goal - base - last.bias
            gram, cross = gram + z.T @ z, cross + z.T @ target[0].double()
            x[row] = stream.finish(model, layer, goal)[0]
    finally:
        handle.remove()
    old = last.weight.double().T  # [h · r_v, hidden]
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    last.weight.copy_((old + torch.linalg.solve(gram + ridge, cross - gram @ old)).T)
    for row in range(len(y)):
        base, added = stream.attend(small, layer, y, row)
        y[row] = stream.finish(small, layer, base + added)[0]


class _Stream:
    """Runs the two halves of a layer, of a model or of its compressed copy, on single windows."""

    def __init__(self, model, ids: Tensor):
        self.model, self.ids = model, ids
        self.positions = torch.arange(ids.shape[1])[None]

    def begin(self) -> Tensor:
        """What the first layer reads, [windows, tokens, hidden]."""
        body = self.model.base_model
        x = body.get_input_embeddings()(self.ids.to(self.model.device))
        return body.word_embeddings_layernorm(x) if hasattr(body, "word_embeddings_layernorm") else x

    def attend(self, model, layer: int, hidden: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """For one window of `hidden`, what attention is added to and what it adds, [1, tokens, hidden] both."""
        x, body, config = hidden[row : row + 1], model.base_model, self.model.config
        mask = dict(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        if hasattr(body, "h"):
            block = body.h[layer]
            inside = block.input_layernorm(x)
            ones = torch.ones_like(self.ids[row : row + 1], device=x.device)
            alibi = body.build_alibi_tensor(ones, config.n_head, x.dtype)
            nothing = torch.zeros_like(x)  # BLOOM's attention adds the residual itself
            added, *_ = block.self_attention(
                inside, nothing, alibi=alibi, attention_mask=create_causal_mask(**mask)
            )
            return inside if block.apply_residual_connection_post_layernorm else x, added
        block = body.layers[layer]
        window = getattr(block.self_attn, "sliding_window", getattr(config, "sliding_window", None))
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        positions = self.positions.to(x.device)
        given = {"position_embeddings": body.rotary_emb(x, positions), "attention_mask": make(**mask)}
        if size := getattr(model.config, "key_block", None):
            given["turns"] = Turns(body.rotary_emb, positions[0], size)
        added, *_ = block.self_attn(hidden_states=block.input_layernorm(x), **given)
        return x, added

    def finish(self, model, layer: int, hidden: Tensor) -> Tensor:
        """The rest of the layer, behind its attention: [1, tokens, hidden]."""
        body = model.base_model
        block = body.h[layer] if hasattr(body, "h") else body.layers[layer]
        inside = block.post_attention_layernorm(hidden)
        if hasattr(body, "h"):
            return block.mlp(inside, inside if block.apply_residual_connection_post_layernorm else hidden)
        return hidden + block.mlp(inside)


class _Kept:
    """The file that finished layers are kept in, or none."""

    def __init__(self, path, run: dict):
        self.path, self.run = None if path is None else Path(path).expanduser(), run
        self.saved, self.cost = time.monotonic(), 0.0

    def load(self, x: Tensor, y: Tensor, modules: list) -> int:
        """How many layers are finished; they and the streams behind them are set."""
        if self.path is None or not self.path.exists():
            return 0
        tensors, about = load_tensors(self.path)
        run = about.get("sequential", {})
        if differs := next((name for name in self.run if run.get(name) != self.run[name]), None):
            raise ValueError(
                f"{str(self.path)!r} holds a conversion of another {differs}: name another path, or delete that file "
                "to start anew"
            )
        x.copy_(tensors["x"])
        y.copy_(tensors["y"])
        for layer, module in enumerate(modules[: about["done"]]):
            module.load_state_dict({name: tensors[f"{layer}.{name}"] for name in module.state_dict()})
        return about["done"]

    def save(self, done: int, x: Tensor, y: Tensor, modules: list) -> None:
        """Keep what is finished, so often that it takes a twentieth of the time; the last layer in any case."""
        if self.path is None or (done < len(modules) and time.monotonic() - self.saved < 20 * self.cost):
            return
        start = time.monotonic()
        tensors = {"x": x, "y": y}
        for layer, module in enumerate(modules[:done]):
            tensors |= {f"{layer}.{name}": tensor for name, tensor in module.state_dict().items()}
        save_tensors(
            self.path,
            {name: t.contiguous() for name, t in tensors.items()},
            {"sequential": self.run, "done": done},
        )
        self.saved = time.monotonic()
        self.cost = self.saved - start
