"""Moments: what calibration leaves behind.

For each layer and each kind of activation x (a row per token, heads side by side) three sums are streamed in float64:

    count = Σ 1        total = Σ x        gram = Σ xᵀx

Everything the book does with a cache follows from them: spectra, centring, every basis. They are additive, so two texts
or two processes give one set of moments by ``+``, and their size does not depend on the number of tokens: a matrix
of d² numbers per layer and kind, where d is the width of all key-value heads together.

======================  =========================  ====================================================================
kind                    gram per layer             what it is
======================  =========================  ====================================================================
``keys_pre``            [d, d]                     keys before RoPE
``keys_post``           [d, d]                     keys as they are cached
``values``              [d, d]                     values
``queries_pre``         [heads, d_h, d_h]          queries before RoPE, each head apart
``queries_post``        [heads, d_h, d_h]          queries as they meet the keys
``keys_attended``       [d, d]                     covariance of the cached keys under each row of softmax weights,
                                                   averaged over query heads (only with ``attention=True``)
``values_attended``     [d, d]                     what attention hands on: (A V)ᵀ(A V), averaged over query heads
``keys_in_blocks``      [d, d]                     as ``keys_attended``, of keys that RoPE turns by their place in their
                                                   block of `cost.BLOCK` tokens (with ``attention=True``, where there
                                                   is a RoPE that does not change with the length of the text)
``queries_in_blocks``   [heads, d_h, d_h]          queries as they meet these keys, as often as they read each block
======================  =========================  ====================================================================

Beside them lie three products of the model's own weights, which no text changes and no sum adds up. With a row of
activations on the left, k = x W_K, v = x W_V, and query head j adds o_j W_O^j to the output:

======================  =========================  ====================================================================
``keys_weight``         [d, d]                     W_Kᵀ W_K: the second moment that keys would have if all inputs were
                                                   equally likely; biases are left out
``values_weight``       [d, d]                     W_Vᵀ W_V
``outputs_weight``      [heads, d_h, d_h]          W_O^j W_O^jᵀ: how much the output feels an error of head j's values
======================  =========================  ====================================================================

Float64 is not a luxury: a float32 Gram matrix loses every direction whose energy is below 1e-7 of the largest.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .activations import attention_modules
from .files import load_tensors, save_tensors
from .offload import fetch
from .zoo import FAMILIES, check_family

PLAIN = ("keys_pre", "keys_post", "values", "queries_pre", "queries_post")
ATTENDED = ("keys_attended", "values_attended")
IN_BLOCKS = ("keys_in_blocks", "queries_in_blocks")
WEIGHTS = ("keys_weight", "values_weight", "outputs_weight")
FORMAT = 3  # to be raised when `cost.BLOCK` changes, too


@dataclass(frozen=True)
class Source:
    """The model that moments belong to. Moments of two models are never mixed."""

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    weights: (
        str  # sha256 of every weight and buffer (RoPE's frequencies among them), bit for bit, in its dtype
    )

    @classmethod
    def of(cls, model) -> "Source":
        """The identity of a transformers model; reads all its weights once (a second for half a gigabyte).

        Offloaded weights are read one at a time. Raises ValueError for a model on ``meta`` that has none.
        """
        family, digest = check_family(model.config), hashlib.sha256()
        config, modules = model.config, attention_modules(model)
        body = model.base_model  # with or without a language-model head, the activations are the same
        for name, _ in list(chain(body.named_parameters(), body.named_buffers())):
            digest.update(name.encode())
            digest.update(fetch(body, name).cpu().contiguous().flatten().view(torch.uint8).numpy())
        kv_heads = config.num_attention_heads if family == "bloom" else config.num_key_value_heads
        shape = (len(modules), config.num_attention_heads, kv_heads, modules[0].head_dim)
        return cls(config.model_type, *shape, digest.hexdigest())

    @property
    def rotates(self) -> bool:
        """True where RoPE turns queries and keys: in pairs of numbers (f, f + d_h/2), by position × frequency f."""
        return FAMILIES[self.model_type] == "llama"


class Moments:
    """Streamed sums of one model's activations, all on the CPU in float64.

    Attributes
    ----------
    source : the model they belong to.
    count : tokens summed.
    reach : positions that RoPE has turned keys to: 0 … reach − 1, the length of the longest window.
    total : kind -> [layers, width], for the kinds of `PLAIN`.
    gram : kind -> [layers, width, width], or [layers, query heads, d_h, d_h] for queries.
    weight : the same shapes for the kinds of `WEIGHTS`, filled by `kvteach.calibration.calibrate`, else empty.
    """

    def __init__(
        self,
        source: Source,
        count: int,
        total: dict[str, Tensor],
        gram: dict[str, Tensor],
        weight: dict[str, Tensor] | None = None,
        reach: int = 0,
    ):
        self.source, self.count, self.total, self.gram = source, count, total, gram
        self.reach = reach
        self.weight = weight or {}

    @classmethod
    def zeros(cls, source: Source, kinds: Sequence[str] = PLAIN) -> "Moments":
        """Moments of no tokens; `kvteach.calibration.empty` knows the kinds of a model. `WEIGHTS` are left out."""
        layers, heads, width = source.layers, source.query_heads, source.kv_heads * source.head_dim
        total, gram = {}, {}
        for kind in (kind for kind in kinds if kind not in WEIGHTS):
            queries = kind.startswith("queries")
            shape = (heads, source.head_dim, source.head_dim) if queries else (width, width)
            gram[kind] = torch.zeros(layers, *shape, dtype=torch.float64)
            if kind in PLAIN:
                total[kind] = torch.zeros(
                    layers, heads * source.head_dim if queries else width, dtype=torch.float64
                )
        return cls(source, 0, total, gram)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both texts together. ValueError when they belong to different models or hold different kinds."""
        if self.source != other.source:
            raise ValueError(f"moments of two models cannot be added: {self.source} and {other.source}")
        if self.gram.keys() != other.gram.keys():
            missing = sorted(self.gram.keys() ^ other.gram.keys())
            raise ValueError(f"only one of the two moments holds {', '.join(missing)}: calibrate both alike")
        total = {kind: self.total[kind] + other.total[kind] for kind in self.total}
        gram = {kind: self.gram[kind] + other.gram[kind] for kind in self.gram}
        weight, reach = self.weight or other.weight, max(self.reach, other.reach)
        return Moments(self.source, self.count + other.count, total, gram, weight, reach)

    def take(self, batch: "Moments") -> None:
        """Add `batch` in place and empty it: the sums of a large model need not be in memory three times."""
        for kind, gram in batch.gram.items():
            self.gram[kind] += gram
            gram.zero_()
        for kind, total in batch.total.items():
            self.total[kind] += total
            total.zero_()
        self.count, batch.count = self.count + batch.count, 0
        self.reach = max(self.reach, batch.reach)

    def __repr__(self) -> str:
        of = self.source
        shape = f"{of.layers} layers of {of.kv_heads} key-value heads × {of.head_dim}"
        return f"Moments of {self.count} tokens, {of.model_type}, {shape}:\n  {', '.join(self.gram)}"

    def per_token(self, kind: str, layer: int) -> Tensor:
        """Second moment per token of a whole layer, float64 [d, d] or [query heads, d_h, d_h]; errors as for `matrix`.

        The kinds of `WEIGHTS` belong to the model, not to a text, and are handed out as they are.
        """
        held = self.gram | self.weight
        if kind not in held:
            known = kind in PLAIN + ATTENDED + IN_BLOCKS + WEIGHTS
            hint = "; calibrate with attention=True for it" if known else ""
            raise ValueError(f"no moments of {kind!r}, only of {', '.join(held)}{hint}")
        self._check_layer(kind, layer)
        return self.weight[kind][layer] if kind in self.weight else self.gram[kind][layer] / self.count

    def matrix(self, kind: str, layer: int, heads=None, centred: bool = False) -> Tensor:
        """Second moment per token of one layer, E[xᵀx], or its covariance.

        Parameters
        ----------
        kind : a key of `gram` or `weight`.
        layer : 0 … layers − 1.
        heads : which heads, side by side: an int, a sequence of ints, or None for all of the layer.
        centred : subtract the outer product of the mean. Attended moments of keys are centred by themselves.

        Returns
        -------
        float64 [n · d_h, n · d_h] for n heads.

        Raises
        ------
        ValueError : an unknown kind, no tokens, or centring where it means nothing.
        IndexError : a layer or head that the model does not have.
        """
        whole = self.per_token(kind, layer)
        if centred and kind not in self.total:
            raise ValueError(f"{kind} cannot be centred: no mean belongs to it")
        apart = whole.ndim == 3  # heads that were never multiplied with one another
        available = self.source.query_heads if apart else self.source.kv_heads
        chosen = list(range(available) if heads is None else heads if hasattr(heads, "__len__") else [heads])
        if bad := [head for head in chosen if not 0 <= head < available]:
            raise IndexError(f"head {bad[0]} does not exist: {kind} have heads 0 to {available - 1}")
        d = self.source.head_dim
        if apart:  # their blocks stand on the diagonal
            found = torch.block_diag(*(whole[head] for head in chosen))
        else:
            columns = torch.cat([torch.arange(head * d, (head + 1) * d) for head in chosen])
            found = whole[columns][:, columns]
        if centred:
            mean = self.mean(kind, layer)[chosen]  # [n, d_h]
            parts = mean if apart else mean.ravel()[None]
            found = found - torch.block_diag(*(part.outer(part) for part in parts))
        return found

    def mean(self, kind: str, layer: int) -> Tensor:
        """Mean row of each head, float64 [heads, d_h], for the kinds of `PLAIN`; errors as for `matrix`."""
        if kind not in self.total:
            raise ValueError(f"no mean of {kind!r}, only of {', '.join(self.total)}")
        self._check_layer(kind, layer)
        return (self.total[kind][layer] / self.count).view(-1, self.source.head_dim)

    def _check_layer(self, kind: str, layer: int) -> None:
        if not self.count and kind not in self.weight:
            raise ValueError("these moments have seen no token")
        if not 0 <= layer < self.source.layers:
            raise IndexError(
                f"layer {layer} does not exist: the model has layers 0 to {self.source.layers - 1}"
            )

    def spectrum(self, kind: str, layer: int, heads=None, centred: bool = False) -> Tensor:
        """Eigenvalues of `matrix`, largest first, float64.

        They are the squared singular values of the stacked activations divided by the number of tokens; rounding
        below zero is cut off.
        """
        return torch.linalg.eigvalsh(self.matrix(kind, layer, heads, centred)).flip(0).clamp(min=0)

    # -----------------------------------------------------------------------------------------------------
    # Files and processes

    def save(self, path: str | os.PathLike, **notes) -> None:
        """Write a safetensors file, aside and then renamed, so that it is whole or not there. `notes` go with it."""
        tensors = {f"total.{kind}": tensor for kind, tensor in self.total.items()}
        tensors |= {f"gram.{kind}": tensor for kind, tensor in self.gram.items()}
        tensors |= {f"weight.{kind}": tensor for kind, tensor in self.weight.items()}
        about = {"moments": FORMAT, "source": vars(self.source), "notes": notes}
        about |= {"count": self.count, "reach": self.reach}
        save_tensors(Path(path).expanduser(), tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Moments":
        """Read what `save` wrote. FileNotFoundError when nothing is there, ValueError when it is something else."""
        return cls.read(path)[0]

    @classmethod
    def read(cls, path) -> tuple["Moments", dict]:
        """The moments in a file and the notes saved with them; errors as for `load`."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"no moments at {str(path)!r}" + (", it is a folder" if path.is_dir() else "")
            )
        tensors, about = load_tensors(path)
        if about.get("moments") != FORMAT:
            raise ValueError(f"{str(path)!r} holds no moments of format {FORMAT}")
        parts = {"total": {}, "gram": {}, "weight": {}}
        for name, tensor in tensors.items():
            part, kind = name.split(".")
            parts[part][kind] = tensor
        source, count, reach = Source(**about["source"]), about["count"], about["reach"]
        return cls(source, count, **parts, reach=reach), about["notes"]

    def all_reduce(self) -> "Moments":
        """The sum over all processes of the default `torch.distributed` group; every process gets it.

        Works over gloo (CPU) and nccl (GPU). A process without a share brings `kvteach.calibration.empty` of the same
        choice and gets the weights of one that has them. Raises RuntimeError when no group was started, ValueError (in
        every process) when they hold moments of different models or kinds.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            raise RuntimeError(
                "all_reduce needs a process group: run under torchrun and call init_process_group"
            )
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.source, sorted(self.gram), bool(self.weight), self.reach))
        if odd := [rank for rank, other in enumerate(everyone) if other[:2] != everyone[0][:2]]:
            raise ValueError(f"process {odd[0]} holds moments of another model or other kinds than process 0")
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"

        def summed(tensor: Tensor) -> Tensor:
            out = torch.empty_like(tensor)
            for layer, mine in enumerate(tensor):  # of a large model a kind is gigabytes, beside its weights
                there = mine.to(device, copy=True)
                dist.all_reduce(there)
                out[layer] = there
            return out

        count = int(summed(torch.tensor([self.count])))
        total = {kind: summed(self.total[kind]) for kind in sorted(self.total)}
        gram = {kind: summed(self.gram[kind]) for kind in sorted(self.gram)}
        weight, weighed = [self.weight], [other[2] for other in everyone]
        if any(weighed) and not all(weighed):  # a process without a share ran no model
            dist.broadcast_object_list(weight, weighed.index(True))
        return Moments(self.source, count, total, gram, weight[0], max(other[3] for other in everyone))
