"""Attention-weighted sums against their definitions, one softmax row at a time."""

import pytest
import tiny
import torch
from lively import original

from kvteach.activations import record
from kvteach.attended import handed_on, queries_in_blocks, spread, spread_in_blocks, wide
from kvteach.rope import from_config, rotate

NAME, TOKENS = "llama-gqa", 24


@pytest.fixture(scope="module")
def seen():
    """One layer of a text, heads first."""
    found = record(original(NAME), tiny.ids(1, TOKENS, seed=3), attention=True)[1]
    return {name: tensor[0] for name, tensor in vars(found).items()}


@pytest.fixture(scope="module")
def rows(seen):
    """All softmax rows, [query heads · tokens, tokens]."""
    return seen["attention"].flatten(0, 1).double()


def test_spread_is_the_covariance_under_each_row(seen, rows):
    keys = wide(seen["keys_post"])
    expected = sum(torch.cov(keys.T, aweights=row, correction=0) for row in rows)
    torch.testing.assert_close(spread(keys, seen["attention"]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(spread(keys + 100, seen["attention"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 7, TOKENS, 100])
def test_spread_in_blocks_has_a_mean_for_each_block(seen, rows, block):
    """uᵀ G u: every row's second moment of k·u, less the square of what it reads in each block."""
    keys = wide(seen["keys_post"])
    direction = torch.randn(keys.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    said = keys.double() @ direction  # [tokens]
    expected = (rows @ said.square()).sum()
    for start in range(0, TOKENS, block):
        inside = slice(start, start + block)
        expected -= (rows[:, inside] @ said[inside]).square().sum()
    found = spread_in_blocks(keys, seen["attention"], block)
    torch.testing.assert_close(direction @ found @ direction, expected)
    if block >= TOKENS:
        torch.testing.assert_close(found, spread(keys, seen["attention"]), rtol=0, atol=1e-5)


def test_heads_add_up(seen):
    keys, weights = wide(seen["keys_post"]), seen["attention"]
    for function, more in ((spread, ()), (handed_on, ()), (spread_in_blocks, (5,))):
        apart = sum(function(keys, one[None], *more) for one in weights)
        torch.testing.assert_close(function(keys, weights, *more), apart)


def test_handed_on_is_what_attention_makes(seen, rows):
    values = wide(seen["values"]).double()
    expected = sum((row @ values).outer(row @ values) for row in rows)
    torch.testing.assert_close(handed_on(values, seen["attention"].double()), expected)


@pytest.mark.parametrize("block", [4, 7, 100])
def test_queries_are_met_in_the_frame_of_each_block(seen, block):
    turns = from_config(original(NAME).config)
    expected = torch.zeros(4, 16, 16, dtype=torch.float64)
    for query in range(TOKENS):
        for key in range(query + 1):
            turned = rotate(seen["queries_pre"][:, query : query + 1], query - key // block * block, turns)
            expected += seen["attention"][:, query, key, None, None] * turned.mT @ turned
    found = queries_in_blocks(seen["queries_post"], seen["attention"], block, turns)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
