"""The long table of chapter 4: what each basis loses at each size of the cache. `make table` writes book/data/bases.json.

Each row is one model, compressed once and compared with the original on the same windows. A row that is in the file is
not computed again, and the file is replaced in one move after each row, so the run can be stopped at any moment. The
rows are in order of importance, for who cannot wait. Delete the file to start anew.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kvteach import Plan, compress, sequential, text, zoo
from kvteach.bases import METHODS
from kvteach.calibration import calibrate
from kvteach.evaluate import Reference, cached_bytes, compare

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "book" / "data" / "bases.json"
TOKENS = 32 * 512  # of calibration, whatever the length of its windows
THREADS = 2  # the last digits of a sum depend on how many threads share it


@dataclass(frozen=True)
class Case:
    """What a row is about: all but the result.

    Attributes
    ----------
    basis : a name of `kvteach.bases.METHODS`, ``sequential`` or ``original``.
    text, length, windows : what the model is compared on: the first windows of the evaluation side.
    calibrated : length of the calibration windows, always of pydoc-topics and `TOKENS` in all.
    reach : positions that the bases are made for; None for keys in blocks, whose bases hold at all.
    """

    model: str
    basis: str
    kv_heads: int | None = None
    kv_ratio: float | None = None
    text: str = "pydoc-topics"
    length: int = 512
    windows: int = 16
    calibrated: int = 512
    reach: int | None = 512


def cases() -> list[Case]:
    """All rows, the most important first."""
    found, minis = [], ("mini-llama", "mini-bloom")
    for model in minis:
        found.append(Case(model, "original"))
        found += [case for heads in (4, 2, 1) for case in _pooled(model, heads)]
    found += _smol()
    long = {"length": 2048, "windows": 4}
    for model in minis:
        found.append(Case(model, "original", **long))
        found += _pooled(model, 2, **long) + _pooled(model, 2, **long, calibrated=2048)
    return found


def _pooled(model: str, heads: int, calibrated: int = 512, **asked) -> list[Case]:
    """All bases that the model can hold: without RoPE there is nothing to commute with, and no block."""
    return [
        Case(
            model,
            basis,
            heads,
            **asked,
            calibrated=calibrated,
            reach=None if basis == "blockwise" else calibrated,
        )
        for basis in METHODS
        if model != "mini-bloom" or not basis.startswith(("commuting", "blockwise"))
    ]


def _smol() -> list[Case]:
    """SmolLM2. What one model is asked stands together: it is compressed once."""
    name = "smollm2-135m"
    short, other = {}, {"text": "stdlib-docstrings"}
    long, longest = {"length": 2048, "windows": 6}, {"length": 8192, "windows": 2}
    everywhere = (short, other, long, longest)
    found = [Case(name, "original", **asked) for asked in everywhere]

    def add(bases, ratios, asked, **calibrated) -> None:
        for ratio in ratios:
            for basis in bases:
                rows = [Case(name, basis, kv_ratio=ratio, **calibrated, **one) for one in asked]
                found.extend(row for row in rows if row not in found)

    for ratio in (0.5, 0.33, 0.25, 0.67):
        asked = everywhere if ratio == 0.5 else (short, other, long)
        add(("sequential", "blockwise"), (ratio,), everywhere, reach=None)
        add(("attention-weighted",), (ratio,), asked, reach=2048)
        add(("activation-svd",), (ratio,), (short, other))
        add(("attention-weighted",), (ratio,), (short,))
    for basis in ("attention-weighted", "activation-svd", "commuting-attended"):
        add((basis,), (0.5,), (short, long, longest))
    add(("attention-weighted",), (0.5,), (short, long, longest), reach=2048, calibrated=2048)
    add(("attention-weighted",), (0.5,), (short, long, longest), reach=8192)
    every = ("score-weighted", "weight-svd", "commuting", "commuting-attended")
    add(every, (0.5, 0.33, 0.67, 0.25), (short,))
    pooled = ("mean-pool", "procrustes", "commuting-stock")
    found += [Case(name, basis, kv_heads=1) for basis in pooled]
    return found


@functools.lru_cache(maxsize=1)
def _load(model: str):
    return zoo.load(model, device="cpu")


@functools.lru_cache(maxsize=1)
def _moments(name: str, length: int):
    """Calibrated once, kept in _build."""
    model, tokenizer = _load(name)
    path = ROOT / "_build" / "moments" / f"{name}-{length}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return calibrate(model, text.windows(tokenizer, TOKENS // length, length), attention=True, path=path)


@functools.lru_cache(maxsize=4)
def _reference(name: str, source: str, length: int, count: int):
    """The original's side, and the fingerprint of the windows."""
    model, tokenizer = _load(name)
    windows = text.windows(tokenizer, count, length, "evaluation", source)
    return Reference.of(model, windows), windows.fingerprint


@functools.lru_cache(maxsize=1)
def _compressed(name: str, basis: str, kv_heads, kv_ratio, calibrated: int, reach):
    model, tokenizer = _load(name)
    if basis == "original":
        return model
    rotates = zoo.config(name).model_type == "llama"
    dial = {"kv_heads": kv_heads, "kv_ratio": kv_ratio, "reach": reach if rotates else None}
    if basis == "sequential":
        windows = text.windows(tokenizer, TOKENS // calibrated, calibrated)
        return sequential.compress(model, windows, Plan(**dial))
    return compress(model, _moments(name, calibrated), Plan(**dial, basis=basis))


def result(case: Case) -> dict:
    """The case and what was measured: the row as it stands in the file."""
    start = time.perf_counter()
    _, tokenizer = _load(case.model)
    reference, fingerprint = _reference(case.model, case.text, case.length, case.windows)
    small = _compressed(case.model, case.basis, case.kv_heads, case.kv_ratio, case.calibrated, case.reach)
    found = compare(small, reference)
    read = text.windows(tokenizer, TOKENS // case.calibrated, case.calibrated)
    return dataclasses.asdict(case) | {
        "ratio": found.ratio,
        "ratio_error": found.ratio_error,
        "kl": found.divergence,
        "agreement": found.agreement,
        "perplexity": found.score.perplexity,
        "bytes_per_token": cached_bytes(small),
        "fingerprint": fingerprint,
        "calibration_fingerprint": read.fingerprint,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.date.today().isoformat(),
    }


def made_with() -> dict:
    """Where the rows come from. Nothing is drawn at random, so there is no seed."""
    versions = {name: importlib.metadata.version(name) for name in ("kvteach", "torch", "transformers")}
    return {
        "python": platform.python_version(),
        **versions,
        "device": "cpu",
        "calibration": f"pydoc-topics, {TOKENS} tokens",
        "seed": None,
        "bytes_per_number": 4,
    }


def write(rows: list[dict]) -> None:
    """Replace the file in one move."""
    FILE.parent.mkdir(exist_ok=True)
    beside = FILE.with_suffix(".new")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    beside.write_text(f'{{"made with": {json.dumps(made_with())},\n "rows": [\n{lines}\n]}}\n', "utf-8")
    beside.replace(FILE)


def of(row: dict) -> Case:
    """The case that a row belongs to."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def main() -> None:
    """Compute what is missing."""
    torch.set_num_threads(THREADS)
    os.environ["TQDM_DISABLE"] = "1"
    rows = json.loads(FILE.read_text("utf-8"))["rows"] if FILE.exists() else []
    done = {of(row) for row in rows}
    for case in cases():
        if case not in done:
            rows.append(result(case))
            write(rows)
            print(f"{rows[-1]['ratio']:10.3f} {rows[-1]['seconds']:6.1f} s  {case}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped: the rows that were finished are kept.")
