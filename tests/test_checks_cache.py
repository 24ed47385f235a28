"""Chapter 2's checks: the right answer passes, every likely mistake gets its own sentence."""

import pytest
import torch

from kvteach.checks import Mistake, cache


def right_stream(state, x):
    count, total, gram = state
    x = x.double()
    return count + len(x), total + x.sum(0), gram + x.T @ x


RIGHT = {
    cache.rows: lambda x: x.transpose(1, 2).flatten(0, 1).flatten(1),
    cache.stream: right_stream,
    cache.covariance: lambda count, total, gram: gram / count - (total / count).outer(total / count),
    cache.kept: lambda psi, gram: (psi @ gram @ psi.T).trace() / gram.trace(),
}


def on_stream(change):
    def wrong(state, x):
        count, total, gram = right_stream(state, x)
        return change(state, x, count, total, gram)

    return wrong


WRONG = [
    (cache.rows, lambda x: x.reshape(8, 15), "transpose first"),
    (cache.rows, lambda x: x.permute(0, 2, 3, 1).reshape(8, 15), "interleaved"),
    (cache.rows, lambda x: x.flatten(0, 2), r"should have shape \(8, 15\), it has \(24, 5\)"),
    (cache.rows, lambda x: x.permute(2, 0, 1, 3).reshape(8, 15), "alternate"),
    (cache.rows, lambda x: RIGHT[cache.rows](x).flip(0), "row 0 should be token 0"),
    (cache.rows, lambda x: RIGHT[cache.rows](x)[[0, 2, 1, 3, 4, 5, 6, 7]], "another row"),
    (cache.stream, on_stream(lambda s, x, n, t, g: g), "return the three sums"),
    (cache.stream, on_stream(lambda s, x, n, t, g: (s[0] + 1, t, g)), "not the calls"),
    (cache.stream, on_stream(lambda s, x, n, t, g: (len(x), t, g)), "count should be 16"),
    (cache.stream, on_stream(lambda s, x, n, t, g: (n, t, s[2] + x @ x.T)), "not xxᵀ"),
    (cache.stream, on_stream(lambda s, x, n, t, g: (n, t, x.double().T @ x.double())), "last batch only"),
    (
        cache.stream,
        on_stream(lambda s, x, n, t, g: (n, t, s[2] + (g - s[2]) / len(x))),
        "averaged each batch",
    ),
    (cache.stream, on_stream(lambda s, x, n, t, g: (n, x.sum(0), g)), "total should be the sum"),
    (cache.stream, on_stream(lambda s, x, n, t, g: (n, t, 2 * g)), "gram should be the sum"),
    (
        cache.stream,
        on_stream(lambda s, x, n, t, g: (n, t, s[2] + (x.T @ x).double())),
        "float32, which rounds",
    ),
    (cache.covariance, lambda n, t, g: g / n, "the mean is still in it"),
    (cache.covariance, lambda n, t, g: g / n - t.outer(t), "total is a sum, not a mean"),
    (cache.covariance, lambda n, t, g: g / n - t.outer(t) / n, "count²"),
    (cache.covariance, lambda n, t, g: g - t.outer(t) / n, "divide by count"),
    (cache.covariance, lambda n, t, g: (g - t.outer(t) / n) / (n - 1), "count − 1"),
    (cache.covariance, lambda n, t, g: g, "it should be 1; yours gives 10"),
    (cache.kept, lambda p, g: torch.linalg.eigvalsh(g)[-2:].sum() / g.trace(), "use psi"),
    (cache.kept, lambda p, g: (p @ g @ p.T).trace(), "divide by the whole energy"),
    (cache.kept, lambda p, g: ((p @ g @ p.T).trace() / g.trace()) ** 0.5, "no root"),
    (cache.kept, lambda p, g: 1 - (p @ g @ p.T).trace() / g.trace(), "share that is lost"),
    (cache.kept, lambda p, g: 0.5, "yours says 0.500"),
    (cache.stream, lambda s, x: None, "is empty"),
    (cache.stream, on_stream(lambda s, x, n, t, g: (n, s[1] + x.sum(0), g)), "float32, which rounds"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_answers_pass(check):
    assert check(RIGHT[check])
    assert "✓" in repr(check(RIGHT[check]))
    assert check(lambda *given: RIGHT[check](*given), strict=True)


def test_sums_may_be_changed_in_place():
    def stream(state, x):
        count, total, gram = state
        total += x.double().sum(0)
        gram += x.double().T @ x.double()
        return [count + len(x), total, gram]

    assert cache.stream(stream)


@pytest.mark.parametrize("check, answer, sentence", WRONG)
def test_wrong_answers_are_told_apart(check, answer, sentence):
    with pytest.raises(Mistake, match=sentence):
        check(answer, strict=True)
    assert not check(answer, strict=False)


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("nothing", [lambda *given: None, lambda *given: float("nan"), lambda *given: 1 / 0])
def test_no_answer_is_no_traceback(check, nothing):
    result = check(nothing)
    assert not result
    assert result.message
