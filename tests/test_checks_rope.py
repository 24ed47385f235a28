"""Chapter 3's checks: the right answer passes, every likely mistake gets its own sentence."""

import pytest
import torch

from kvteach import rope
from kvteach.checks import Mistake
from kvteach.checks import rope as checks


def blocks(alpha, beta, gamma, delta):
    top, bottom = [torch.diag(alpha), torch.diag(beta)], [torch.diag(gamma), torch.diag(delta)]
    return torch.cat([torch.cat(top, 1), torch.cat(bottom, 1)])


def parts(matrix):
    half = len(matrix) // 2
    rows = matrix[:half], matrix[half:]
    return [side.diagonal() for row in rows for side in (row[:, :half], row[:, half:])]


def nearest(matrix):
    aa, ab, ba, bb = parts(matrix)
    return blocks((aa + bb) / 2, (ab - ba) / 2, (ba - ab) / 2, (aa + bb) / 2)


def flops(tokens, h, g, d, r):
    return tokens * (2 * r * g * d + 2 * h * d)


def mean(gram, theta, count):
    turns = [rope.rotation(s, theta) for s in range(count)]
    return sum(turn.T @ gram @ turn for turn in turns) / count


def mean_first(gram, theta, count):
    turn = sum(rope.rotation(s, theta) for s in range(count)) / count
    return turn.T @ gram @ turn


def neighbours(x, positions, theta):
    pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous())  # (0, 1), (2, 3), …
    angles = -positions[:, None] * theta
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


RIGHT = {
    checks.unrotate: lambda x, p, theta: rope.rotate(x, -p, theta),
    checks.nearest: nearest,
    checks.rebuild_flops: flops,
    checks.over_positions: mean,
}


def on_parts(change):
    return lambda matrix: blocks(*change(*parts(matrix)))


WRONG = [
    (checks.unrotate, rope.rotate, "turned on"),
    (checks.unrotate, lambda x, p, theta: x, "nothing has turned"),
    (checks.unrotate, lambda x, p, theta: rope.rotate(x, -torch.arange(len(x)), theta), "counted the rows"),
    (checks.unrotate, neighbours, "paired neighbours"),
    (checks.unrotate, lambda x, p, theta: rope.rotate(x, -p - 1, theta), "position 0 has not turned"),
    (checks.unrotate, lambda x, p, theta: x * (1 + p[:, None]), "keeps the length"),
    (checks.unrotate, lambda x, p, theta: rope.rotate(x, -p, theta.flip(0)), "angles are not"),
    (checks.nearest, on_parts(lambda aa, ab, ba, bb: (aa, ab, ba, bb)), "as it is"),
    (
        checks.nearest,
        on_parts(lambda aa, ab, ba, bb: ((aa + bb) / 2, 0 * ab, 0 * ba, (aa + bb) / 2)),
        "only stretch",
    ),
    (checks.nearest, on_parts(lambda aa, ab, ba, bb: (aa, 0 * ab, 0 * ba, bb)), "one common factor"),
    (checks.nearest, lambda m: nearest(m).T, "wrong sign"),
    (checks.nearest, lambda m: 2 * nearest(m), "twice too large"),
    (checks.nearest, on_parts(lambda aa, ab, ba, bb: (aa, ab, -ab, aa)), "not the closest: average"),
    (checks.nearest, lambda m: m, "between two frequencies"),
    (checks.nearest, lambda m: nearest(m) / 2, "not the closest yet"),
    (checks.rebuild_flops, lambda *a: flops(*a) / 2, "2 FLOPs"),
    (checks.rebuild_flops, lambda tokens, *a: flops(1, *a), "one cached token"),
    (checks.rebuild_flops, lambda tokens, h, g, d, r: tokens * 2 * r * g * d, "meet the queries"),
    (checks.rebuild_flops, lambda tokens, h, g, d, r: tokens * 2 * h * d, "on top"),
    (checks.rebuild_flops, lambda tokens, h, g, d, r: tokens * 2 * h * r, "never rebuild"),
    (checks.rebuild_flops, lambda tokens, h, g, d, r: tokens * 2 * g * d * (r + 1), "every query head"),
    (checks.rebuild_flops, lambda tokens, h, g, d, r: tokens * 2 * h * d * (r + 1), "g heads, not h"),
    (checks.rebuild_flops, lambda *a: 7, "yours is 7"),
    (checks.over_positions, lambda g, t, n: n * mean(g, t, n), "that is the sum"),
    (checks.over_positions, lambda g, t, n: mean(g, -t, n), "backwards"),
    (checks.over_positions, lambda g, t, n: rope.over_positions(g, t, 1, n + 1), "start at 0"),
    (checks.over_positions, lambda g, t, n: g, "nothing has turned"),
    (checks.over_positions, mean_first, "averaged the rotations first"),
    (
        checks.over_positions,
        lambda g, t, n: sum(g @ rope.rotation(s, t) for s in range(n)) / n,
        "both sides",
    ),
    (checks.over_positions, lambda g, t, n: mean(g, t, n) / 3, "keeps the trace"),
    (checks.over_positions, lambda g, t, n: mean(g, t.flip(0), n), "the trace is right"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_answers_pass(check):
    assert check(RIGHT[check], strict=True)


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_empty_answers_are_told_so(check):
    with pytest.raises(Mistake, match="is empty"):
        check(lambda *given: ..., strict=True)


@pytest.mark.parametrize("check, answer, sentence", WRONG)
def test_wrong_answers_are_told_apart(check, answer, sentence):
    with pytest.raises(Mistake, match=sentence):
        check(answer, strict=True)


def test_the_nearest_matrix_is_the_nearest():
    """The solution of exercise 3.2 commutes, and no step within the commuting matrices leads closer."""
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, rest = nearest(matrix), matrix - nearest(matrix)
    assert rope.commutator(found, checks.THETA) < 1e-14
    other = nearest(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    assert abs(float((rest * other).sum())) < 1e-12
