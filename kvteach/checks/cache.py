"""Checks of chapter 2: rows of a cache, streamed sums, centring, energy on unseen text.

Answers may be NumPy arrays or torch tensors; the checks hand out torch tensors, as a model does.
"""

import numpy as np
import torch

from . import array, check, expect, number


@check("Exercise 2.1")
def rows(answer) -> None:
    """``rows(x)``: [batch, heads, tokens, d_h] -> [batch · tokens, heads · d_h]."""
    batch, heads, tokens, d = 2, 3, 4, 5
    x = torch.arange(float(batch * heads * tokens * d)).view(batch, heads, tokens, d)
    found = array(answer(x), (batch * tokens, heads * d), "rows(x)")
    expect(
        not np.array_equal(found, x.reshape(batch * tokens, heads * d)),
        "you reshaped without moving the axes: a row then holds several tokens of one head; transpose first",
    )
    expect(
        not np.array_equal(found, x.permute(0, 2, 3, 1).reshape(batch * tokens, heads * d)),
        "the heads are interleaved: number 0 of every head comes first; keep each head's d_h numbers together",
    )
    first = torch.cat([x[0, head, 0] for head in range(heads)]).tolist()
    expect(found[0].tolist() == first, f"row 0 should be token 0 of head 0, then 1, then 2: {first}")
    expect(
        not np.array_equal(found, x.permute(2, 0, 1, 3).reshape(batch * tokens, heads * d)),
        "rows of the two texts alternate: keep the tokens of one text together",
    )
    expect(
        np.array_equal(found, x.transpose(1, 2).reshape(batch * tokens, heads * d)),
        "row 0 is right, but another row is not token after token of text after text",
    )


@check("Exercise 2.2")
def stream(answer) -> None:
    """``stream(state, x)``: (count, total, gram) after the rows of x were added to the three sums."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 3, generator=generator) + 2 for n in (5, 2, 9)]

    def empty():
        """Fresh sums: an answer may change them in place."""
        return 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)

    square = parts[0][
        :3
    ]  # as many tokens as numbers: a product the wrong way round still has the right shape
    wrong_way = (square @ square.T).double().numpy()
    state = answer(empty(), square)
    expect(state is not None, "stream(state, x) is empty: replace the ... and return the three sums")
    expect(isinstance(state, tuple | list) and len(state) == 3, "return the three sums: count, total, gram")
    expect(
        not np.allclose(array(state[2], (3, 3), "gram"), wrong_way),
        "gram is tokens × tokens: it should be xᵀx, numbers × numbers, not xxᵀ",
    )
    state = empty()
    for part in parts:
        state = answer(state, part)
    every = torch.cat(parts).double().numpy()
    count = number(state[0], "count")
    expect(count != len(parts), "count the tokens, which are the rows of x, not the calls")
    expect(count == len(every), f"count should be {len(every)} after 5, 2 and 9 rows, yours is {count:g}")
    total, gram = array(state[1], (3,), "total"), array(state[2], (3, 3), "gram")
    last = parts[-1].double().numpy()
    expect(not np.allclose(gram, last.T @ last), "gram holds the last batch only: add to the old sum")
    averaged = sum((part.double().T @ part.double()).numpy() / len(part) for part in parts)
    expect(
        not np.allclose(gram, averaged),
        "you averaged each batch: a batch of 2 tokens then weighs as much as one of 9; sum, and divide once at the end",
    )
    expect(np.allclose(total, every.sum(0)), "total should be the sum of all rows so far")
    expect(np.allclose(gram, every.T @ every), "gram should be the sum of xᵀx over all batches so far")
    # 4097² and 2²⁴ + 1 need 25 bits, float32 has 24
    large = torch.tensor([[4097.0], [4097.0], [2.0**24], [1.0]])
    zero = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    _, total, gram = answer((0, *zero), large)
    expect(
        float(torch.as_tensor(gram)) == float(large.double().square().sum())
        and float(torch.as_tensor(total)) == float(large.double().sum()),
        "you added or multiplied in float32, which rounds: turn x into float64 first",
    )


@check("Exercise 2.3")
def covariance(answer) -> None:
    """``covariance(count, total, gram)``: E[xᵀx] − E[x]ᵀE[x], [d, d], from the three sums."""
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    count, total, gram = len(x), x.sum(0), x.T @ x
    given = total.clone(), gram.clone()  # an answer may change what it gets
    found = array(answer(count, *given), (3, 3), "covariance(...)")
    centred, outer = torch.cov(x.T, correction=0), total.outer(total)
    expect(not np.allclose(found, gram / count), "that is the second moment: the mean is still in it")
    expect(
        not np.allclose(found, gram / count - outer),
        "total is a sum, not a mean: divide it by count before taking the outer product",
    )
    expect(
        not np.allclose(found, gram / count - outer / count),
        "divide both factors of the outer product: count²",
    )
    expect(not np.allclose(found, centred * count), "that is the sum over all tokens: divide by count")
    expect(
        not np.allclose(found, torch.cov(x.T)),
        "you divided by count − 1: this book describes the tokens it has, so it divides by count",
    )
    small = answer(2, torch.tensor([4.0]), torch.tensor([[10.0]]))
    expect(
        np.allclose(found, centred),
        "not yet: for the two numbers 1 and 3, with count 2, total 4 and gram 10, it should be 1; "
        f"yours gives {float(torch.as_tensor(small)):g}",
    )


@check("Exercise 2.4")
def kept(answer) -> None:
    """``kept(psi, gram)``: the share of the energy of `gram` [d, d] that the rows of `psi` [r, d] keep."""
    generator = torch.Generator().manual_seed(0)
    psi = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64, generator=generator))[0].T
    x = torch.randn(20, 5, dtype=torch.float64, generator=generator) * torch.tensor([5.0, 4, 3, 2, 1])
    gram = x.T @ x
    found = number(answer(psi.clone(), gram.clone()), "kept(psi, gram)")
    right = float((psi @ gram @ psi.T).trace() / gram.trace())
    own = float(torch.linalg.eigvalsh(gram)[-2:].sum() / gram.trace())
    expect(
        not np.isclose(found, own),
        "that is what the best basis of this text keeps; use psi, which was found on another text",
    )
    expect(
        not np.isclose(found, right * float(gram.trace())), "divide by the whole energy, the trace of gram"
    )
    expect(not np.isclose(found, right**0.5), "energy is squared already: no root")
    expect(not np.isclose(found, 1 - right), "that is the share that is lost")
    expect(np.isclose(found, right), f"psi keeps {right:.3f} of the energy here, yours says {found:.3f}")
