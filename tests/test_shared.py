"""One encoder for many readers: exact where nothing is left out, and no neighbour does better."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvteach.bases import shared
from kvteach.bases.optimal import best_projection
from kvteach.bases.shared import shared_encoder

D_H = 4


def problem(heads: int, readers: int, seed: int = 0, tokens: int = 40):
    """Grams [heads · readers, d, d] and weights [heads · readers, d_h, d_h], all different."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    d = heads * D_H
    rows = draw(heads * readers, tokens, d) @ draw(heads * readers, d, d)
    felt = draw(heads * readers, D_H, D_H)
    return rows.mT @ rows, felt @ felt.mT


def picks(heads: int, readers: int):
    """S_j, [heads · readers, d, d_h]."""
    eye = torch.eye(heads * D_H, dtype=torch.float64)
    return torch.stack([eye[:, j // readers * D_H :][:, :D_H] for j in range(heads * readers)])


def loss(encode, decode, grams, weights, heads, readers) -> float:
    """Σ_j tr (E D_j − S_j)ᵀ G_j (E D_j − S_j) W_j, in a loop."""
    found = 0.0
    for j, s in enumerate(picks(heads, readers)):
        wrong = encode @ decode[j] - s
        found += float((wrong.T @ grams[j] @ wrong @ weights[j]).trace())
    return found


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 3), readers=st.integers(1, 3), rank=st.integers(1, 12), seed=st.integers(0, 9))
def test_what_is_left_is_the_loss_as_a_share(heads, readers, rank, seed):
    rank = min(rank, heads * D_H)
    grams, weights = problem(heads, readers, seed)
    encode, decode, left = shared_encoder(grams, weights, rank)
    nothing = loss(encode, 0 * decode, grams, weights, heads, readers)
    assert left == pytest.approx(loss(encode, decode, grams, weights, heads, readers) / nothing, abs=1e-9)
    assert torch.allclose(encode.T @ encode, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [40, 3])  # 3: grams without full rank
def test_full_rank_reads_everything(tokens):
    grams, weights = problem(3, 2, tokens=tokens)
    encode, decode, left = shared_encoder(grams, weights, 12)
    assert torch.allclose(encode @ decode, picks(3, 2), atol=1e-9)
    assert left < 1e-12


def test_no_neighbour_is_better(monkeypatch):
    """Converged, neither another encoder with its own best decoders nor another decoder does better."""
    monkeypatch.setattr(shared, "TURNS", 2000)
    grams, weights = problem(3, 2)
    encode, decode, _ = shared_encoder(grams, weights, 5)
    best = loss(encode, decode, grams, weights, 3, 2)
    generator = torch.Generator().manual_seed(1)
    s = picks(3, 2)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(10):
            other = encode + size * torch.randn(encode.shape, generator=generator, dtype=torch.float64)
            again = shared._decoders(other, grams, grams @ s, s)
            assert loss(other, again, grams, weights, 3, 2) >= best * (1 - 1e-9)
            step = size * torch.randn(decode.shape, generator=generator, dtype=torch.float64)
            assert loss(encode, decode + step, grams, weights, 3, 2) >= best * (1 - 1e-9)


def test_each_turn_helps():
    grams, weights = problem(3, 2)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        for turns in (0, 1, 3, 12):
            patch.setattr(shared, "TURNS", turns)
            losses.append(shared_encoder(grams, weights, 5)[2])
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


def test_readers_that_agree_need_no_turns():
    """When all moments are the same and the weights are those of the heads, the best projection is the answer."""
    gram, weights = problem(1, 1)[0], problem(3, 1)[1]
    gram = torch.block_diag(*gram.repeat(3, 1, 1)) + 0.3
    encode, decode, _ = shared_encoder(gram.repeat(3, 1, 1), weights, 5)
    best = best_projection(gram, 5, weights)
    assert torch.allclose(encode @ torch.cat([*decode], 1), best.encode @ best.decode, atol=1e-8)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_scales_and_nothing_at_all(scale):
    grams, weights = problem(2, 2)
    encode, decode, left = shared_encoder(scale * grams, weights, 3)
    assert torch.isfinite(encode).all() and torch.isfinite(decode).all() and 0 <= left < 1
    if scale:
        expected, other, _ = shared_encoder(grams, weights, 3)
        assert torch.allclose(encode @ decode, expected @ other, atol=1e-6)
    unfelt = shared_encoder(grams, 0 * weights, 3)
    assert torch.isfinite(unfelt[0]).all() and torch.isfinite(unfelt[1]).all()
