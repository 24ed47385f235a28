"""Calibration: text → moments. `calibrate` streams the sums of `kvteach.moments` through a model.

No activation outlives its layer, no token outlives its batch. A run can be kept in a file while it grows, be
stopped at any moment, and go on from there to the same bits.
"""

import hashlib
import time
from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .activations import Activations, attention_modules, observe, quiet, read
from .attended import handed_on, queries_in_blocks, spread, spread_in_blocks, wide
from .bases import reads
from .cost import BLOCK
from .env import bars_off
from .moments import ATTENDED, IN_BLOCKS, PLAIN, WEIGHTS, Moments, Source
from .offload import device
from .rope import from_config, has_fixed_turns, rotate


def calibrate(
    model, windows, batch: int = 1, attention: bool | str = False, path=None, progress: bool = True
) -> Moments:
    """Stream the moments of `windows` through `model`.

    Parameters
    ----------
    model : a LLaMA- or BLOOM-family model. Its language-model head is not run.
    windows : `kvteach.text.Windows`, or token ids [windows, tokens] without padding.
    batch : windows per forward pass.
    attention : also sum the attention-weighted kinds, in about twice the time. The name of a basis: sum only what that
        one reads.
    path : a file that the moments are kept in while they grow. A run that was stopped goes on from its last saved
        batch, with the same result to the last bit; a finished one is read. By default nothing is kept.
    progress : show a bar.

    Raises
    ------
    ValueError : NaN or infinity in an activation (layer, batch and kind are named), windows of a wrong shape, a file
        at `path` that belongs to another model, text, batch size or choice of `attention`, or ``blockwise`` for a RoPE
        whose turns are not fixed.
    """
    ids = token_ids(windows)
    asked = run(ids, batch)
    moments, done = empty(model, attention), 0
    attended = not moments.gram.keys().isdisjoint(ATTENDED + IN_BLOCKS)
    fresh = Moments.zeros(moments.source, tuple(moments.gram))
    if path is not None and Path(path).expanduser().exists():
        moments, done = _resume(path, moments, asked)
    moments.weight = moments.weight or _weights(model, _kinds(moments.source, model.config, attention))
    batches, no_bar = ids.split(batch), not progress or bars_off()
    saved, cost, whole = time.monotonic(), 0.0, True
    try:
        for number in tqdm(
            range(done, len(batches)), "calibrating", len(batches), initial=done, disable=no_bar
        ):
            _sum_batch(model, batches[number], fresh, attended, number)
            whole = False
            moments.take(fresh)
            whole, done = True, number + 1
            # Saved so often that it takes a twentieth of the time; a run that is killed repeats a few batches.
            if path is not None and time.monotonic() - saved > 20 * cost:
                start = time.monotonic()
                moments.save(path, done=done, **asked)
                saved = time.monotonic()
                cost = saved - start
    finally:  # Ctrl-C, NaN, end: keep all finished batches, unless the stop fell into the adding itself
        if path is not None and whole and done:
            moments.save(path, done=done, **asked)
    return moments


def empty(model, attention: bool | str = False) -> Moments:
    """The moments of no tokens, of the kinds that `calibrate` sums."""
    source = Source.of(model)
    return Moments.zeros(source, _kinds(source, model.config, attention))


def _kinds(source: Source, config, attention: bool | str) -> tuple[str, ...]:
    """What `calibrate` makes of a model."""
    if isinstance(attention, str):
        return reads(attention, source.rotates)
    in_blocks = IN_BLOCKS if source.rotates and has_fixed_turns(config) else ()
    return PLAIN + (ATTENDED + in_blocks if attention else ()) + WEIGHTS


def token_ids(windows) -> Tensor:
    """Token ids [windows, tokens] of `windows`; ValueError when they are none."""
    ids = torch.as_tensor(getattr(windows, "ids", windows))
    if ids.ndim != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"windows must be token ids [windows, tokens], at least one; got {tuple(ids.shape)} {ids.dtype}"
        )
    return ids


