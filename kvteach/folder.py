"""A compressed model on disk: `save` writes weights, config, tokenizer and a card that says how it was made.

The folder is written aside, as ``NAME.partial`` beside it, and renamed when it is whole: whoever finds a folder finds a
model. Any transformers that has seen ``import kvteach`` loads it with ``AutoModelForCausalLM.from_pretrained``.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from .plan import Plan

PARTIAL = ".partial"  # at the end of a folder's name while it is being written
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [kvteach]
{base}---

# {name}

{source} with a smaller key-value cache, made by [kvteach](https://github.com/kvteach/kvteach) {kvteach}.
Its licence is that of the original.

```python
{load}
```

How it was made:

| | |
|---|---|
{made}
{measured}"""


def save(model, tokenizer, folder, source_name: str, windows=None, measured: dict | None = None) -> Path:
    """Write a compressed model, so that ``from_pretrained`` and `kvteach.zoo.load` read it back.

    Parameters
    ----------
    model : what `kvteach.convert.compress` returned. It is not changed.
    folder : a new or an empty one.
    source_name : the name under which `kvteach.zoo.load` finds the original.
    windows : the `kvteach.text.Windows` that the moments come from.
    measured : name -> number or text, for the card.

    Returns
    -------
    The folder's absolute path.

    Raises
    ------
    ValueError : the model is not a compressed one.
    FileExistsError, PermissionError : as for `check`.
    OSError : the disk is full or cannot be written. Nothing is left behind, then or after Ctrl-C.
    """
    folder = check(folder)
    with whole(folder) as aside:
        write(model, tokenizer, aside, source_name, windows, measured)
    return folder


@contextmanager
def whole(folder) -> Iterator[Path]:
    """A folder beside `folder`, to write into. It takes that name at the end, or is deleted when something goes wrong.

    Raises FileExistsError, PermissionError as `check`.
    """
    folder = check(folder)
    aside = _aside(folder)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            folder.rmdir()  # it is empty
        aside.rename(folder)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write(
    model, tokenizer, folder: Path, source_name: str, windows=None, measured: dict | None = None
) -> None:
    """What `save` writes, into the folder of `whole`. Weights that ``compress(…, folder=…)`` has put there stay.

    Parameters and errors as for `save`.
    """
    facts = getattr(model.config, "kvteach", None)
    if not facts:
        raise ValueError(
            "the model is not compressed: give save what compress returned, or use save_pretrained"
        )
    if Path(source_name).expanduser().is_dir():
        source_name = str(Path(source_name).expanduser().resolve())  # to be found from any folder
    facts = facts | {"source_name": source_name}
    if windows is not None:
        facts["calibration"] = {
            "text": windows.text,
            "split": windows.split,
            "windows": len(windows),
            "length": windows.ids.shape[1],
            "fingerprint": windows.fingerprint,
        }
    if not (folder / "config.json").exists():
        # An offloaded model is in memory one shard at a time.
        model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["kvteach"] = facts
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    name = folder.name.removesuffix(PARTIAL)
    (folder / "README.md").write_text(_card(name, model, facts, measured), "utf-8")


@contextmanager
def shards(model, folder, count: int) -> Iterator[Callable[[dict], None]]:
    """Write the weights of a model that is never whole, as ``from_pretrained`` reads them.

    Within, the function that is handed out takes one part of the weights, name -> tensor, `count` times. Config and
    index come last: an unfinished folder is no model. When something goes wrong, it is deleted.

    Parameters
    ----------
    model : gives config and generation config; its own weights are not looked at.
    folder : a new or an empty one.
    """
    from safetensors.torch import save_file

    folder, sizes, index = check(folder), {"total_parameters": 0, "total_size": 0}, {}
    folder.mkdir(parents=True, exist_ok=True)

    def write(part: dict) -> None:
        file = f"model-{len(set(index.values())) + 1:05d}-of-{count:05d}.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in part.items()}, folder / file, {"format": "pt"}
        )
        index.update(dict.fromkeys(part, file))
        sizes["total_parameters"] += sum(tensor.numel() for tensor in part.values())
        sizes["total_size"] += sum(tensor.nbytes for tensor in part.values())

    try:
        yield write
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        contents = json.dumps({"metadata": sizes, "weight_map": index}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(contents + "\n", "utf-8")
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check(folder) -> Path:
    """The absolute path of `folder`, where a model may be written.

    Raises FileExistsError when something is there, or when a killed run has left its half-written folder;
    PermissionError where nothing can be made.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "holds files already" if folder.is_dir() else "is a file"
        raise FileExistsError(f"{str(folder)!r} {what}: name a new folder or an empty one")
    if (aside := _aside(folder)).exists():
        raise FileExistsError(
            f"{str(aside)!r} is there, half-written: if no other run is writing it, delete it and start again"
        )
    above = next(parent for parent in folder.parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(f"no folder can be made in {str(above)!r}: name another place")
    return folder


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _card(name: str, model, facts: dict, measured: dict | None) -> str:
    plan, source = Plan(**facts["plan"]), facts["source_name"]
    heads = f"{facts['source']['kv_heads']} key-value heads"
    cached = f"{plan.kv_ratio:g} of the width of" if plan.kv_heads is None else f"{plan.kv_heads} of"
    made = {
        "original": f"{source}, sha256 of its weights {facts['source']['weights'][:16]}…",
        "cache": f"{cached} {heads}, form {plan.form}",
        "basis": plan.basis,
        "grouping": plan.grouping,
        "centred": "yes" if plan.centred else "no",
        "sequential": "yes" if plan.sequential else "no",
    }
    if block := getattr(model.config, "key_block", None):
        made["keys"] = f"turned within blocks of {block} tokens, the same at every position"
    if "reach" in facts:
        made["positions calibrated"] = facts["reach"]
    if text := facts.get("calibration"):
        made["calibration text"] = (
            f"{text['text']}, {text['split']}: {text['windows']} windows × {text['length']} tokens, "
            f"fingerprint {text['fingerprint']}"
        )
    made["versions"] = ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{package} {version(package)}" for package in ("torch", "transformers")),
        ]
    )
    own = model.config.model_type.startswith("kvteach_")
    load = ["import kvteach  # lets transformers find the class"] if own else []
    load += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    on_hub = source.count("/") == 1 and not Path(source).exists()
    return CARD.format(
        base=f"base_model: {source}\n" if on_hub else "",
        name=name,
        source=source,
        kvteach=facts["version"],
        load="\n".join(load),
        made=_table(made),
        measured=f"\nWhat it measured:\n\n| | |\n|---|---|\n{_table(measured)}\n" if measured else "",
    )


def _table(rows: dict) -> str:
    return "\n".join(
        f"| {key} | {format(value, '.6g') if isinstance(value, float) else value} |"
        for key, value in rows.items()
    )
