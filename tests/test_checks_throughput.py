"""Chapter 5's checks: the right answer passes, every likely mistake gets its own sentence."""

import math

import pytest

from kvteach.checks import Mistake, throughput


def right_batch(weights, cache, share, wanted):
    if wanted * share >= 1:
        return None
    return max(1, math.ceil(weights * (wanted - 1) / (cache * (1 - wanted * share))))


def right_ceiling(x1, t1, x2, t2):
    b = (t1 - t2) / (x1 - x2)
    return 1 + b / (t1 - b * x1)


RIGHT = {
    throughput.bound: lambda weights, cache, share: (weights + cache) / (weights + share * cache),
    throughput.batch: right_batch,
    throughput.ceiling: right_ceiling,
}
WRONG = [
    (throughput.bound, lambda weights, cache, share: 1 / share, "they are read whole"),
    (
        throughput.bound,
        lambda weights, cache, share: (weights + cache) / (share * (weights + cache)),
        "they are read whole",
    ),
    (
        throughput.bound,
        lambda weights, cache, share: (weights + share * cache) / (weights + cache),
        "turn it round",
    ),
    (throughput.bound, lambda weights, cache, share: 2, "without a cache nothing gets faster"),
    (throughput.batch, lambda weights, cache, share, wanted: 24, "return None"),
    (
        throughput.batch,
        lambda weights, cache, share, wanted: None if wanted >= 4 else math.ceil(weights / cache),
        "as large as the weights",
    ),
    (
        throughput.batch,
        lambda weights, cache, share, wanted: (
            None if wanted >= 4 else int(weights * (wanted - 1) / (cache * (1 - wanted * share)))
        ),
        "round up",
    ),
    (
        throughput.batch,
        lambda weights, cache, share, wanted: (
            None if wanted >= 4 else math.ceil(weights * (wanted - 1) / (cache * (1 - wanted * share)))
        ),
        "which every batch does",
    ),
    (
        throughput.batch,
        lambda weights, cache, share, wanted: (
            None if wanted >= 4 else round(weights * (wanted - 1) / (cache * (1 - wanted * share)))
        ),
        "round up",
    ),
    (
        throughput.batch,
        lambda weights, cache, share, wanted: math.ceil(
            weights * (wanted - 1) / (cache * (1 - wanted * share))
        ),
        "return None",
    ),
    (throughput.ceiling, lambda x1, t1, x2, t2: 1 / right_ceiling(x1, t1, x2, t2), "turn it round"),
    (throughput.ceiling, lambda x1, t1, x2, t2: t1 / t2, "without a cache x is 0"),
    (throughput.ceiling, lambda x1, t1, x2, t2: right_ceiling(x1, t1, x2, t2) - 1, "not b / a"),
    (throughput.ceiling, lambda x1, t1, x2, t2: 9 if x1 == 1 else 8.5, "neither point need be"),
    (throughput.bound, lambda weights, cache, share: None, "is empty"),
    (throughput.ceiling, lambda x1, t1, x2, t2: ..., "is empty"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_answers_pass(check):
    assert check(RIGHT[check], strict=True)


@pytest.mark.parametrize("check, answer, sentence", WRONG)
def test_wrong_answers_are_told_apart(check, answer, sentence):
    with pytest.raises(Mistake, match=sentence):
        check(answer, strict=True)
