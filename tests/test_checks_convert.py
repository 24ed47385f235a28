"""Chapter 4's checks: the right answer passes, every likely mistake gets its own sentence."""

import pytest
import torch

from kvteach.checks import Mistake, convert

RIGHT = {
    convert.query: lambda w, d, i: w @ d[:, 4 * i : 4 * i + 4].T,
    convert.output: lambda w, d, i: d[:, 4 * i : 4 * i + 4] @ w,
    convert.decoder: lambda g, e, c: torch.linalg.inv(e.T @ g @ e) @ e.T @ g[:, c],
}
WRONG = [
    (convert.query, lambda w, d, i: w @ d[:, :4].T, "block of head 0"),
    (convert.query, lambda w, d, i: w @ d[:, i::3].T, "side by side"),
    (convert.query, lambda w, d, i: -RIGHT[convert.query](w, d, i), "another matrix"),
    (convert.query, lambda w, d, i: RIGHT[convert.query](w, d, i).T, "should have shape"),
    (convert.output, lambda w, d, i: d[:, :4] @ w, "block of head 0"),
    (convert.output, lambda w, d, i: -RIGHT[convert.output](w, d, i), "another matrix"),
    (convert.output, lambda w, d, i: ..., "is empty"),
    (convert.query, lambda w, d, i: None, "is empty"),
    (convert.decoder, lambda g, e, c: torch.linalg.pinv(e)[:, c], "the moments are not in it"),
    (convert.decoder, lambda g, e, c: e.T @ g[:, c], "divide by their moments"),
    (convert.decoder, lambda g, e, c: e.T[:, c], "only when its columns are orthonormal"),
    (convert.decoder, lambda g, e, c: -RIGHT[convert.decoder](g, e, c), "another D reads"),
    (convert.decoder, lambda g, e, c: torch.linalg.inv(e.T @ g @ e) @ e[c].T @ g[c, c], "take all rows of G"),
    (convert.output, lambda w, d, i: d[:, i::3] @ w, "side by side"),
    (convert.decoder, lambda g, e, c: ..., "is empty"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_answers_pass(check):
    assert check(RIGHT[check], strict=True)


@pytest.mark.parametrize("check, answer, sentence", WRONG)
def test_wrong_answers_are_told_apart(check, answer, sentence):
    with pytest.raises(Mistake, match=sentence):
        check(answer, strict=True)
