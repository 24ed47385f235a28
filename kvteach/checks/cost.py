"""Checks of chapter 0: bytes of a cache, the context that fits, the work that stays, the speed bytes allow.

The sizes in each test are chosen so that no two mistakes give the same number.
"""

from itertools import combinations
from math import inf, isclose

from . import check, expect, number

__all__ = ["attention_flops", "kv_bytes", "longest_context", "tokens_for_speedup"]


@check("Exercise 0.1")
def kv_bytes(answer):
    """``answer(layers, query_heads, kv_heads, head_dim, tokens, bytes_per_number)`` -> bytes."""
    case = dict(layers=7, query_heads=39, kv_heads=3, head_dim=11, tokens=17, bytes_per_number=5)
    right = 2 * 7 * 3 * 11 * 17 * 5
    value = number(answer(**case), "kv_bytes(...)")
    fixed = "bytes_per_number is an argument: do not put in the bytes of one format"
    mistakes = {
        1 / 2: "keys and values are both cached, so a factor 2 is missing",
        1 / 5: "these are numbers, not bytes: multiply by bytes_per_number",
        2 / 5: fixed,
        4 / 5: fixed,
        13: "this counts query heads: queries are not cached, only the kv_heads keys and values are",
        (39 + 2 * 3) / (2 * 3): "this counts query heads beside keys and values: queries are not cached",
        39: "this multiplies query heads by key-value heads: only the kv_heads keys and values are cached",
        13 / 3: "this takes the heads of a group, query_heads / kv_heads: kv_heads is the count to use",
        1 / 3: "this is one head: each of the kv_heads has a key and a value of its own",
        8: "these are bits: a byte has 8 of them",
        1 / 8: "bytes_per_number counts bytes already: do not divide by 8",
        1 / 17: "this is the cache of one token: multiply by tokens",
        1 / 7: "this is one layer: every layer has a cache of its own",
        1 / 11: "a key is a vector of head_dim numbers",
    }
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    _name(
        value / right, mistakes | {1 / size: f"these are {unit}: give bytes" for unit, size in units.items()}
    )
    expect(value == right, f"for {_words(case)} the cache has {right} bytes, yours says {value:g}")
    case["bytes_per_number"] = 1
    value = number(answer(**case), "kv_bytes(...)")
    expect(value == right / 5, f"with bytes_per_number = 1 it has {right // 5} bytes, yours says {value:g}")


@check("Exercise 0.2")
def longest_context(answer):
    """``answer(memory_gb, weight_bytes, bytes_per_token, batch)`` -> whole tokens a sequence may have."""
    case = dict(memory_gb=80, weight_bytes=13_400_000_000, bytes_per_token=520_000, batch=3)
    memory, weights, each = 80 * 10**9, 13_400_000_000, 3 * 520_000
    room = memory - weights
    right = room // each
    value = number(answer(**case), "longest_context(...)")
    expect(
        value > 0,
        "no token fits, yours says: memory_gb counts GB and the weights count bytes. "
        "A GB is 10⁹ bytes, so multiply memory_gb by it before you subtract",
    )
    mistakes = {
        (80 * 2**30 - weights) / each: "this takes GB for GiB: here a GB is 10⁹ bytes, "
        "and 2³⁰ bytes are a GiB",
        memory / each: "the weights take memory too: subtract weight_bytes first",
        (memory - 3 * weights) / each: "the weights are stored once, however many sequences run: "
        "do not multiply them by batch",
        (memory + weights) / each: "the weights take room away: subtract them, do not add them",
        room / 520_000: "this fits one sequence: the sequences of a batch share the room",
        3 * room / 520_000: "a larger batch leaves less room for each sequence: divide by it",
        room / 3: "these are bytes for each sequence: divide by bytes_per_token to get tokens",
        room: "these are the bytes that are left: divide by what one token of every sequence takes",
    }
    for wrong, sentence in mistakes.items():
        expect(abs(value - wrong) > 1, sentence)
    expect(not isclose(value, room / each), "half a token does not exist: round down to a whole number")
    expect(value != right + 1, "rounded up, the last token no longer fits: round down")
    expect(value == right, f"for {_words(case)} it is {right} tokens, yours says {value:g}")
    case["weight_bytes"] = 81 * 10**9
    value = number(answer(**case), "longest_context(...)")
    expect(value == 0, f"when the weights alone fill the memory, 0 tokens fit, yours says {value:g}")