def run(ids: Tensor, batch: int) -> dict:
    """What tells one run from another, noted in the file that is kept of it; ValueError when `batch` is below 1."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    digest = hashlib.sha256(ids.long().cpu().numpy().tobytes()).hexdigest()
    return {"text": digest, "shape": list(ids.shape), "batch": batch}


def _resume(path, empty: Moments, asked: dict) -> tuple[Moments, int]:
    """The moments in `path` and how many batches they hold; ValueError when they are not of this run."""
    moments, notes = Moments.read(path)
    done = notes.pop("done", 0)
    differs = "model" if moments.source != empty.source else None
    differs = differs or ("choice of attention" if moments.gram.keys() != empty.gram.keys() else None)
    differs = differs or next((name for name in asked if notes.get(name) != asked[name]), None)
    if differs:
        raise ValueError(
            f"{str(path)!r} holds moments of another {differs}: name another path, or delete that file to start anew"
        )
    return moments, done


def _weights(model, kinds: Container[str]) -> dict[str, Tensor]:
    """Those of `kinds` that belong to the weights. The rows of `read` are the columns of x W."""
    found = {kind: [] for kind in WEIGHTS if kind in kinds}
    for module in attention_modules(model) if found else ():
        weights = read(module)
        sides = {  # [kv heads · d_h, hidden]; of W_O heads apart, [heads, d_h, hidden]
            "keys_weight": weights.key.flatten(0, 1),
            "values_weight": weights.value.flatten(0, 1),
            "outputs_weight": weights.output,
        }
        for kind, layers in found.items():
            layers.append(sides[kind] @ sides[kind].mT)
    return {kind: torch.stack(layers) for kind, layers in found.items()}


def _sum_batch(model, ids: Tensor, sums: Moments, attention: bool, number: int) -> None:
    """Add one forward pass to `sums`, layer by layer, so that no layer's activations outlive it."""
    turns = from_config(model.config) if "keys_in_blocks" in sums.gram else None

    def see(layer: int, activations: Activations) -> None:
        for kind, (total, gram) in _layer_sums(activations, sums.gram.keys(), turns).items():
            # A NaN or infinity anywhere in x stands on the diagonal of xᵀx as well: d numbers to look at, not all.
            if not torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all():
                raise ValueError(
                    f"layer {layer}, batch {number}: {kind} hold NaN or infinity; a model in float16 may overflow: "
                    "load it with dtype='float32' or 'bfloat16', and check its weights"
                )
            sums.gram[kind][layer] += gram.cpu()
            if total is not None:
                sums.total[kind][layer] += total.cpu()

    body = model.base_model
    with observe(model, see, attention), quiet(model):
        body(input_ids=ids.to(device(body)), use_cache=False)
    sums.count += ids.numel()
    sums.reach = max(sums.reach, ids.shape[1])


def _layer_sums(
    activations: Activations, kinds: Container[str], turns: Tensor | None
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """kind -> (total, gram) of one layer and batch, float64."""
    sums = {}
    for kind in (kind for kind in PLAIN if kind in kinds):
        x = getattr(activations, kind).double()  # [batch, heads, tokens, d_h]
        if kind.startswith("queries"):
            rows = x.transpose(0, 1).flatten(1, 2)  # [heads, batch * tokens, d_h]
            sums[kind] = rows.sum(1).ravel(), rows.mT @ rows
        else:
            rows = x.transpose(1, 2).flatten(0, 1).flatten(1)  # [batch * tokens, heads * d_h]
            sums[kind] = rows.sum(0), rows.T @ rows
    if activations.attention is not None:
        for row in range(len(activations.attention)):
            for kind, gram in _attended_sums(activations, row, kinds, turns).items():
                sums[kind] = None, sums[kind][1] + gram if row else gram
    return sums


def _attended_sums(
    activations: Activations, row: int, kinds: Container[str], turns: Tensor | None
) -> dict[str, Tensor]:
    """The attention-weighted grams of one text of the batch; those of keys and values averaged over query heads."""
    weights = activations.attention[row]  # [query heads, tokens, tokens]
    heads, tokens, _ = weights.shape
    sums = {"values_attended": handed_on(wide(activations.values[row]), weights) / heads}
    if "keys_attended" in kinds:
        sums["keys_attended"] = spread(wide(activations.keys_post[row]), weights) / heads
    if turns is not None:
        keys = rotate(activations.keys_pre[row], torch.arange(tokens) % BLOCK, turns)
        queries = activations.queries_post[row]
        sums["keys_in_blocks"] = spread_in_blocks(wide(keys), weights, BLOCK) / heads
        sums["queries_in_blocks"] = queries_in_blocks(queries, weights, BLOCK, turns)
    return sums
