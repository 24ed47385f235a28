"""Checks of chapter 0: bytes of a cache, the context that fits, and the work that stays."""

from itertools import combinations_with_replacement
from math import isclose

from . import check, expect, number

__all__ = ["attention_flops", "kv_bytes", "longest_context"]


@check("Exercise 0.1")
def kv_bytes(answer):
    """``answer(layers, query_heads, kv_heads, head_dim, tokens, bytes_per_number)`` -> bytes."""
    case = dict(layers=3, query_heads=22, kv_heads=2, head_dim=5, tokens=7, bytes_per_number=4)
    right = 2 * 3 * 2 * 5 * 7 * 4
    value = number(answer(**case), "kv_bytes(...)")
    mistakes = {
        1 / 2: "keys and values are both cached, so a factor 2 is missing",
        1 / 4: "these are numbers, not bytes: multiply by bytes_per_number",
        11: "this counts query heads: queries are not cached, only the kv_heads keys and values are",
        13 / 2: "this counts query heads beside keys and values: queries are not cached",
        8: "these are bits: a byte has 8 of them",
        1 / 7: "this is the cache of one token: multiply by tokens",
        1 / 3: "this is one layer: every layer has a cache of its own",
        1 / 5: "a key is a vector of head_dim numbers",
        1 / 2**20: "these are MiB: give bytes",
        1 / 1e6: "these are MB: give bytes",
    }
    _name(value / right, mistakes)
    expect(value == right, f"for {_words(case)} the cache has {right} bytes, yours says {value:g}")
    case["bytes_per_number"] = 1
    value = number(answer(**case), "kv_bytes(...)")
    expect(value == right / 4, f"with bytes_per_number = 1 it has {right // 4} bytes, yours says {value:g}")


@check("Exercise 0.2")
def longest_context(answer):
    """``answer(memory_gb, weight_bytes, bytes_per_token, batch)`` -> whole tokens a sequence may have."""
    case = dict(memory_gb=24, weight_bytes=13_400_000_000, bytes_per_token=520_000, batch=3)
    room = 24 * 10**9 - 13_400_000_000
    right = room // (3 * 520_000)
    value = number(answer(**case), "longest_context(...)")
    mistakes = {
        (24 * 2**30 - 13_400_000_000) / (3 * 520_000): "this takes GB for GiB: here a GB is 10⁹ bytes, "
        "and 2³⁰ bytes are a GiB",
        24e9 / (3 * 520_000): "the weights take memory too: subtract weight_bytes first",
        room / 520_000: "this fits one sequence: the sequences of a batch share the room",
        3 * room / 520_000: "a larger batch leaves less room for each sequence: divide by it",
    }
    for wrong, sentence in mistakes.items():
        expect(abs(value - wrong) > 1, sentence)
    expect(
        not isclose(value, room / (3 * 520_000)), "half a token does not exist: round down to a whole number"
    )
    expect(value != right + 1, "rounded up, the last token no longer fits: round down")
    expect(value == right, f"for {_words(case)} it is {right} tokens, yours says {value:g}")
    case["weight_bytes"] = 25 * 10**9
    value = number(answer(**case), "longest_context(...)")
    expect(value == 0, f"when the weights alone fill the memory, 0 tokens fit, yours says {value:g}")


@check("Exercise 0.3")
def attention_flops(answer):
    """``answer(query_heads, kv_heads, head_dim, cached)`` -> FLOPs of a new token in one layer."""
    case = dict(query_heads=6, kv_heads=2, head_dim=5, cached=11)
    right = 2 * 2 * 6 * 5 * 11
    value = number(answer(**case), "attention_flops(...)")
    mistakes = {
        1 / 3: "this counts kv_heads: shared keys save bytes, but every query head computes its own scores",
        1 / 2: "a factor 2 is missing: scores and weighted values are two products, "
        "and each multiplication comes with an addition",
        1 / 4: "two factors of 2 are missing: scores and weighted values are two products, "
        "and each multiplication comes with an addition",
        11: "this is a prefill: one new token meets every cached key once",
        1 / 11: "the new token meets every cached key: multiply by cached",
        2: "a factor 2 too many: two products, each 2 FLOPs for every pair of numbers, make 4",
    }
    _name(value / right, mistakes)
    expect(value == right, f"for {_words(case)} it is {right} FLOPs, yours says {value:g}")


def _name(ratio: float, mistakes: dict[float, str]) -> None:
    """Say which mistake, or which two together, change the right answer by `ratio`."""
    for one, sentence in mistakes.items():
        expect(not isclose(ratio, one), sentence)
    for one, two in combinations_with_replacement(mistakes, 2):
        both = f"{mistakes[one]}; and {mistakes[two]}"
        expect(one == two or isclose(one * two, 1) or not isclose(ratio, one * two), both)


def _words(case: dict) -> str:
    return ", ".join(f"{name} = {value}" for name, value in case.items())
