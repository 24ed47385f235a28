"""Checks of chapter 3: turning back, what commutes, the price of rebuilding, the mean over positions.

Answers may be NumPy arrays or torch tensors; the checks hand out torch tensors.
"""

import numpy as np
import torch

from .. import rope
from . import array, check, expect, number

THETA = rope.frequencies(6, theta=50.0)  # three pairs


def _random(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@check("Exercise 3.1")
def unrotate(answer) -> None:
    """``unrotate(x, positions, theta)``: [tokens, d_h] after RoPE -> before it."""
    before, positions = _random(4, 6), torch.tensor([0, 1, 5, 30])
    after = rope.rotate(before, positions, THETA)
    found = array(answer(after.clone(), positions.clone(), THETA.clone()), (4, 6), "unrotate(...)")
    expect(
        not np.allclose(found, rope.rotate(after, positions, THETA)),
        "you turned on, by the same angle once more: turn by minus the angle",
    )
    expect(not np.allclose(found, after), "nothing has turned")
    expect(
        not np.allclose(found, rope.rotate(after, -torch.arange(4), THETA)),
        "you counted the rows: use the positions that came with them",
    )
    neighbours = rope.rotate(after[:, [0, 2, 4, 1, 3, 5]], -positions, THETA)[:, [0, 3, 1, 4, 2, 5]]
    expect(
        not np.allclose(found, neighbours),
        "you paired neighbours, (0, 1), (2, 3) …: LLaMA pairs f with f + d_h/2",
    )
    expect(np.allclose(found[0], before[0]), "the row at position 0 has not turned and must stay as it is")
    lengths = after.norm(dim=1).numpy()
    expect(
        np.allclose(np.linalg.norm(found, axis=1), lengths),
        "a rotation keeps the length of a row, yours does not: cosine and sine take the same sign of the angle",
    )
    expect(
        np.allclose(found, before), "lengths are right, angles are not: pair f turns by position × theta[f]"
    )


@check("Exercise 3.2")
def nearest(answer) -> None:
    """``nearest(M)``: the closest [d_h, d_h] that commutes with RoPE, pairs (f, f + d_h/2)."""
    matrix = _random(6, 6)
    found = array(answer(matrix.clone()), (6, 6), "nearest(M)")
    aa, ab = matrix[:3, :3].diagonal(), matrix[:3, 3:].diagonal()
    ba, bb = matrix[3:, :3].diagonal(), matrix[3:, 3:].diagonal()

    def blocks(*four) -> np.ndarray:
        a, b, c, d = (torch.diag(part) for part in four)
        return torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)]).numpy()

    alpha, beta = (aa + bb) / 2, (ab - ba) / 2
    expect(
        not np.allclose(found, blocks(aa, ab, ba, bb)),
        "you kept each pair's 2×2 block as it is: it must be a complex number, (α, β) over (−β, α)",
    )
    expect(
        not np.allclose(found, blocks(alpha, 0 * beta, 0 * beta, alpha)),
        "you only stretch: a turn within the pair, β, commutes as well",
    )
    expect(not np.allclose(found, blocks(aa, 0 * ab, 0 * ba, bb)), "a and b of a pair need one common factor")
    expect(
        not np.allclose(found, blocks(alpha, -beta, beta, alpha)),
        "β has the wrong sign: rows are (α, β) and (−β, α), and x stands on the left",
    )
    expect(
        not np.allclose(found, blocks(2 * alpha, 2 * beta, -2 * beta, 2 * alpha)),
        "that commutes, but is twice too large: the mean of the two entries that must agree, not their sum",
    )
    expect(
        not np.allclose(found, blocks(aa, ab, -ab, aa)),
        "that commutes, but is not the closest: average with the second row of each pair",
    )
    off = found - blocks(
        *(torch.as_tensor(found)[i : i + 3, j : j + 3].diagonal() for i in (0, 3) for j in (0, 3))
    )
    expect(
        np.allclose(off, 0),
        "something between two frequencies is left; pairs are (f, f + d_h/2), all else must be 0",
    )
    expect(
        np.allclose(found, blocks(alpha, beta, -beta, alpha)),
        "not the closest that commutes: α is the mean of the two diagonal entries of a pair's block, β half the "
        "difference of the other two; (β, β) beside the diagonal would mirror, so one of them needs a minus",
    )


