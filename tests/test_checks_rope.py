"""Chapter 3's checks: the right answer passes, every likely mistake gets its own sentence."""

import pytest
import torch

from kvteach.checks import Mistake
from kvteach.checks import rope as checks
from kvteach.rope import over_positions, rotate, rotation


def parts(m):
    """The entries of every pair's 2×2 block: aa, ab, ba, bb."""
    half = len(m) // 2
    return [m[i : i + half, j : j + half].diagonal() for i in (0, half) for j in (0, half)]


def blocks(a, b, c, d):
    a, b, c, d = (torch.diag(part) for part in (a, b, c, d))
    return torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)])


def right_nearest(m, scale=0.5, sign=1):
    aa, ab, ba, bb = parts(m)
    alpha, beta = scale * (aa + bb), sign * scale * (ab - ba)
    return blocks(alpha, beta, -beta, alpha)


def neighbours(x, positions, theta):
    return rotate(x[:, [0, 2, 4, 1, 3, 5]], -positions, theta)[:, [0, 3, 1, 4, 2, 5]]


def mean_first(gram, theta, count):
    mean = sum(rotation(s, theta) for s in range(count)) / count
    return mean.T @ gram @ mean


RIGHT = {
    checks.unrotate: lambda x, positions, theta: rotate(x, -positions, theta),
    checks.nearest: right_nearest,
    checks.rebuild_flops: lambda l, h, g, d, r: l * (2 * r * g * d + 2 * h * d),  # noqa: E741
    checks.over_positions: lambda gram, theta, count: over_positions(gram, theta, 0, count),
}

WRONG = [
    (checks.unrotate, lambda x, p, t: rotate(x, p, t), "by the same angle once more"),
    (checks.unrotate, lambda x, p, t: x, "nothing has turned"),
    (checks.unrotate, lambda x, p, t: rotate(x, -torch.arange(len(x)), t), "you counted the rows"),
    (checks.unrotate, neighbours, "you paired neighbours"),
    (checks.unrotate, lambda x, p, t: rotate(x, -p, t) + 1, "must stay as it is"),
    (checks.unrotate, lambda x, p, t: rotate(x, -p, t) * (1 + p[:, None]), "keeps the length"),
    (checks.unrotate, lambda x, p, t: rotate(x, -p, t**2), "lengths are right, angles are not"),
    (checks.nearest, lambda m: blocks(*parts(m)), "as it is"),
    (checks.nearest, lambda m: right_nearest(m) * torch.eye(len(m)), "you only stretch"),
    (checks.nearest, lambda m: blocks(*parts(m)) * torch.eye(len(m)), "one common factor"),
    (checks.nearest, lambda m: right_nearest(m, sign=-1), "wrong sign"),
    (checks.nearest, lambda m: right_nearest(m, scale=1), "twice too large"),
    (checks.nearest, lambda m: blocks(*parts(m)[:2], -parts(m)[1], parts(m)[0]), "not the closest: average"),
    (checks.nearest, lambda m: m, "between two frequencies"),
    (checks.nearest, lambda m: 0 * m, "not the closest that commutes"),
    (checks.rebuild_flops, lambda l, h, g, d, r: l * (r * g * d + h * d), "are 2 FLOPs"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: 2 * r * g * d + 2 * h * d, "one cached token"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * r * g * d, "meet the queries"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * h * d, "what full keys cost"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * h * r, "never rebuild"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * (r * g * d + g * d), "every query head"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * (r * h * d + h * d), "g heads, not h"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * (r * g * d + h * r), "not the latent"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * (r * g * d + 2 * h * d), "scores only"),  # noqa: E741
    (checks.rebuild_flops, lambda l, h, g, d, r: l * 2 * (r * d + h * d), "of all g heads"),  # noqa: E741
    (checks.rebuild_flops, lambda *given: 7, "yours is 7"),
    (checks.over_positions, lambda g, t, n: over_positions(g, t, 0, n) * n, "that is the sum"),
    (checks.over_positions, lambda g, t, n: over_positions(g, -t, 0, n), "you turned backwards"),
    (checks.over_positions, lambda g, t, n: over_positions(g, t, 1, n + 1), "positions start at 0"),
    (checks.over_positions, lambda g, t, n: over_positions(g, t, 0, n + 1), "one position too many"),
    (checks.over_positions, lambda g, t, n: g, "nothing has turned"),
    (checks.over_positions, mean_first, "averaged the rotations first"),
    (
        checks.over_positions,
        lambda g, t, n: sum(g @ rotation(s, t) for s in range(n)) / n,
        "R stands on both sides",
    ),
    (checks.over_positions, lambda g, t, n: over_positions(g, t, 0, n) + torch.eye(6), "keeps the trace"),
    (checks.over_positions, lambda g, t, n: over_positions(g, t**2, 0, n), "the trace is right"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_answers_pass(check):
    assert check(RIGHT[check])
    assert check(lambda *given: RIGHT[check](*given), strict=True)


@pytest.mark.parametrize("check, answer, sentence", WRONG)
def test_wrong_answers_are_told_apart(check, answer, sentence):
    with pytest.raises(Mistake, match=sentence):
        check(answer, strict=True)
    assert not check(answer, strict=False)


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("nothing", [lambda *given: None, lambda *given: float("nan"), lambda *given: 1 / 0])
def test_no_answer_is_no_traceback(check, nothing):
    result = check(nothing)
    assert not result and result.message