@check("Exercise 0.3")
def attention_flops(answer):
    """``answer(query_heads, kv_heads, head_dim, cached)`` -> FLOPs of a new token in one layer."""
    case = dict(query_heads=35, kv_heads=5, head_dim=11, cached=13)
    right = 2 * 2 * 35 * 11 * 13
    value = number(answer(**case), "attention_flops(...)")
    mistakes = {
        (35 + 5) / (2 * 35): "one half counts kv_heads: each query head computes its own scores "
        "and its own sum of values",
        1 / 2: "a factor 2 is missing: scores and weighted values are two products, "
        "and each multiplication comes with an addition",
        1 / 7: "this counts kv_heads: shared keys save bytes, but every query head computes its own scores",
        1 / 4: "two factors of 2 are missing: scores and weighted values are two products, "
        "and each multiplication comes with an addition",
        2: "a factor 2 too many: two products, each 2 FLOPs for every pair of numbers, make 4",
        5: "query heads and key-value heads are not multiplied: each query head meets one key head only",
        1 / 5: "query heads are not divided by key-value heads: that is one group, and all groups compute",
        14 / 13: "this adds a key for the new token: here cached counts the new token's own key already",
        (21 * 13 + 11 * 25)
        / (4 * 11 * 13): "a sum of n products has n − 1 additions, true, but a FLOP count "
        "takes n: 2 FLOPs for every multiplication",
        1 / 35: "this is one query head: every one of them computes scores and sums",
        1 / 11: "a dot product of two vectors takes head_dim multiplications",
        13: "this is a prefill: one new token meets every cached key once",
        1 / 13: "the new token meets every cached key: multiply by cached",
    }
    _name(value / right, mistakes)
    expect(value == right, f"for {_words(case)} it is {right} FLOPs, yours says {value:g}")


@check("Exercise 0.4")
def tokens_for_speedup(answer):
    """``answer(weight_bytes, bytes_per_token, share, speedup)`` -> whole tokens in flight, or infinity."""
    name = "tokens_for_speedup(...)"
    case = dict(weight_bytes=13_400_000_000, bytes_per_token=520_000, share=0.25, speedup=3)
    ratio = 13_400_000_000 / 520_000  # tokens whose cache is as large as the weights
    found = answer(**case)
    expect(
        not _infinite(found),
        f"for {_words(case)} yours says that no number of tokens is enough. share is what stays of the cache, "
        "and with very many tokens a step would be 1 / share = 4 times faster",
    )
    value = number(found, name)
    expect(
        value >= 0, "tokens below zero: share is what stays of the cache, and the old step is the longer one"
    )
    mistakes = {
        0: "0 tokens? The new step still reads all the weights: the speed-up multiplies them too",
        2 * ratio / 0.75: "the new step reads its smaller cache too: the speed-up multiplies it as well",
        3 * ratio / 0.25: "the old step reads the weights too: they stand on both sides",
        ratio: "this is where cache and weights are equal: no speed-up is in it yet",
    }
    for wrong, sentence in mistakes.items():
        expect(abs(value - wrong) > 1, sentence)
    exact = 8 * ratio
    expect(not isclose(value, exact, rel_tol=1e-9), "half a token does not exist: round up to a whole number")
    expect(value != int(exact), "at that many tokens the speed-up is a little too small: round up")
    right = int(exact) + 1
    expect(value == right, f"for {_words(case)} it is {right} tokens, yours says {value:g}")
    for speedup in (4, 5):
        try:
            found = answer(**case | {"speedup": speedup})
        except ZeroDivisionError:
            found = "a division by zero"
        expect(
            _infinite(found),
            f"with share = 0.25 even a step without any weights is 4 times faster at most: "
            f"for speedup = {speedup} the answer is infinity, yours is {found}",
        )
    value = number(answer(**case | {"speedup": 1}), name)
    expect(value == 0, f"speedup = 1 is what every cache has: 0 tokens are enough, yours says {value:g}")


def _name(ratio: float, mistakes: dict[float, str]) -> None:
    """Say which mistake, or which two together, change the right answer by `ratio`."""
    for one, sentence in mistakes.items():
        expect(not isclose(ratio, one), sentence)
    for one, two in combinations(mistakes, 2):
        both = f"{mistakes[one]}; and {mistakes[two]}"
        expect(isclose(one * two, 1) or not isclose(ratio, one * two), both)


def _infinite(value) -> bool:
    return isinstance(value, float) and value == inf


def _words(case: dict) -> str:
    return ", ".join(f"{name} = {value}" for name, value in case.items())
