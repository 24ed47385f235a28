"""Checks of chapter 4: a basis absorbed into weights, on both sides of the cache, and a decoder of one's own.

Rows of activations stand on the left: k = x W_K. Answers may be NumPy arrays or torch tensors.
"""

import numpy as np
import torch

from . import array, check, expect

HIDDEN, HEADS, WIDTH, RANK = 7, 3, 4, 5


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@check("Exercise 4.1")
def query(answer) -> None:
    """``query(w_q, decode, i)``: W_Q D_iᵀ, [hidden, r], for the query that reads head i of the group."""
    w_q, decode = _draw(HIDDEN, WIDTH), _draw(RANK, HEADS * WIDTH)
    found = array(answer(w_q.clone(), decode.clone(), 1), (HIDDEN, RANK), "query(w_q, decode, i)")
    first, right = w_q @ decode[:, :WIDTH].T, w_q @ decode[:, WIDTH : 2 * WIDTH].T
    expect(not np.allclose(found, first), "you took the block of head 0 for i = 1: it starts at i · d_h")
    apart = w_q @ decode[:, 1::HEADS].T
    expect(not np.allclose(found, apart), "a head's numbers stand side by side: columns i · d_h and on")
    expect(np.allclose(found, right), "W_Q times the transpose of block i of the decoder is another matrix")


@check("Exercise 4.2")
def output(answer) -> None:
    """``output(w_o, decode, i)``: D_i W_O, [r, hidden]."""
    w_o, decode = _draw(WIDTH, HIDDEN), _draw(RANK, HEADS * WIDTH)
    found = array(answer(w_o.clone(), decode.clone(), 2), (RANK, HIDDEN), "output(w_o, decode, i)")
    expect(
        not np.allclose(found, decode[:, :WIDTH] @ w_o),
        "you took the block of head 0 for i = 2: it starts at i · d_h",
    )
    right = decode[:, 2 * WIDTH :] @ w_o
    expect(
        not np.allclose(found, decode[:, 2::HEADS] @ w_o),
        "a head's numbers stand side by side: columns i · d_h and on",
    )
    expect(np.allclose(found, right), "block i of the decoder times W_O is another matrix")


@check("Exercise 4.3")
def decoder(answer) -> None:
    """``decoder(gram, encode, columns)``: the D [r, d_h] with the least tr (E D − S)ᵀ G (E D − S)."""
    rows, encode = _draw(40, HEADS * WIDTH) @ _draw(HEADS * WIDTH, HEADS * WIDTH), _draw(HEADS * WIDTH, RANK)
    gram, columns = rows.T @ rows, slice(WIDTH, 2 * WIDTH)
    call = "decoder(gram, encode, columns)"
    found = array(answer(gram.clone(), encode.clone(), columns), (RANK, WIDTH), call)
    plain = torch.linalg.pinv(encode)[:, columns]
    expect(
        not np.allclose(found, plain),
        "the moments are not in it: this is the best decoder when all directions of x are equally large",
    )
    expect(
        not np.allclose(found, encode.T @ gram[:, columns]),
        "this is Eᵀ G S; the numbers in x E are not independent, so divide by their moments, Eᵀ G E",
    )
    expect(
        not np.allclose(found, encode.T[:, columns]),
        "E turned round decodes only when its columns are orthonormal and all directions of x equally large",
    )
    normal = encode.T @ gram @ encode
    own = torch.linalg.solve(normal, encode[columns].T @ gram[columns, columns])
    expect(
        not np.allclose(found, own),
        "this head's columns go along with those of the other heads: take all rows of G in Eᵀ G S",
    )
    right = torch.linalg.solve(normal, encode.T @ gram[:, columns])
    expect(np.allclose(found, right), "another D reads this head with a smaller error")
