"""What each command of `kvteach.cli` does: it prints for people, and returns what goes into JSON and the exit status.

`asked` holds the options by their names, as argparse leaves them.
"""

import contextlib
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import __version__

# The extra "models" of pyproject.toml: package -> the lowest version.
NEEDED = {
    "torch": "2.2",
    "transformers": "5.5",
    "safetensors": "0.4",
    "accelerate": "1.1",
    "gguf": "0.10",
    "filelock": "3.12",
    "tqdm": "4.64",
}
CURE = 'pip install "kvteach[models]"'
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def doctor(asked) -> tuple[dict, int]:
    """Versions, device, memory, and what is missing."""
    versions = {name: _version(name) for name in NEEDED}
    trouble = [
        f"{name} is not installed" if have is None else f"{name} {have} is older than {NEEDED[name]}"
        for name, have in versions.items()
        if have is None or _numbers(have) < _numbers(NEEDED[name])
    ]
    if (have := versions["transformers"]) and _numbers(have) >= (6,):
        trouble.append(f"transformers {have} is too new, below 6 is needed")
    device = None
    if versions["torch"]:
        from . import env

        device = env.device()
    memory = None
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(Path.home()).free
    print(
        f"kvteach {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    for name, have in versions.items():
        print(f"{name} {have or '-'}")
    print(
        f"device: {device or '-'}; memory: {_bytes(memory) if memory else '-'}; free on disk: {_bytes(free)}"
    )
    for problem in trouble:
        print(f"missing: {problem}; {CURE}")
    print("something is missing" if trouble else "all is there")
    found = {
        "kvteach": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
    }
    return found | {"memory": memory, "missing": trouble}, int(bool(trouble))


def spectrum(asked) -> tuple[dict, int]:
    """Ranks for 90 and 99 % of the energy of what a layer's heads cache together."""
    from . import calibration, svd, zoo

    config = zoo.config(asked.model)
    zoo.check_family(config)
    _print_sizes(asked, config)
    model, tokenizer = _load(asked, asked.model)
    windows = _windows(asked, model, tokenizer, "calibration")
    moments = calibration.calibrate(model, windows)
    width = moments.source.kv_heads * moments.source.head_dim
    kinds = ("keys_pre", "keys_post", "values")
    layers = []
    for layer in range(moments.source.layers):
        energies = {kind: moments.spectrum(kind, layer) for kind in kinds}
        layers.append(
            {
                kind: {str(s): int(svd.rank_for_energy(energies[kind], s)) for s in (0.9, 0.99)}
                for kind in kinds
            }
        )
    print(f"{windows!r}\nDirections of {width} that hold 90 % / 99 % of the energy:")
    print(f"{'layer':>5}  {'keys before RoPE':>16}  {'keys after RoPE':>16}  {'values':>16}")
    for layer, ranks in enumerate(layers):
        cells = (f"{ranks[kind]['0.9']:>9} / {ranks[kind]['0.99']:<4}" for kind in kinds)
        print(f"{layer:>5}  {'  '.join(cells)}".rstrip())
    return {"model": asked.model, "width": width, "layers": layers} | _text(windows), 0


def compress(asked) -> tuple[dict, int]:
    """Calibrate, convert, measure, save. What can fail without the weights fails before they are loaded.

    Until the folder is written, what was computed is kept beside it, and the same command goes on from there.
    """
    from . import convert, folder, sequential, sizes, zoo
    from . import evaluate as measure
    from .plan import Plan

    out = folder.check(asked.out)
    plan = Plan(
        kv_heads=asked.kv_heads,
        kv_ratio=asked.kv_ratio,
        basis=asked.basis,
        stock=asked.stock,
        sequential=not (asked.stock or asked.basis or asked.offload or asked.reach)
        if asked.sequential is None
        else asked.sequential,
        reach=asked.reach,
    )
    if plan.sequential and asked.processes:
        raise ValueError(
            "layer by layer a model is converted in one process: add --no-sequential, or start this without torchrun"
        )
    if asked.offload and plan.sequential:
        raise ValueError("--sequential needs the whole model in memory: leave it out, or --offload")
    config = zoo.config(asked.model)
    small_sizes = sizes.planned(config, plan)
    _print_sizes(asked, config, small_sizes)
    if asked.offload:
        _print_needs(asked, config, plan, small_sizes)
    model, tokenizer = _load(asked, asked.model)
    windows = _windows(asked, model, tokenizer, "calibration")
    held_out = None
    if asked.eval_windows:
        held_out = _windows(asked, model, tokenizer, "evaluation", asked.eval_windows)
    with _kept_beside(out) as kept:
        if not plan.sequential:
            moments = _calibrated(asked, model, windows, plan.basis, kept)
        with folder.whole(out) if asked.offload else contextlib.nullcontext() as aside:
            if plan.sequential:
                small = sequential.compress(model, windows, plan, kept)
            else:
                small = convert.compress(model, moments, plan, folder=aside)
            found = _costs(small, model)
            if held_out is not None:
                found = _compared(measure.compare(small, model, held_out)) | found
            rows = found if held_out is None else {"evaluation text": repr(held_out)} | found
            save = folder.write if asked.offload else folder.save
            save(small, tokenizer, aside or out, asked.model, windows, rows)
    _print_measured(found)
    print(f"written: {out}")
    found |= {"model": asked.model, "out": str(out), "plan": plan.as_dict(), "calibration": _text(windows)}
    return found if held_out is None else found | {"evaluation": _text(held_out)}, 0


def evaluate(asked) -> tuple[dict, int]:
    """Perplexity and bytes; for a compressed model also against its original."""
    from . import evaluate as measure
    from . import zoo

    config = zoo.config(asked.model)
    facts = getattr(config, "kvteach", None) or {}
    original = asked.original or facts.get("source_name")
    if facts and not original:
        raise ValueError(f"{asked.model!r} does not say what it was made from: name it with --original")
    _print_sizes(asked, config)
    if original is None:
        model, tokenizer = _load(asked, asked.model)
        windows = _windows(asked, model, tokenizer, "evaluation")
        score = measure.perplexity(model, windows)
        found = {"perplexity": score.perplexity} | _costs(model)
    else:
        try:
            whole, tokenizer = _load(asked, original)
        except (LookupError, OSError) as error:
            raise LookupError(f"the original cannot be loaded: {error} Name it with --original.") from error
        _check_original(facts, whole, original)
        windows = _windows(asked, whole, tokenizer, "evaluation")
        reference, costs = measure.Reference.of(whole, windows), _costs(whole, prefix="original_")
        del whole  # the reference keeps its head: two models are never whole in memory
        model, _ = _load(asked, asked.model)
        found = _compared(measure.compare(model, reference)) | _costs(model) | costs
    print(repr(windows))
    _print_measured(found)
    found |= {"model": asked.model, "original": original, "dtype": str(model.dtype).removeprefix("torch.")}
    return found | _text(windows), 0


def bench(asked) -> tuple[dict, int]:
    """Steps timed and predicted, of the model and of its shape with fewer heads; nothing is calibrated."""
    from . import sizes, throughput, zoo
    from .plan import Plan

    throughput.check(asked.context, asked.batch)
    config = zoo.config(asked.model)
    plans, source = [Plan(kv_heads=heads) for heads in asked.kv_heads], sizes.source_of(config)
    blocks = ", blocks" if any(plan.block(source) for plan in plans) else ""
    plans = {f"{plan.kv_heads} heads{blocks}": plan for plan in plans}
    _print_sizes(asked, config, *(sizes.planned(config, plan) for plan in plans.values()))
    model, _ = _load(asked, asked.model)
    models = {"model": model} | {name: throughput.shaped(model, plan) for name, plan in plans.items()}
    found = throughput.sweep(models, asked.context, asked.batch, asked.cache)
    print(throughput.table(found))
    return {"model": asked.model} | found, 0


def generate(asked) -> tuple[dict, int]:
    """Greedy continuation."""
    from . import zoo
    from .activations import quiet

    if asked.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {asked.max_new_tokens}; it must be at least 1")
    _print_sizes(asked, zoo.config(asked.model))
    model, tokenizer = _load(asked, asked.model)
    ids = tokenizer(asked.prompt, return_tensors="pt").to(model.device)
    if not ids["input_ids"].numel():
        raise ValueError("the text has no tokens: give a word or more")
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with quiet(model):
        grown = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=asked.max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
        )
    new = grown[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    print(asked.prompt + text)
    return {"model": asked.model, "prompt": asked.prompt, "text": text, "new_tokens": len(new)}, 0


# ---------------------------------------------------------------------------------------------------------
# What several commands do


def _load(asked, name: str):
    from . import zoo

    return zoo.load(name, dtype=asked.dtype, device=asked.device, offload=asked.offload)


def _calibrated(asked, model, windows, basis: str, kept: Path):
    """Moments. Under torchrun all processes calibrate, and process 0 alone goes on from here."""
    from . import calibration

    alone = asked.processes is None
    calibrate = calibration.calibrate if alone else asked.processes.calibrate
    moments = calibrate(model, windows, attention=basis, path=kept)
    if not alone:
        asked.processes.leave()
        if asked.processes.rank:
            raise SystemExit(0)
    return moments


@contextlib.contextmanager
def _kept_beside(out: Path):
    """The file that a long run is kept in until its folder is written; it stays when the run is stopped."""
    kept = out.with_name(out.name + ".resume")
    if kept.exists():
        print(f"going on from {kept}")
    try:
        yield kept
    except BaseException:  # Ctrl-C too
        if kept.exists():
            print(f"kept for when the same command is given again: {kept}", file=sys.stderr)
        raise
    kept.unlink(missing_ok=True)


def _windows(asked, model, tokenizer, split: str, count: int | None = None):
    """Windows that the model can read."""
    from . import evaluate, text

    made = text.windows(tokenizer, asked.windows if count is None else count, asked.length, split, asked.text)
    evaluate.checked_ids(model, made)
    return made


def _text(windows) -> dict:
    count, length = windows.ids.shape
    return {"text": windows.text, "windows": count, "length": length, "fingerprint": windows.fingerprint}


def _costs(model, original=None, prefix: str = "") -> dict:
    """Parameters and bytes of cache per token, as a run has them."""
    from . import evaluate

    found = {
        f"{prefix}parameters": model.num_parameters(),
        f"{prefix}cache_bytes_per_token": evaluate.cached_bytes(model),
    }
    return found if original is None else found | _costs(original, prefix="original_")


def _compared(comparison) -> dict:
    return {
        "perplexity": comparison.score.perplexity,
        "original_perplexity": comparison.original.perplexity,
        "perplexity_ratio": comparison.ratio,
        "kl": comparison.divergence,
        "agreement": comparison.agreement,
    }


def _check_original(facts: dict, model, name: str) -> None:
    """Say when `model` is not the one that the compressed model was made from."""
    from .moments import Source

    made_from, here = facts.get("source"), vars(Source.of(model))
    if made_from and made_from != here:
        print(
            f"kvteach: {name!r} is not bit for bit the model that this one was made from; the comparison goes on",
            file=sys.stderr,
        )


def _print_sizes(asked, config, *planned) -> None:
    """Parameters, and bytes of weights and cache per token, from the config: before anything is loaded."""
    from . import sizes

    width = _width(asked, config)
    rows = [("model", sizes.of(config))] + [("planned", one) for one in planned]
    for name, found in rows:
        print(
            f"{name + ':':<8} {found.parameters / 1e6:.2f} M parameters, "
            f"{_bytes(found.parameters * width)} of weights, {found.cached * width} bytes of cache for each token",
            flush=True,
        )


def _print_needs(asked, config, plan, small_sizes) -> None:
    """Memory and disk that an offloaded conversion takes."""
    from copy import deepcopy

    from . import cost, sizes
    from .bases import reads

    one, width = deepcopy(config), _width(asked, config)
    one.num_hidden_layers = 1  # embeddings, head and one layer: as much of each model as is held at a time
    weights = (sizes.of(one).parameters + sizes.planned(one, plan).parameters) * width
    # Twice while they grow; three times where they are moved: as they were, further on, and both together.
    copies, kinds = 2 if plan.basis == "blockwise" else 3, reads(plan.basis, sizes.source_of(config).rotates)
    moments = copies * cost.moments_bytes(cost.Shape.from_config(config), kinds)["sums"]
    print(
        f"needed:  {_bytes(weights)} of memory for weights, at most {_bytes(moments)} for moments, "
        f"{_bytes(small_sizes.parameters * width)} on disk",
        flush=True,
    )


def _width(asked, config) -> int:
    """Bytes of a weight."""
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return BYTES.get(stored if asked.dtype == "auto" else asked.dtype, 4)


def _print_measured(found: dict) -> None:
    for name, value in found.items():
        print(f"{name:<30} {format(value, '.4g') if isinstance(value, float) else value}")


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Major and minor version: 2.13.0+cpu -> (2, 13)."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split("+")[0].split(".")[:2])
