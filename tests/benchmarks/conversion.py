"""Conversion of `mini-llama` and SmolLM2: seconds by part, the median of a few turns; calibration is apart."""

import time
from statistics import median

from kvteach import Plan, calibration, compress, sequential, text, zoo

CASES = {"mini-llama": Plan(kv_heads=2), "smollm2-135m": Plan(kv_ratio=0.5)}
WINDOWS = 4


def seconds(action, turns: int = 3) -> float:
    """Median of a few turns."""
    spent = []
    for _ in range(turns):
        start = time.perf_counter()
        action()
        spent.append(time.perf_counter() - start)
    return median(spent)


def measure() -> dict:
    """Seconds of compress with moments at hand, and of one sequential conversion, text included."""
    found = {}
    for name, plan in CASES.items():
        model, tokenizer = zoo.load(name, device="cpu")
        windows = text.windows(tokenizer, WINDOWS)
        moments = calibration.calibrate(model, windows, attention=True, progress=False)
        after = Plan(kv_heads=plan.kv_heads, kv_ratio=plan.kv_ratio, sequential=True)
        found[name] = {
            "compress": seconds(lambda: compress(model, moments, plan, progress=False)),  # noqa: B023
            "sequential": seconds(lambda: sequential.compress(model, windows, after), turns=1),  # noqa: B023
            "tokens": windows.ids.numel(),
        }
        print(
            f"{name}: compress {found[name]['compress']:.2f} s, sequential {found[name]['sequential']:.1f} s for "
            f"{found[name]['tokens']} tokens"
        )
    return found
