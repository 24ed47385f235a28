"""Sequential conversion: each layer is compressed on what the compressed layers before it make.

One-shot conversion calibrates all layers on the original model, but layer ℓ of the compressed model reads a residual
stream that has drifted. Two streams are carried through the layers side by side, X of the original and Y of the
compressed model. In each layer:

1. Queries, keys, values and softmax rows A_j are taken from Y. The encoders E are those of `bases.attention_weighted`,
   each group read by its own query heads.
2. Each query head j gets a decoder of its own, least squares under its own rows: with G_j = Σ_q Cov_{A_j[q]}(k)

       D_j = (Eᵀ G_j E)⁺ Eᵀ G_j[:, i]          (values alike, with G_j = (A_j V)ᵀ (A_j V))

   It costs nothing: the query map and W_O are apart for each query head anyway.
3. W_O is fitted again. With Z what the small attention hands to W_O, the drift is taken back as far as it goes:

       min over W of ‖Y + Z W − (X + original attention of X)‖² + ridge · ‖W − W_O‖²

4. Both streams go on through the rest of the layer.

Keys that RoPE has turned further than any in the calibration are not covered by their basis. So each window but for its
first `SINKS` tokens, which every text has at its beginning, is moved: the windows are spread evenly over the positions
to be served.

One pass over the layers, no gradients. Held are the two streams (windows · tokens · hidden numbers each), one window's
attention, and for one layer 2 · h matrices of d² and one of (h · r_v)² in float64, with d the width of all keys.
"""

from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .activations import Activations, attention_modules, observe, quiet, read
from .bases import Basis
from .bases.optimal import best_projection, pseudo_inverse
from .calibration import attended
from .convert import build, fill, readers_of
from .env import bars_off
from .evaluate import checked_ids, positions
from .grouping import by_order
from .moments import Source
from .plan import Plan

RIDGE = 0.01  # of the mean diagonal of ZᵀZ; a first guess, never tuned
SINKS = 4  # first tokens that keep their positions when a window is moved


def compress(model, windows, plan: Plan, progress: bool = True):
    """A new model with a small cache, converted layer by layer on `windows`; `model` stays as it is.

    Parameters
    ----------
    model : a LLaMA-, Mistral-, Qwen2- or BLOOM-family model with a language-model head.
    windows : `kvteach.text.Windows`, or token ids [windows, tokens].
    plan : its dial and its reach; everything else as it is by default.

    The ridge keeps W_O near its old value in directions that the text says little about.

    Raises
    ------
    ValueError : what `kvteach.convert.compress` raises for model and plan; a plan of another kind; bad windows; a
        reach beyond the model's positions, or where there is no RoPE.
    """
    ids = checked_ids(model, windows)
    plan = replace(plan, sequential=True)
    source = Source.of(model)
    reach = plan.positions(source, positions(model), ids.shape[1])
    groups, key_rank, value_rank = plan.layout(source)
    heads = by_order(source.kv_heads, groups)
    small = build(model, plan, source, [heads] * source.layers)
    stream = _Stream(model, ids, reach)
    if reach is not None:
        small.config.kvteach["reach"] = reach
    before, after = attention_modules(model), attention_modules(small)
    seen: list[Activations] = []
    with (
        quiet(model),
        observe(model, lambda layer, found: seen.append(found), attention=True),
        tqdm(total=source.layers * len(ids), desc="compressing", disable=not progress or bars_off()) as bar,
    ):
        x = stream.begin()  # [windows, tokens, hidden]
        y = x.clone()
        for layer in range(source.layers):
            grams, queries = 0, 0
            for row in range(len(ids)):
                stream.run(model, layer, y, row)
                found = seen.pop()
                grams = grams + torch.stack(list(attended(found)))  # [query heads, 2, d, d]
                q = found.queries_post[0].double()  # [query heads, tokens, d_h]
                queries = queries + q.mT @ q
                bar.update()
            attention = read(before[layer])
            found = _bases(grams, queries, attention.output, heads, (key_rank, value_rank), source)
            fill(after[layer], attention, heads, *found)
            _refit(stream, model, small, layer, x, y, seen)
    return small


