"""Checks of chapter 5: what a smaller cache can bring, what a way of reading it moves, and what two steps tell."""

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
def moved(answer) -> None:
    """``moved(t, way)``: bytes that a step moves over those of the cache with all heads: 1/t, 1/t + 2, 3/t."""
    for t in (4, 8):
        value = number(answer(t, "folded"), f'moved({t}, "folded")')
        expect(
            value != 1, "folded, all query heads read the few cached heads as they are: less than all heads"
        )
        expect(
            math.isclose(value, 1 / t), f"one cached head for {t} query heads: 1 / {t}, yours is {value:g}"
        )
        value = number(answer(t, "repeated"), f'moved({t}, "repeated")')
        expect(not math.isclose(value, 1), "attention reads all heads, but they have been written before")
        expect(not math.isclose(value, 2), "the few heads are read as well, to be repeated")
        expect(not math.isclose(value, 1 + 1 / t), "the repeated heads are written, and then read: twice")
        expect(
            math.isclose(value, 1 / t + 2),
            f"few read, all written, all read: 1 / {t} + 2, yours is {value:g}",
        )
        value = number(answer(t, "growing"), f'moved({t}, "growing")')
        expect(not math.isclose(value, 1 / t), "the old cache is copied before attention reads the new one")
        expect(not math.isclose(value, 2 / t), "a copy is a read and a write, and then attention reads")
        expect(value != 3, "only the few cached heads are copied")
        expect(math.isclose(value, 3 / t), f"read, written, read: 3 / {t}, yours is {value:g}")


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
