"""What a forward pass holds and makes: peak memory, and the tensors that its operations allocate.

A GPU counts what is allocated. Of a CPU's process Linux tells the resident set and its peak, which can be reset; other
systems do not, and what is not known is None.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Sees every tensor that operations make; views and results in place are not made."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], int]] = []  # shape, bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.shapes.append((tuple(leaf.shape), leaf.nbytes))
        return out

    def largest(self, tokens: int) -> int:
        """Bytes of the largest tensor with an axis of that many tokens."""
        return max((size for shape, size in self.shapes if tokens in shape), default=0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Peak:
    """A context that finds the most memory held within beyond what was held before, over all its uses."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = _resident(reset=True)

    def __exit__(self, *error):
        cuda = self.device.type == "cuda"
        after = torch.cuda.max_memory_allocated(self.device) if cuda else _resident()
        if self.before is not None and after is not None:
            self.bytes = max(self.bytes or 0, after - self.before)


def _resident(reset: bool = False) -> int | None:
    """The most memory that this process held since the last reset, in bytes; None where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS: proc(5)
        return _kilobytes("/proc/self/status", "VmHWM:") * 1024
    except (OSError, StopIteration):
        return None


def free() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable:") * 1024
    except (OSError, StopIteration):
        return None


def _kilobytes(file: str, field: str) -> int:
    return next(
        int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(field)
    )
