"""What streaming the moments costs, in time and memory.

Time: plain forward passes and `calibration.calibrate` on the same windows, turn by turn in one process, so that a
noisy machine slows both alike; the ratio of each pair is what counts. "body" is the forward pass without the
language-model head, which is what calibration runs. "stored" keeps every key and value and takes the SVD of each
layer's matrix of them; "streamed" is calibration and the eigenvectors of what it leaves: the same basis.
Memory: the peak of a process of its own for each number of windows.
"""

import argparse
import resource
import subprocess
import sys
import time
from statistics import median

import torch

from kvteach import activations, calibration, text, zoo


def timed(action) -> float:
    """Seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@torch.no_grad()
def speed(windows: int, pairs: int) -> dict:
    """Tokens per second of each way, and the median ratio of times to the plain forward pass."""
    model, tokenizer = zoo.load("smollm2-135m")
    ids = text.windows(tokenizer, windows).ids.to(model.device)
    ways = {
        "plain forward": lambda: [model(row, use_cache=False) for row in ids.split(1)],
        "body": lambda: [model.base_model(row, use_cache=False) for row in ids.split(1)],
        "calibrate": lambda: calibration.calibrate(model, ids, progress=False),
        "calibrate, attention": lambda: calibration.calibrate(model, ids, attention=True, progress=False),
        "streamed": lambda: streamed(model, ids),
        "stored": lambda: stored(model, ids),
    }
    for way in ways.values():  # warm up
        way()
    runs = [{name: timed(way) for name, way in ways.items()} for _ in range(pairs)]
    return {
        name: {
            "tokens_per_second": round(ids.numel() / median(run[name] for run in runs)),
            "time_ratio_to_plain": round(median(run[name] / run["plain forward"] for run in runs), 3),
        }
        for name in ways
    }


def streamed(model, ids) -> None:
    """Moments, and the eigenvectors of each layer's keys and values."""
    moments = calibration.calibrate(model, ids, progress=False)
    for kind in ("keys_post", "values"):
        torch.linalg.eigh(moments.gram[kind])


def stored(model, ids) -> None:
    """Every key and value kept, then the right singular vectors of each layer's matrix [tokens, width]."""
    kept = [activations.record(model, row) for row in ids.split(1)]
    for layer in range(len(kept[0])):
        for kind in ("keys_post", "values"):
            rows = [getattr(window[layer], kind)[0].transpose(0, 1).flatten(1) for window in kept]
            torch.linalg.svd(torch.cat(rows).double(), full_matrices=False)


def peak_megabytes(windows: int) -> int:
    """Peak resident memory of a process that calibrates on `windows` windows of 512 tokens (0: only loads)."""
    command = [sys.executable, __file__, str(windows)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(windows: int = 4, pairs: int = 5) -> dict:
    """Tokens per second of each way, and peak memory by windows."""
    found = {"speed": speed(windows, pairs)}
    for name, row in found["speed"].items():
        print(
            f"{name:22s} {row['tokens_per_second']:6d} tokens/s, time {row['time_ratio_to_plain']:.2f} of plain"
        )
    found["peak_megabytes"] = {count: peak_megabytes(count) for count in (0, 8, 32)}
    for count, megabytes in found["peak_megabytes"].items():
        print(f"peak memory, {count:3d} windows: {megabytes} MB")
    return found


if __name__ == "__main__":  # for `peak_megabytes`
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("windows", type=int, help="to calibrate on; prints the peak memory in MB")
    count = parser.parse_args().windows
    model, tokenizer = zoo.load("smollm2-135m")
    if count:
        calibration.calibrate(model, text.windows(tokenizer, count), progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
