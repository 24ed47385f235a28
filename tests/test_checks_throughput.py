"""Chapter 5's checks: the right answer passes, every likely mistake gets its own sentence."""

import pytest

from kvteach.checks import Mistake, throughput


def right_moved(t, way):
    return {"folded": 1 / t, "repeated": 1 / t + 2, "growing": 3 / t}[way]


def wrong_moved(**other):
    """A right answer but for one way."""
    return lambda t, way: other[way](t) if way in other else right_moved(t, way)


def right_ceiling(x1, t1, x2, t2):
    b = (t1 - t2) / (x1 - x2)
    return 1 + b / (t1 - b * x1)


RIGHT = {
    throughput.bound: lambda weights, cache, share: (weights + cache) / (weights + share * cache),
    throughput.moved: right_moved,
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
    (throughput.moved, wrong_moved(folded=lambda t: 1), "as they are"),
    (throughput.moved, wrong_moved(folded=lambda t: 1 / 4), "1 / 8, yours is 0.25"),
    (throughput.moved, wrong_moved(repeated=lambda t: 1), "have been written before"),
    (throughput.moved, wrong_moved(repeated=lambda t: 2), "the few heads are read as well"),
    (throughput.moved, wrong_moved(repeated=lambda t: 1 + 1 / t), "and then read: twice"),
    (throughput.moved, wrong_moved(repeated=lambda t: t), "few read, all written, all read"),
    (throughput.moved, wrong_moved(growing=lambda t: 1 / t), "is copied before"),
    (throughput.moved, wrong_moved(growing=lambda t: 2 / t), "a read and a write"),
    (throughput.moved, wrong_moved(growing=lambda t: 3), "only the few"),
    (throughput.moved, wrong_moved(growing=lambda t: 4 / t), "read, written, read"),
    (throughput.moved, lambda t, way: None, "is empty"),
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
