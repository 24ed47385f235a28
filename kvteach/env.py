"""What this Python runs on: device, Colab, versions.

Nothing here changes anything; pages print `report()` where a number depends on the machine.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("numpy", "torch", "transformers", "matplotlib", "ipywidgets")


def in_colab() -> bool:
    """True in a Colab kernel, known before anything of ours is imported."""
    return "google.colab" in sys.modules


def device() -> str:
    """The device a model should go to: ``cuda`` when there is one, else ``cpu``.

    Apple's ``mps`` is left out: it has no float64, which the moments are summed in.
    """
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16() -> bool:
    """True when the GPU multiplies bfloat16 in hardware: compute capability 8.0 (Ampere) or newer.

    ``torch.cuda.is_bf16_supported()`` also says True on a T4, which only emulates it, many times slower.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def half_dtype():
    """The fast dtype here: bfloat16 on a GPU that has it, float16 on an older GPU, float32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if has_bf16() else torch.float16


def bars_off() -> bool:
    """True when the environment variable ``TQDM_DISABLE`` asks for no progress bars, as a run that stores outputs does.

    tqdm itself obeys it in a terminal, but not in a notebook.
    """
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0")


def stale_modules() -> list[str]:
    """Packages loaded in this process in another version than the one now installed.

    After a ``pip install`` in a running notebook the old module stays loaded; restarting the kernel mends it.
    """
    stale = []
    for name in PACKAGES:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded and (installed := _installed(name)) and loaded.split("+")[0] != installed.split("+")[0]:
            stale.append(f"{name} {loaded} is loaded, {installed} is installed: restart the kernel")
    return stale


def report() -> str:
    """Python, package versions, device and memory, one line each, for a page or a bug report."""
    import torch

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name} {_installed(name) or 'is not installed'}" for name in PACKAGES]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        lines.append(
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB, bfloat16 {'yes' if has_bf16() else 'no'}"
        )
    else:
        lines.append(f"cpu, {torch.get_num_threads()} threads")
    return "\n".join(lines + stale_modules())


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