@check("Exercise 3.3")
def rebuild_flops(answer) -> None:
    """``rebuild_flops(tokens, h, g, d_h, r)``: scores of one decoding step when keys are rebuilt."""
    tokens, h, g, d, r = 10, 6, 3, 4, 5
    value = number(answer(tokens, h, g, d, r), "rebuild_flops(...)")
    right = tokens * (2 * r * g * d + 2 * h * d)
    expect(value != right / 2, "one multiplication and its addition are 2 FLOPs")
    expect(
        value != right / tokens, "that is for one cached token: every one of them is rebuilt, at each step"
    )
    expect(value != tokens * 2 * r * g * d, "the rebuilt keys have still to meet the queries")
    expect(value != tokens * 2 * h * d, "that is what full keys cost: rebuilding them comes on top")
    expect(value != tokens * 2 * h * r, "that is the price of the other two ways, which never rebuild a key")
    expect(
        value != tokens * (2 * r * g * d + 2 * g * d),
        "every query head makes a score, not every key-value head",
    )
    expect(
        value != tokens * (2 * r * h * d + 2 * h * d),
        "a key is rebuilt once for all the query heads that share it: g heads, not h",
    )
    expect(
        value != tokens * (2 * r * g * d + 2 * h * r),
        "queries meet the rebuilt keys, d_h numbers each, not the latent",
    )
    expect(
        value != tokens * (2 * r * g * d + 4 * h * d),
        "the values are not asked for: scores only, one product per query head and cached token",
    )
    expect(
        value != tokens * (2 * r * d + 2 * h * d),
        "the latent gives the keys of all g heads, not of one alone",
    )
    expect(
        value == right,
        f"each cached token is rebuilt from r to g · d_h numbers and meets h queries of d_h: {right} in all, yours "
        f"is {value:g}",
    )


@check("Exercise 3.4")
def over_positions(answer) -> None:
    """``over_positions(gram, theta, count)``: the mean of R_sᵀ G R_s over s = 0 … count − 1."""
    x = _random(9, 6)
    gram, count = x.T @ x / 9, 7
    found = array(answer(gram.clone(), THETA.clone(), count), (6, 6), "over_positions(...)")
    right = rope.over_positions(gram, THETA, 0, count)
    expect(not np.allclose(found, right * count), "that is the sum: divide by the number of positions")
    expect(
        not np.allclose(found, rope.over_positions(gram, -THETA, 0, count)),
        "you turned backwards, R G Rᵀ: x becomes x R, so xᵀx becomes Rᵀ xᵀx R",
    )
    expect(
        not np.allclose(found, rope.over_positions(gram, THETA, 1, count + 1)),
        "positions start at 0 and end at count − 1",
    )
    expect(
        not np.allclose(found, rope.over_positions(gram, THETA, 0, count + 1)),
        "one position too many: they end at count − 1",
    )
    expect(not np.allclose(found, gram), "nothing has turned")
    mean = sum(rope.rotation(s, THETA) for s in range(count)) / count
    expect(
        not np.allclose(found, mean.T @ gram @ mean),
        "you averaged the rotations first: average the turned matrices, the product is not linear in R",
    )
    expect(
        not np.allclose(found, sum(gram @ rope.rotation(s, THETA) for s in range(count)) / count),
        "R stands on both sides: Rᵀ G R",
    )
    trace = float(gram.trace())
    expect(
        np.isclose(np.trace(found), trace),
        f"a rotation keeps the trace, {trace:.3f} here; yours has {np.trace(found):.3f}",
    )
    expect(np.allclose(found, right), "the trace is right, the matrix is not: pair f turns by s × theta[f]")
