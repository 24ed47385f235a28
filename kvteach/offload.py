"""Models bigger than memory: accelerate leaves weights in their safetensors files, or beside a GPU in CPU memory.

Such a weight stands in the model on the device ``meta``, a shape without numbers. accelerate's hooks bring the numbers
when its module runs, and drop them afterwards. `fetch` reads one outside of a run, and `device` says where inputs go.
"""

from itertools import chain

import torch
from torch import Tensor, nn

# family -> the layers, and the modules that every token passes once
PARTS = {
    "llama": ("model.layers", ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")),
    "bloom": (
        "transformer.h",
        (
            "transformer.word_embeddings",
            "transformer.word_embeddings_layernorm",
            "transformer.ln_f",
            "lm_head",
        ),
    ),
}


def layers_on_disk(family: str, device) -> dict:
    """The ``device_map`` that keeps embeddings, last norm and head on `device`, and beside them one layer at a time.

    Parameters
    ----------
    family : ``"llama"`` or ``"bloom"``, `kvteach.zoo.FAMILIES`.
    """
    layers, rest = PARTS[family]
    return {layers: "disk"} | dict.fromkeys(rest, str(device))  # accelerate compares names


def is_offloaded(model) -> bool:
    """True when some weights of `model` are not in it: they lie on disk, or beside a GPU in CPU memory."""
    return any(weight.is_meta for weight in model.parameters())


def fetch(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, wherever it lies; nothing stays behind in `model`.

    Raises ValueError for a weight on ``meta`` that accelerate keeps nowhere.
    """
    from accelerate.utils import align_module_device

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        found = getattr(module, leaf).detach()
    if found.is_meta:
        raise ValueError(f"the weight {name} holds no numbers: load the model with from_pretrained")
    return found


def device(module: nn.Module) -> torch.device:
    """Where the inputs of `module` go; where all of it is offloaded, its hooks move them on."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