def _bases(grams, queries, outputs, heads, ranks, source):
    """One basis a group, and the decoders of its query heads: keys' [readers of the group, r_k, d_h] and values'."""
    readers, d_h = source.query_heads // source.kv_heads, source.head_dim
    weights = queries.cpu(), outputs @ outputs.mT  # [query heads, d_h, d_h] both
    bases, decoders = [], []
    for group in heads:
        columns = torch.cat([torch.arange(head * d_h, (head + 1) * d_h) for head in group])
        reading = readers_of(group, readers)
        sides, apart = [], []
        for side, rank in enumerate(ranks):
            own = grams[reading, side].cpu()[:, columns]  # [readers of the group, t · d_h, d]
            own = own[:, :, columns]
            weight = weights[side][reading].unflatten(0, (len(group), readers)).sum(1)  # [t, d_h, d_h]
            shared = best_projection(own.mean(0), rank, weight)
            each = []
            for n, gram in enumerate(own):
                block = slice(n // readers * d_h, (n // readers + 1) * d_h)
                start = shared.decode[:, block]  # kept in directions that this head's own rows never use
                wrong = gram[:, block] - gram @ shared.encode @ start  # [t · d_h, d_h]
                normal = shared.encode.T @ gram @ shared.encode
                each.append(start + pseudo_inverse(normal) @ (shared.encode.T @ wrong))
            sides.append(shared)
            apart.append(torch.stack(each))
        bases.append(Basis(*sides))
        decoders.append(tuple(apart))
    return bases, decoders


class _Stream:
    """Runs single layers of a model, or of its compressed copy, on single windows."""

    def __init__(self, model, ids: Tensor, reach: int | None):
        self.model, self.ids = model, ids
        windows, tokens = ids.shape
        self.positions = torch.arange(tokens).expand(windows, -1).clone()
        if reach is not None:
            self.positions[:, SINKS:] += torch.linspace(0, reach - tokens, windows).long()[:, None]

    def begin(self) -> Tensor:
        """What the first layer reads, [windows, tokens, hidden]."""
        body = self.model.base_model
        x = body.get_input_embeddings()(self.ids.to(self.model.device))
        return body.word_embeddings_layernorm(x) if hasattr(body, "word_embeddings_layernorm") else x

    def run(self, model, layer: int, hidden: Tensor, row: int) -> Tensor:
        """One layer of `model` on one window of `hidden`: [1, tokens, hidden]."""
        x, body = hidden[row : row + 1], self.model.base_model
        mask = dict(config=self.model.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        if hasattr(body, "h"):
            ones = torch.ones_like(self.ids[row : row + 1], device=x.device)
            alibi = body.build_alibi_tensor(ones, self.model.config.n_head, x.dtype)
            return model.base_model.h[layer](x, alibi=alibi, attention_mask=create_causal_mask(**mask))[0]
        block = model.base_model.layers[layer]
        config = self.model.config
        window = getattr(block.self_attn, "sliding_window", getattr(config, "sliding_window", None))
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        angles = body.rotary_emb(x, self.positions[row : row + 1].to(x.device))
        return block(x, attention_mask=make(**mask), position_embeddings=angles)


def _refit(stream: _Stream, model, small, layer: int, x: Tensor, y: Tensor, seen: list) -> None:
    """Fit W_O of the small layer again, and move both streams behind the layer, in place."""
    old, new = attention_modules(model)[layer], attention_modules(small)[layer]
    last = new.dense if hasattr(new, "dense") else new.o_proj
    kept, gram, cross = {}, 0, 0
    handles = [
        old.register_forward_hook(lambda module, args, output: kept.update(target=output[0][0])),
        last.register_forward_pre_hook(lambda module, args: kept.update(z=args[0][0])),
    ]
    adds = hasattr(new, "dense")  # BLOOM's attention adds the residual, its second argument, itself
    if adds:
        handles.append(new.register_forward_pre_hook(lambda module, args: kept.update(residual=args[1][0])))
    try:
        for row in range(len(x)):
            after = stream.run(model, layer, x, row)
            seen.clear()
            stream.run(small, layer, y, row)
            target = kept["target"] - kept["residual"] if adds else x[row] + kept["target"] - y[row]
            if last.bias is not None:
                target = target - last.bias
            z = kept["z"].double()  # [tokens, h · r_v]
            gram, cross = gram + z.T @ z, cross + z.T @ target.double()
            x[row] = after[0]
    finally:
        for handle in handles:
            handle.remove()
    old_weight = last.weight.double().T  # [h · r_v, hidden]
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    step = torch.linalg.solve(gram + ridge, cross - gram @ old_weight)
    last.weight.copy_((old_weight + step).T)
    for row in range(len(y)):
        y[row] = stream.run(small, layer, y, row)[0]
