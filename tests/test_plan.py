"""Plans: what they refuse, and the layout that they give."""

import json

import lively
import numpy as np
import pytest

from kvteach.bases import METHODS
from kvteach.cost import BLOCK
from kvteach.moments import Source
from kvteach.plan import GROUPINGS, REACH, Plan

LLAMA = Source("llama", layers=3, query_heads=8, kv_heads=4, head_dim=16, weights="")
BLOOM = Source("bloom", layers=3, query_heads=4, kv_heads=4, head_dim=16, weights="")


@pytest.mark.parametrize("dials", [{}, {"kv_heads": 2, "kv_ratio": 0.5}])
def test_one_dial_is_turned(dials):
    with pytest.raises(ValueError, match=r"kv_heads or kv_ratio, one of the two"):
        Plan(**dials)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf"), "half", True, 1j])
def test_ratio_is_a_share(ratio):
    with pytest.raises(ValueError, match=r"kv_ratio is .*above 0 and at most 1"):
        Plan(kv_ratio=ratio)


@pytest.mark.parametrize("heads", [0, -2, 3, 8, True, 2.0, "2"])
def test_heads_divide_those_of_the_model(heads):
    with pytest.raises(ValueError, match=r"kv_heads is .*1, 2, 4"):
        Plan(kv_heads=heads).layout(LLAMA)


def test_names_are_known():
    with pytest.raises(LookupError, match=r"no basis 'svd'; it is one of mean-pool"):
        Plan(kv_heads=2, basis="svd")
    with pytest.raises(ValueError, match=r"grouping is 'random'; it must be one of order, similarity"):
        Plan(kv_heads=2, grouping="random")


def test_stock_makes_ordinary_heads():
    with pytest.raises(ValueError, match=r"stock=True .* needs kv_heads"):
        Plan(kv_ratio=0.5, stock=True)
    with pytest.raises(ValueError, match=r"stock is True; a bloom model has no RoPE.*leave stock out"):
        Plan(kv_heads=2, stock=True, basis="mean-pool").layout(BLOOM)


@pytest.mark.parametrize("basis", sorted(set(METHODS) - {"mean-pool", "procrustes", "commuting-stock"}))
def test_stock_wants_a_basis_that_passes_through_rope(basis):
    with pytest.raises(ValueError, match=f"basis '{basis}'.*commuting-stock, mean-pool, procrustes"):
        Plan(kv_heads=2, stock=True, basis=basis).layout(LLAMA)


def test_a_ratio_keeps_at_least_a_pair():
    with pytest.raises(ValueError, match=r"kv_ratio is 0.001; it must keep at least 2 of 64 numbers: 0.03"):
        Plan(kv_ratio=0.001).layout(LLAMA)
    assert Plan(kv_ratio=2 / 64).layout(LLAMA) == (1, 2, 2)


def test_layouts():
    assert Plan(kv_heads=2).layout(LLAMA) == (2, 16, 16)
    assert Plan(kv_heads=4, stock=True).layout(LLAMA) == (4, 16, 16)
    assert Plan(kv_ratio=1).layout(LLAMA) == (1, 64, 64)
    for ratio in np.linspace(0.05, 1, 20):
        _, keys, values = Plan(kv_ratio=ratio).layout(LLAMA)
        assert keys == values and keys % 2 == 0 and abs(keys - 64 * ratio) <= 1


def test_forms_and_default_bases():
    assert [Plan(kv_heads=2).form, Plan(kv_heads=2, stock=True).form, Plan(kv_ratio=0.5).form] == [*"GSR"]
    assert Plan(kv_heads=2).basis == Plan(kv_ratio=0.5).basis == "blockwise"
    assert Plan(kv_heads=2, reach=90).basis == "attention-weighted"
    assert Plan(kv_heads=2, stock=True).basis == "commuting-stock"


@pytest.mark.parametrize(
    "dial", [{"kv_heads": np.int64(2)}, {"kv_ratio": np.float32(0.5)}, {"kv_ratio": np.float64(0.5)}]
)
def test_numpy_numbers_are_numbers(dial):
    plan = Plan(**dial)
    assert Plan(**json.loads(json.dumps(plan.as_dict()))) == plan
    assert plan.layout(LLAMA) == Plan(**{name: value.item() for name, value in dial.items()}).layout(LLAMA)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_plan_is_its_dict(grouping):
    plan = Plan(kv_heads=2, grouping=grouping, basis="score-weighted", centred=True)
    assert Plan(**json.loads(json.dumps(plan.as_dict()))) == plan
    with pytest.raises(AttributeError):
        plan.kv_heads = 1


def test_layout_of_a_real_source():
    assert Plan(kv_heads=1).layout(Source.of(lively.original("llama-mqa-bias"))) == (1, 8, 8)


@pytest.mark.parametrize(
    ("reach", "limit", "calibrated", "found"),
    [
        (None, 8192, 512, REACH),
        (None, 256, 40, 256),  # all that the model has
        (None, 8192, 4096, 4096),  # never fewer than were calibrated
        (4096, 8192, 512, 4096),
        (8, 8192, 512, 512),
    ],
)
def test_positions_that_are_served(reach, limit, calibrated, found):
    plan = Plan(kv_heads=1, basis="attention-weighted", reach=reach)
    assert plan.positions(LLAMA, limit, calibrated) == found


def test_positions_that_cannot_be_served():
    with pytest.raises(ValueError, match="reach is 8193; the model was made for 8192 positions"):
        Plan(kv_heads=1, reach=8193).positions(LLAMA, 8192, 512)
    with pytest.raises(ValueError, match="reach is 90; a bloom model has no RoPE"):
        Plan(kv_heads=1, reach=90).positions(BLOOM, None, 512)
    assert Plan(kv_heads=1).positions(BLOOM, None, 512) is None
    for bad in (0, -1, True, 2.5, "2048"):
        with pytest.raises(
            ValueError, match=r"reach is .*; it must be a whole number of positions, 1 or more"
        ):
            Plan(kv_heads=1, reach=bad)


def test_a_reach_has_no_meaning_within_blocks():
    with pytest.raises(ValueError, match="its keys hold at every position: leave one of the two out"):
        Plan(kv_heads=1, basis="blockwise", reach=90)
    with pytest.raises(ValueError, match=r"whose keys hold at every position: leave .* reach out"):
        Plan(kv_heads=1, sequential=True, reach=90)
    assert Plan(kv_heads=1).positions(LLAMA, 8192, 512) is None


def test_blocks_are_where_keys_turn():
    for plan in (Plan(kv_heads=1), Plan(kv_ratio=0.5, sequential=True)):
        assert plan.block(LLAMA) == BLOCK and plan.block(BLOOM) is None
    assert Plan(kv_heads=1, reach=90).block(LLAMA) is Plan(kv_heads=1, stock=True).block(LLAMA) is None
