"""What streaming the moments costs, in time and memory: `python tests/benchmarks/calibration.py`.

Time: plain forward passes and `calibration.calibrate` on the same windows, turn by turn in one process, so that a
noisy machine slows both alike; the ratio of each pair is what counts. "body" is the forward pass without the
language-model head, which is what calibration runs.
Memory: the peak of a process of its own for each number of windows. The last line is one JSON document.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch

from kvteach import calibration, env, text, zoo


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


def peak_megabytes(windows: int) -> int:
    """Peak resident memory of a process that calibrates on `windows` windows of 512 tokens (0: only loads)."""
    command = [sys.executable, __file__, "--only-calibrate", str(windows)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print a table for people and JSON for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens per timed run")
    parser.add_argument("--pairs", type=int, default=5, help="timed runs of each way")
    parser.add_argument("--only-calibrate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_calibrate is not None:
        model, tokenizer = zoo.load("smollm2-135m")
        if options.only_calibrate:
            calibration.calibrate(model, text.windows(tokenizer, options.only_calibrate), progress=False)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    found = {"speed": speed(options.windows, options.pairs)}
    for name, row in found["speed"].items():
        print(
            f"{name:22s} {row['tokens_per_second']:6d} tokens/s, time {row['time_ratio_to_plain']:.2f} of plain"
        )
    found["peak_megabytes"] = {windows: peak_megabytes(windows) for windows in (0, 8, 128)}
    for windows, megabytes in found["peak_megabytes"].items():
        print(f"peak memory, {windows:3d} windows: {megabytes} MB")
    found["environment"] = env.report().splitlines()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
