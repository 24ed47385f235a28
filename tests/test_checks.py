"""Every check of chapters 0 and 1: the right answer passes, and each likely mistake gets its own sentence."""

import numpy as np
import pytest

from kvteach import cost, svd
from kvteach.checks import Mistake
from kvteach.checks import cost as check_cost
from kvteach.checks import svd as check_svd


def bytes_of(layers, query_heads, kv_heads, head_dim, tokens, bytes_per_number):
    return 2 * layers * kv_heads * head_dim * tokens * bytes_per_number


def context(memory_gb, weight_bytes, bytes_per_token, batch):
    return max(0, (memory_gb * 10**9 - weight_bytes) // (batch * bytes_per_token))


def flops_of(query_heads, kv_heads, head_dim, cached):
    return 4 * query_heads * head_dim * cached


def tokens_of(weight_bytes, bytes_per_token, share, speedup):
    left = 1 - speedup * share
    return int(np.ceil((speedup - 1) * weight_bytes / (bytes_per_token * left))) if left > 0 else np.inf


def found_by_search(weight_bytes, bytes_per_token, share, speedup):
    """The same by bisection, as somebody might who does not want to solve for it."""

    def fast(tokens):
        old, new = bytes_per_token * tokens, share * bytes_per_token * tokens
        return weight_bytes + old >= speedup * (weight_bytes + new)

    low, high = -1, 10**15
    while fast(high) and high - low > 1:
        low, high = ((low + high) // 2, high) if not fast((low + high) // 2) else (low, (low + high) // 2)
    return high if fast(high) else float("inf")


def printed(*args, **kwargs):
    print(1)


def factors(A):
    return np.linalg.svd(A, full_matrices=False)


def truncated(A, r):
    U, s, Vt = factors(A)
    return (U[:, :r] * s[:r]) @ Vt[:r]


def eigenvectors(K):
    return np.linalg.eigh(K.T @ K)[1]


def from_counts(count):
    """The largest rank whose `count(m, n, r)` stays below the numbers of the matrix."""
    return lambda m, n: max((r for r in range(1, min(m, n) + 1) if count(m, n, r) < m * n), default=0)


RIGHT = [
    (check_cost.kv_bytes, bytes_of),
    (
        check_cost.kv_bytes,
        lambda layers, query_heads, kv_heads, head_dim, tokens, bytes_per_number: cost.cache_bytes(
            cost.Shape(layers, 1, query_heads, kv_heads, head_dim, 1, 1), tokens, 1, bytes_per_number
        ),
    ),
    (check_cost.longest_context, context),
    (check_cost.attention_flops, flops_of),
    (
        check_cost.attention_flops,
        lambda query_heads, kv_heads, head_dim, cached: cost.flops(
            cost.Shape(1, 1, query_heads, kv_heads, head_dim, 1, 1), cached=cached - 1
        )["attention"],
    ),
    (check_cost.tokens_for_speedup, tokens_of),
    (check_cost.tokens_for_speedup, found_by_search),
    (check_svd.energy_kept, lambda s, r: np.sum(s[:r] ** 2) / np.sum(s**2)),
    (check_svd.energy_kept, lambda s, r: svd.energy(s**2)[r]),
    (check_svd.truncate, truncated),
    (check_svd.largest_rank, svd.break_even_rank),
    (check_svd.largest_rank, from_counts(lambda m, n, r: r * (m + n + 1))),
    (check_svd.basis, lambda K, r: eigenvectors(K)[:, ::-1][:, :r].T),
    (check_svd.basis, lambda K, r: -eigenvectors(K)[:, -r:].T),
    (check_svd.basis, lambda K, r: svd.truncated_svd(K, r)[2]),
]

WRONG = [
    # Exercise 0.1
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / 2, "keys and values are both cached"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / c["bytes_per_number"], "not bytes"),
    (
        check_cost.kv_bytes,
        lambda **c: bytes_of(**c | {"kv_heads": c["query_heads"]}),
        "this counts query heads:",
    ),
    (
        check_cost.kv_bytes,
        lambda **c: bytes_of(**c | {"kv_heads": c["kv_heads"] + c["query_heads"] / 2}),
        "beside keys and values",
    ),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) * 8, "these are bits"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c | {"tokens": 1}), "the cache of one token"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c | {"layers": 1}), "this is one layer"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c | {"head_dim": 1}), "vector of head_dim numbers"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / 2**20, "these are MiB"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / 10**6, "these are MB"),
    (
        check_cost.kv_bytes,
        lambda **c: bytes_of(**c | {"kv_heads": c["query_heads"]}) / 2,
        "so a factor 2 is missing; and this counts query heads",
    ),
    (
        check_cost.kv_bytes,
        lambda **c: bytes_of(**c | {"bytes_per_number": 5}),
        "with bytes_per_number = 1",
    ),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c | {"bytes_per_number": 2}), "the bytes of one format"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c | {"bytes_per_number": 4}), "the bytes of one format"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / 8, "counts bytes already"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c | {"kv_heads": 1}), "this is one head"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) * c["query_heads"], "multiplies query heads by"),
    (
        check_cost.kv_bytes,
        lambda **c: bytes_of(**c | {"kv_heads": c["query_heads"] // c["kv_heads"]}),
        "the heads of a group",
    ),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / 1000, "these are kB"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) / 2**30, "these are GiB"),
    (check_cost.kv_bytes, lambda **c: bytes_of(**c) + 1, "the cache has 39270 bytes, yours says 39271"),
    # Exercise 0.2
    (check_cost.longest_context, lambda **c: context(**c | {"memory_gb": 80 * 2**30 / 10**9}), "GB for GiB"),
    (check_cost.longest_context, lambda **c: context(**c | {"weight_bytes": 0}), "subtract weight_bytes"),
    (check_cost.longest_context, lambda **c: context(**c | {"batch": 1}), "share the room"),
    (check_cost.longest_context, lambda **c: context(**c | {"batch": 1 / c["batch"]}), "leaves less room"),
    (check_cost.longest_context, lambda **c: (80e9 - c["weight_bytes"]) / 1.56e6, "half a token"),
    (check_cost.longest_context, lambda **c: context(**c) + 1, "round down"),
    (
        check_cost.longest_context,
        lambda memory_gb, weight_bytes, bytes_per_token, batch: (
            (memory_gb * 10**9 - weight_bytes) // (batch * bytes_per_token)
        ),
        "0 tokens fit",
    ),
    (check_cost.longest_context, lambda **c: 17, "it is 42692 tokens, yours says 17"),
    (
        check_cost.longest_context,
        lambda **c: context(**c | {"memory_gb": 80 / 10**9}),
        "multiply memory_gb by it",
    ),
    (
        check_cost.longest_context,
        lambda **c: (c["memory_gb"] - c["weight_bytes"]) // (c["batch"] * c["bytes_per_token"]),
        "multiply memory_gb by it",
    ),
    (
        check_cost.longest_context,
        lambda **c: context(**c | {"weight_bytes": c["weight_bytes"] / 1e9, "memory_gb": 80 / 10**9}),
        "multiply memory_gb by it",
    ),
    (
        check_cost.longest_context,
        lambda **c: context(**c | {"weight_bytes": c["batch"] * c["weight_bytes"]}),
        "the weights are stored once",
    ),
    (
        check_cost.longest_context,
        lambda **c: context(**c | {"weight_bytes": -c["weight_bytes"]}),
        "do not add them",
    ),
    (
        check_cost.longest_context,
        lambda **c: context(**c | {"bytes_per_token": 1}),
        "bytes for each sequence",
    ),
    (
        check_cost.longest_context,
        lambda **c: context(**c | {"bytes_per_token": 1, "batch": 1}),
        "these are the bytes that are left",
    ),
    # Exercise 0.3
    (
        check_cost.attention_flops,
        lambda **c: flops_of(**c | {"query_heads": c["kv_heads"]}),
        "this counts kv_heads",
    ),
    (check_cost.attention_flops, lambda **c: flops_of(**c) / 2, "a factor 2 is missing"),
    (check_cost.attention_flops, lambda **c: flops_of(**c) / 4, "two factors of 2 are missing"),
    (check_cost.attention_flops, lambda **c: flops_of(**c) * c["cached"], "this is a prefill"),
    (check_cost.attention_flops, lambda **c: flops_of(**c | {"cached": 1}), "multiply by cached"),
    (check_cost.attention_flops, lambda **c: flops_of(**c) * 2, "a factor 2 too many"),
    (
        check_cost.attention_flops,
        lambda **c: flops_of(**c | {"query_heads": c["kv_heads"]}) / 2,
        "with an addition; and this counts kv_heads",
    ),
    (
        check_cost.attention_flops,
        lambda **c: flops_of(**c | {"query_heads": c["query_heads"] * c["kv_heads"]}),
        "query heads and key-value heads are not multiplied",
    ),
    (
        check_cost.attention_flops,
        lambda **c: flops_of(**c | {"query_heads": c["query_heads"] // c["kv_heads"]}),
        "query heads are not divided",
    ),
    (
        check_cost.attention_flops,
        lambda **c: flops_of(**c | {"query_heads": (c["query_heads"] + c["kv_heads"]) / 2}),
        "one half counts kv_heads",
    ),
    (
        check_cost.attention_flops,
        lambda **c: flops_of(**c | {"query_heads": (c["query_heads"] + c["kv_heads"]) / 2}) / 2,
        "its own sum of values; and a factor 2 is missing",
    ),
    (check_cost.attention_flops, lambda **c: flops_of(**c | {"cached": c["cached"] + 1}), "own key already"),
    (check_cost.attention_flops, lambda **c: flops_of(**c | {"query_heads": 1}), "this is one query head"),
    (check_cost.attention_flops, lambda **c: flops_of(**c | {"head_dim": 1}), "head_dim multiplications"),
    (
        check_cost.attention_flops,
        lambda query_heads, kv_heads, head_dim, cached: (
            query_heads * (cached * (2 * head_dim - 1) + head_dim * (2 * cached - 1))
        ),
        "n − 1 additions",
    ),
    (check_cost.attention_flops, lambda **c: 17, "it is 20020 FLOPs, yours says 17"),
    # Exercise 0.4
    (check_cost.tokens_for_speedup, lambda **c: np.inf, "no number of tokens is enough"),
    (check_cost.tokens_for_speedup, lambda **c: tokens_of(**c | {"share": 1 - c["share"]}), "what stays"),
    (
        check_cost.tokens_for_speedup,
        lambda weight_bytes, bytes_per_token, share, speedup: (
            (speedup - 1) * weight_bytes / (bytes_per_token * (1 - speedup * (1 - share)))
        ),
        "tokens below zero: share is what stays",
    ),
    (check_cost.tokens_for_speedup, lambda **c: 0, "still reads all the weights"),
    (
        check_cost.tokens_for_speedup,
        lambda weight_bytes, bytes_per_token, share, speedup: (
            (speedup - 1) * weight_bytes // (bytes_per_token * (1 - share))
        ),
        "reads its smaller cache too",
    ),
    (
        check_cost.tokens_for_speedup,
        lambda weight_bytes, bytes_per_token, share, speedup: (
            speedup * weight_bytes // (bytes_per_token * (1 - speedup * share))
        ),
        "the old step reads the weights too",
    ),
    (
        check_cost.tokens_for_speedup,
        lambda weight_bytes, bytes_per_token, share, speedup: weight_bytes // bytes_per_token,
        "cache and weights are equal",
    ),
    (
        check_cost.tokens_for_speedup,
        lambda weight_bytes, bytes_per_token, share, speedup: (
            (speedup - 1) * weight_bytes / (bytes_per_token * (1 - speedup * share))
        ),
        "half a token",
    ),
    (check_cost.tokens_for_speedup, lambda **c: tokens_of(**c) - 1, "a little too small: round up"),
    (check_cost.tokens_for_speedup, lambda **c: 17, "it is 206154 tokens, yours says 17"),
    (
        check_cost.tokens_for_speedup,
        lambda weight_bytes, bytes_per_token, share, speedup: int(
            np.ceil((speedup - 1) * weight_bytes / (bytes_per_token * (1 - speedup * share)))
        ),
        "for speedup = 4 the answer is infinity, yours is a division by zero",
    ),
    (
        check_cost.tokens_for_speedup,
        lambda **c: np.inf if c["speedup"] == 4 else tokens_of(**c | {"speedup": min(c["speedup"], 3)}),
        "for speedup = 5 the answer is infinity, yours is 206154",
    ),
    (
        check_cost.tokens_for_speedup,
        lambda **c: 1 if c["speedup"] == 1 else tokens_of(**c),
        "0 tokens are enough, yours says 1",
    ),
    # Exercise 1.1
    (check_svd.energy_kept, lambda s, r: s[:r].sum() / s.sum(), "the sum of their squares"),
    (check_svd.energy_kept, lambda s, r: s[r:].sum() / s.sum(), "of the lost ones"),
    (check_svd.energy_kept, lambda s, r: (s[r:] ** 2).sum() / (s**2).sum(), "share that is lost"),
    (check_svd.energy_kept, lambda s, r: 100 * (s[:r] ** 2).sum() / (s**2).sum(), "a percentage"),
    (check_svd.energy_kept, lambda s, r: (s[:r] ** 2).sum(), "divide it by the energy"),
    (check_svd.energy_kept, lambda s, r: np.linalg.norm(s[:r]) / np.linalg.norm(s), "no square root"),
    (check_svd.energy_kept, lambda s, r: (s[: r - 1] ** 2).sum() / (s**2).sum(), "keeps one value"),
    (check_svd.energy_kept, lambda s, r: (s[: r + 1] ** 2).sum() / (s**2).sum(), "keeps three values"),
    (check_svd.energy_kept, lambda s, r: 0.8, "all four values"),
    (check_svd.energy_kept, lambda s, r: 0.5, "it is 20/25 = 0.8, yours says 0.5"),
    # Exercise 1.2
    (check_svd.truncate, lambda A, r: A, "this is A itself"),
    (check_svd.truncate, lambda A, r: factors(A), "multiply the factors"),
    (check_svd.truncate, lambda A, r: truncated(A, r)[:r], "has 2 rows"),
    (
        check_svd.truncate,
        lambda A, r: (factors(A)[0][:, :r] * factors(A)[1][:r]) @ factors(A)[2][:, :r].T,
        "uses V where Vᵀ belongs",
    ),
    (
        check_svd.truncate,
        lambda A, r: (factors(A)[0][:, :r] * factors(A)[1][:r]) @ factors(A)[2].T[:r],
        "uses V where Vᵀ belongs",
    ),
    (
        check_svd.truncate,
        lambda A, r: factors(A)[0][:, :r] @ factors(A)[2][:r],
        "singular values are missing",
    ),
    (check_svd.truncate, lambda A, r: A - truncated(A, r), "keeps the smallest values"),
    (check_svd.truncate, lambda A, r: np.vstack([A[:r], 0 * A[r:]]), "cut the factors instead"),
    (check_svd.truncate, lambda A, r: np.hstack([A[:, :r], 0 * A[:, r:]]), "cut the factors instead"),
    (check_svd.truncate, lambda A, r: factors(A)[1][:r] * factors(A)[2][:r], "s is a vector"),
    (
        check_svd.truncate,
        lambda A, r: factors(A)[0][:, :r] @ factors(A)[1][:r] @ factors(A)[2][:r],
        "s is a vector",
    ),
    (
        check_svd.truncate,
        lambda A, r: factors(A)[0] @ factors(A)[1] @ factors(A)[2],
        "is a vector, it should have shape (4, 4). s is a vector: U * s",
    ),
    (check_svd.truncate, lambda A, r: factors(A)[0][:, :r] @ np.diag(factors(A)[1]), "U needs r columns"),
    (
        check_svd.truncate,
        lambda A, r: factors(A)[0][:, :r] @ (factors(A)[1] * factors(A)[2])[:r],
        "multiplies the columns of Vᵀ",
    ),
    (check_svd.truncate, lambda A, r: truncated(A, 1), "the best rank 2 by"),
    (check_svd.truncate, lambda A, r: truncated(A, r) if len(A) == 4 else A.T, "should have shape (6, 4)"),
    # Exercise 1.3
    (check_svd.largest_rank, lambda m, n: m * n / (m + n + 1), "round down"),
    (check_svd.largest_rank, from_counts(lambda m, n, r: r * (m + n)), "count the r singular values too"),
    (check_svd.largest_rank, from_counts(lambda m, n, r: r * (m + n + r)), "its diagonal"),
    (check_svd.largest_rank, from_counts(lambda m, n, r: r * (m + 1) + n * n), "only its first r rows"),
    (check_svd.largest_rank, min, "the largest rank there is"),
    (check_svd.largest_rank, lambda m, n: 1, "rank 1 is not the largest"),
    (check_svd.largest_rank, lambda m, n: m * n // (m + n + 1), "it must store fewer"),
    (check_svd.largest_rank, lambda m, n: max(1, svd.break_even_rank(m, n)), "so 0, yours says 1"),
    (check_svd.largest_rank, lambda m, n: 3, "is 17: 17 · 79 = 1343 < 1421, yours says 3"),
    (check_svd.largest_rank, lambda m, n: m * n // (m + n + 1) - 1, "rank 17 still saves"),
    (check_svd.largest_rank, lambda m, n: round(m * n / (m + n + 1)), "round down"),
    # Exercise 1.4
    (check_svd.basis, lambda K, r: eigenvectors(K)[:, -r:], "transpose them into rows"),
    (check_svd.basis, lambda K, r: factors(K.T)[2][:r], "use the small matrix"),
    (check_svd.basis, lambda K, r: eigenvectors(K)[:, :r].T, "sorts upwards"),
    (check_svd.basis, lambda K, r: eigenvectors(K)[-r:], "each of its columns is one eigenvector"),
    (check_svd.basis, lambda K, r: eigenvectors(K)[:r], "each of its columns is one eigenvector"),
    (check_svd.basis, lambda K, r: 2 * factors(K)[2][:r], "rows should have length 1, yours have 2.000"),
    (check_svd.basis, lambda K, r: factors(K)[2][[0, 0]], "should be orthogonal"),
    (check_svd.basis, lambda K, r: np.eye(4)[:r], "the best basis"),
    (check_svd.basis, lambda K, r: np.linalg.eigh(np.cov(K.T))[1][:, -r:].T, "takes the mean out first"),
    (check_svd.basis, lambda K, r: factors(K - K.mean(0))[2][:r], "takes the mean out first"),
]

CHECKS = [getattr(module, name) for module in (check_cost, check_svd) for name in module.__all__]


@pytest.mark.parametrize("check, answer", RIGHT)
def test_right_answers_pass(check, answer):
    result = check(answer)
    assert result, repr(result)
    assert repr(result).endswith(": passed")
    assert check(answer, strict=True)


@pytest.mark.parametrize("check, answer, sentence", WRONG)
def test_each_mistake_gets_its_sentence(check, answer, sentence):
    result = check(answer)
    assert not result
    assert sentence in result.message
    with pytest.raises(Mistake, match="Exercise"):
        check(answer, strict=True)


def raises(*args, **kwargs):
    raise KeyError("oops")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "answer, sentence",
    [
        (lambda *a, **k: None, "is empty: replace the ..."),
        (lambda *a, **k: ..., "is empty: replace the ..."),
        (printed, "to print it is not enough"),
        (lambda *a, **k: float("nan"), ("not a finite number", "should have shape")),
        (lambda *a, **k: "seven", ("should be a number", "should be an array of numbers")),
        (lambda *a, **k: np.zeros((3, 3, 3)), ("should be one number", "should have shape")),
        (raises, "your code stopped with KeyError"),
        (None, "your code stopped with TypeError"),
    ],
    ids=["none", "dots", "printed", "nan", "text", "cube", "raises", "no function"],
)
def test_nothing_useful_is_met_with_a_sentence(check, answer, sentence):
    result = check(answer)
    assert not result
    assert any(part in result.message for part in ((sentence,) if isinstance(sentence, str) else sentence))


@pytest.mark.parametrize("check", [check_svd.truncate, check_svd.basis])
def test_nan_inside_an_array_is_named(check):
    shape = (4, 4) if check is check_svd.truncate else (2, 4)
    assert "holds NaN or infinity" in check(lambda A, r: np.full(shape, np.nan)).message


def test_strict_by_environment(monkeypatch):
    monkeypatch.setenv("KVTEACH_STRICT", "1")
    with pytest.raises(Mistake, match=r"Exercise 1\.1"):
        check_svd.energy_kept(lambda s, r: 0)
    assert check_svd.energy_kept(lambda s, r: svd.energy(s**2)[r])
