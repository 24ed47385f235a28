"""Files that are whole or not there."""

import json
import os
from pathlib import Path


def save_tensors(path: Path, tensors: dict, about: dict) -> None:
    """Write a safetensors file aside and rename it. `about`, plain values, is stored in it under ``kvteach``."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, aside, {"kvteach": json.dumps(about)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict, dict]:
    """The tensors and what is said about them; ValueError when the file is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("kvteach", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or no safetensors file ({error})") from error
