"""Import time: seconds from a new Python until a name can be used; each the median of processes of its own."""

import subprocess
import sys
import time
from statistics import median

NAMES = ("kvteach", "kvteach.cost", "kvteach.svd", "kvteach.cli", "kvteach.convert", "kvteach.throughput")


def measure(turns: int = 5) -> dict:
    """The empty process is what Python takes itself."""
    codes = {"nothing": ""} | {name: f"import {name}" for name in NAMES}
    spent = {name: [] for name in codes}
    for _ in range(turns):
        for name, code in codes.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            spent[name].append(time.perf_counter() - start)
    found = {name: median(each) for name, each in spent.items()}
    for name, seconds in found.items():
        print(f"{name:<20} {seconds:.3f} s")
    return found
