"""Checks of chapter 5: what a smaller cache can bring, from bytes and from two measurements."""

import math

from . import check, expect, number


@check("Exercise 5.1")
def bound(answer) -> None:
    """``bound(weights, cache, share)``: (W + C) / (W + C · g / h)."""
    value = number(answer(weights=12.0, cache=24.0, share=0.25), "bound(weights, cache, share)")
    expect(value != 4, "1 / share would need weights that shrink with the cache: they are read whole")
    expect(not math.isclose(value, 0.5), "this is the time that is left: turn it round")
    expect(math.isclose(value, 2), f"36 bytes before and 18 after make 2, yours is {value:g}")
    value = number(answer(weights=10.0, cache=0.0, share=0.25), "bound(weights, cache, share)")
    expect(math.isclose(value, 1), f"without a cache nothing gets faster: 1, yours is {value:g}")


@check("Exercise 5.2")
def batch(answer) -> None:
    """``batch(weights, cache, share, wanted)``: the smallest batch whose bound is `wanted`, or None."""
    for wanted in (5, 4):
        expect(
            answer(weights=12.0, cache=1.0, share=0.25, wanted=wanted) is None,
            "four times faster with a quarter of the cache would need weights of no bytes: return None for 4 and above",
        )
    call = "batch(weights, cache, share, wanted)"
    value = number(answer(weights=12.0, cache=1.0, share=0.25, wanted=2), call)
    expect(value != 12, "12 sequences make the cache as large as the weights, where the bound is 24 / 15")
    expect(value == 24, f"(12 + 24) / (12 + 6) = 2, so 24 sequences, yours is {value:g}")
    value = number(answer(weights=12.0, cache=5.5, share=0.25, wanted=2), call)
    expect(not 4 <= value < 5, "a batch is a whole number, and 4 sequences are not enough: round up")
    expect(value == 5, f"24 / 5.5 sequences, rounded up, are 5, yours is {value:g}")
    value = number(answer(weights=12.0, cache=5.5, share=0.25, wanted=1), call)
    expect(value == 1, f"not to get slower is wanted, which every batch does: 1, yours is {value:g}")


@check("Exercise 5.3")
def ceiling(answer) -> None:
    """``ceiling(x1, t1, x2, t2)``: (a + b) / a of the line T = a + b x through both points."""
    call = "ceiling(x1, t1, x2, t2)"
    value = number(answer(x1=1.0, t1=0.9, x2=0.25, t2=0.3), call)
    expect(not math.isclose(value, 3), "t1 / t2 is the speed-up at x2; without a cache x is 0")
    expect(not math.isclose(value, 1 / 9), "this is the time that is left: turn it round")
    expect(not math.isclose(value, 8), "(a + b) / a, not b / a: the whole cache takes a as well")
    expect(math.isclose(value, 9), f"b = 0.6 / 0.75 = 0.8, a = 0.1, so 0.9 / 0.1 = 9, yours is {value:g}")
    value = number(answer(x1=0.5, t1=0.5, x2=0.25, t2=0.3), call)
    expect(math.isclose(value, 9), f"neither point need be the whole cache: still 9, yours is {value:g}")
