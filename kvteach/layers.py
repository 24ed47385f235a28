"""Where a compressed model departs from the original: attention and output errors, layer by layer.

With a, ã the softmax weights of one query in the two models, and o, õ what the attention block adds to the residual
stream,

    attention that moved = ½ Σ_m |a_m − ã_m|        output error = Σ ‖o − õ‖² / Σ ‖o‖²

The first is between 0 and 1: the share of its attention that a query gives to other tokens than before.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import attention_modules, eager, quiet
from .evaluate import checked_ids
from .offload import device


@dataclass(frozen=True)
class LayerErrors:
    """Where a model departs from the original. Both [layers], float64.

    Attributes
    ----------
    attention : share of the attention that moved, ½ Σ_m |a_m − ã_m| of each softmax row, mean over rows and heads.
    output : ‖o − õ‖² / ‖o‖² of what the attention block adds to the residual stream.
    """

    attention: Tensor
    output: Tensor


def layer_errors(model, original, ids) -> LayerErrors:
    """Attention and output errors of every layer, both models run on the same text.

    Each layer is fed by its own model, so the errors of earlier layers are in it. The softmax weights of one window
    are held: layers × heads × tokens² numbers.

    Parameters
    ----------
    ids : `kvteach.text.Windows`, or token ids [windows, tokens]. Both models run their ``eager`` attention, the
        only one that forms the weights, and get their own back.

    Raises
    ------
    ValueError : as for `perplexity`; another number of layers.
    """
    rows = checked_ids(original, ids)
    checked_ids(model, rows)
    before, after = attention_modules(original), attention_modules(model)
    if len(before) != len(after):
        raise ValueError(f"the model has {len(after)} layers, the original {len(before)}")
    moved, wrong, size = torch.zeros(3, len(before), dtype=torch.float64)
    for row in rows.split(1):
        kept = {}

        def keep(layer, weights, output, kept=kept):
            kept[layer] = weights, output

        def differ(layer, weights, output, kept=kept):
            old_weights, old_output = (old.to(output.device).double() for old in kept.pop(layer))
            # [1, heads, tokens, tokens] and [1, tokens, hidden]
            moved[layer] += (weights.double() - old_weights).abs().sum(-1).mean().item() / 2
            wrong[layer] += (output.double() - old_output).square().sum().item()
            size[layer] += old_output.square().sum().item()

        _watched(original, before, row, keep)
        _watched(model, after, row, differ)
    return LayerErrors(moved / len(rows), wrong / size)


def _watched(model, modules: list[nn.Module], row: Tensor, see) -> None:
    """Run `row` through the body; ``see(layer, weights, output)`` after each attention block.

    The output is taken at its last projection: BLOOM's block adds the residual before it returns.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        stack.enter_context(eager(model))
        for layer, module in enumerate(modules):
            last = []
            projection = module.o_proj if hasattr(module, "o_proj") else module.dense
            hook = projection.register_forward_hook(lambda m, inputs, out, last=last: last.append(out))
            stack.callback(hook.remove)
            hook = module.register_forward_hook(
                lambda m, inputs, out, layer=layer, last=last: see(layer, out[1], last.pop())
            )
            stack.callback(hook.remove)
        model.base_model(input_ids=row.to(device(model.base_model)), use_cache=False)
