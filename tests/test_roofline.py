"""What a prediction must obey, whatever the machine; the line through steps; a machine measured in small."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvteach import cost, machine, roofline
from kvteach.machine import DATASHEETS, Machine, Reading
from kvteach.memory import Made
from kvteach.roofline import PAPER, fit, implied, seconds

SHAPE = cost.Shape(layers=3, hidden=64, query_heads=8, kv_heads=8, head_dim=8, intermediate=96, vocab=50)
PLAIN = Machine("plain", read=1e9, matmul=1e10)


def test_docstring():
    assert doctest.testmod(roofline).failed == 0


def test_by_hand():
    made = replace(
        PLAIN, copy={100: 5e8}, launch={("basis", 3): 1e-3}, attend={Reading(4, 8): 2e8}, product={3: 4e8}
    )
    small = SHAPE.compress(2, "G")
    moved = cost.decode_bytes(small, 7, 3, 4, 4)
    found = seconds(made, small, cached=7, batch=3, bytes_per_number=4, grows=True)
    assert found == {
        "weights": moved["weights"] / 4e8,
        "attention": moved["cache"] / 2e8,
        "copy": moved["cache"] / 5e8,
        "launch": 3e-3,
    }
    assert seconds(made, small, 7, 3, 4)["copy"] == 0


def test_blocks_have_rates_of_their_own_and_map_their_queries_once_each():
    small = SHAPE.compress(2, "G")
    blocks = replace(small, key_block=5)
    made = replace(
        PLAIN,
        attend={Reading(4, 8): 2e8, Reading(4, 8, 5, 8): 1e8},
        product={3: 4e8},
        launch={("basis", 3): 1e-3, ("blocks", 3): 2e-3},
    )
    plain, found = (seconds(made, one, 14, 3, 4) for one in (small, blocks))
    assert found == plain | {"attention": 2 * plain["attention"], "launch": 2 * plain["launch"]}
    # where no rate is known, and reading takes no time, the maps are counted: 3 blocks, so 2 more than without
    plain, found = (seconds(replace(PLAIN, read=1e300), one, 14, 3, 4) for one in (small, blocks))
    maps = 2 * 3 * 3 * 8 * 8 * 8  # FLOPs: batch · layers · query heads · d_h · d_h, of one block
    assert found["attention"] == pytest.approx(plain["attention"] + 2 * maps / PLAIN.matmul)
    assert found["weights"] == plain["weights"]


def test_launches_that_run_ahead_count_only_beyond_the_rest():
    launch = {("plain", 1): 1e-3, ("basis", 1): 2e-3}
    for form, each in (("S", 1e-3), ("G", 2e-3), ("R", 2e-3)):
        shape = SHAPE.compress(2, form, *((4, 4) if form == "R" else ()))
        rest = seconds(PLAIN, shape, 5)
        assert rest["launch"] == 0
        found = seconds(replace(PLAIN, launch=launch), shape, 5)
        assert found == rest | {"launch": 3 * each}
        found = seconds(replace(PLAIN, launch=launch, overlaps=True), shape, 5)
        assert sum(found.values()) == pytest.approx(max(3 * each, sum(rest.values())))
        slow = replace(PLAIN, read=1e5, launch=launch, overlaps=True)
        assert seconds(slow, shape, 5)["launch"] == 0
    blocks = replace(SHAPE.compress(2, "G"), key_block=5)
    assert (
        seconds(replace(PLAIN, launch={("plain", 1): 1e-3}), blocks, 5)["launch"] == 3e-3
    )  # stands for the others


@pytest.mark.parametrize("batch, cached", [(1, 10), (64, 1000)])
def test_endless_bandwidth_leaves_the_flops_and_endless_flops_leave_the_bytes(batch, cached):
    work, moved = cost.flops(SHAPE, cached=cached), cost.decode_bytes(SHAPE, cached, batch)
    only_flops = sum(seconds(replace(PLAIN, read=1e300), SHAPE, cached, batch).values())
    assert only_flops == pytest.approx(batch * sum(work.values()) / PLAIN.matmul)
    only_bytes = sum(seconds(replace(PLAIN, matmul=1e300), SHAPE, cached, batch).values())
    assert only_bytes == pytest.approx(sum(moved.values()) / PLAIN.read)
    both = sum(seconds(PLAIN, SHAPE, cached, batch).values())
    assert max(only_flops, only_bytes) <= both * (1 + 1e-12)
    assert both <= only_flops + only_bytes


@given(st.integers(0, 10**5), st.integers(1, 64), st.sampled_from([4, 2, 1]))
def test_a_smaller_cache_is_never_slower_and_never_beats_its_bytes(cached, batch, heads):
    """Form S has fewer weights too, so the bound is the smaller of both shares: that of the cache."""
    whole = seconds(replace(PLAIN, matmul=1e300), SHAPE, cached, batch)
    small = seconds(replace(PLAIN, matmul=1e300), SHAPE.compress(heads), cached, batch)
    assert small["attention"] == pytest.approx(whole["attention"] * heads / 8)
    assert sum(small.values()) <= sum(whole.values())


def test_the_size_of_a_tensor_decides_how_fast_it_is_copied():
    made = replace(PLAIN, copy={10: 100.0, 1000: 10.0})
    assert [made.copies(size) for size in (1, 10, 999, 1000, 10**9)] == [100, 100, 100, 10, 10]
    assert PLAIN.copies(5) == PLAIN.read / 2


@given(
    st.floats(1e-6, 10),
    st.floats(1e-6, 10),
    st.lists(st.integers(0, 100), min_size=2, max_size=9, unique=True),
)
def test_the_line_is_found_from_exact_steps(a, b, x):
    found = fit(x, [a + b * one for one in x])
    assert found == pytest.approx((a, b), rel=1e-6)


def test_the_line_has_the_smallest_relative_errors():
    x, measured = np.array([1, 0.5, 0.25, 0.125]), np.array([10.0, 6, 3, 2.2])
    error = lambda a, b: np.sum(((a + b * x) / measured - 1) ** 2)  # noqa: E731
    a, b = fit(x, measured)
    generator = np.random.default_rng(0)
    for da, db in generator.normal(0, 0.1, (200, 2)):
        assert error(a, b) <= error(a + da, b + db)


def test_the_papers_columns_are_lines_that_no_single_pass_explains():
    """Section 3 of the fit: each column within 3 % of a line, and more sequences than the memory has room for."""
    for column in PAPER.values():
        found = implied(column, DATASHEETS["A100 80GB"])
        assert found.error < 0.03
        assert found.batch > found.fits > 0 and found.passes == found.batch / found.fits
        whole = cost.cache_bytes(column.shape, 2048, found.fits) + 2 * cost.parameters(column.shape)
        assert whole <= 80e9 < whole + cost.cache_bytes(column.shape, 2048)
        # twice the bandwidth reads twice as much in the same b
        fast = replace(DATASHEETS["A100 80GB"], read=2 * 2039e9)
        assert implied(column, fast).passes == pytest.approx(2 * found.passes)


def test_a_memory_that_holds_no_sequence():
    assert (
        implied(PAPER["LLaMA-2-7B"], DATASHEETS["T4"]).fits == 2
    )  # 13.5 of 16 GB are weights, a cache has 1.07
    tiny = replace(DATASHEETS["T4"], memory=1e9)
    assert implied(PAPER["LLaMA-2-7B"], tiny).fits == 0
    assert implied(PAPER["LLaMA-2-7B"], tiny).passes == float("inf")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_machine_measured_in_small(fused, masked, dtype):
    before = torch.get_rng_state()
    found = machine.measure(
        "cpu",
        dtype,
        attend=[Reading(1, 64), Reading(4, 32, 64, 16)],
        rows=(1, 3),
        fused=fused,
        masked=masked,
        repeats=1,
        megabytes=1,
    )
    assert set(found.attend) == {Reading(1, 64), Reading(4, 32, 64, 16)} and set(found.product) == {1, 3}
    assert set(found.copy) == set(machine.COPIED) and found.memory is None
    assert {kind for kind, rows in found.launch} == set(machine.LAYERS) and min(found.launch.values()) > 0
    plain = found.as_dict()
    rate = found.attend[Reading(4, 32, 64, 16)]
    assert plain["attend"][1] == {"readers": 4, "width": 32, "block": 64, "query": 16, "bytes": rate}
    assert torch.equal(before, torch.get_rng_state())


def test_each_kind_of_layer_has_its_own_small_operations():
    made = {}
    for kind in machine.LAYERS:
        step, layers = machine._small_model(kind, 1, torch.device("cpu"), torch.float32)
        with torch.no_grad(), Made() as made[kind]:
            step()
        assert layers == 4
    assert len(made["plain"].shapes) < len(made["basis"].shapes) < len(made["blocks"].shapes)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Machine("m", read=0, matmul=1), "read is 0; it should be above 0"),
        (lambda: Machine("m", read=1, matmul=float("nan")), "matmul is nan; it should be above 0"),
        (
            lambda: Machine("m", 1, 1, attend={Reading(1, 64): -1}),
            "attend[Reading(readers=1, width=64, block=0, query=0)] is -1; it should be above 0",
        ),
        (
            lambda: Machine("m", 1, 1, launch={("basis", 1): -1}),
            "launch[('basis', 1)] is -1; it should be 0 seconds or more",
        ),
        (lambda: seconds(PLAIN, SHAPE, cached=5, batch=0), "batch is 0; it should be 1 or more"),
        (lambda: seconds(PLAIN, SHAPE, cached=-5), "cached is -5"),
        (lambda: seconds(PLAIN, SHAPE, cached=5, bytes_per_number=0), "weight_bytes is 0"),
        (lambda: fit([1], [1]), "x has 1 different values; a line needs two or more"),
        (lambda: fit([1, 1], [1, 2]), "x has 1 different values"),
        (lambda: fit([1, 2], [1, 2, 3]), "two lists of one length; got (2,) and (3,)"),
        (lambda: fit([1, 2], [1, float("nan")]), "should be finite, and seconds above 0"),
        (lambda: fit([1, 2], [1, 0]), "should be finite, and seconds above 0"),
        (lambda: implied(PAPER["BLOOMZ-7B1"], PLAIN), "the memory of 'plain' is not known"),
        (lambda: machine.measure("cpu", repeats=0), "repeats is 0; it should be 1 or more"),
        (lambda: machine.measure("cpu", rows=(0,)), "rows is 0; it should be 1 or more"),
        (lambda: machine.measure("cpu", megabytes=0), "megabytes is 0; it should be 1 or more"),
        (lambda: machine.measure("cpu", attend=[Reading(0, 64)]), "attend is 0; it should be 1 or more"),
        (lambda: machine.measure("cpu", attend=[Reading(1, 64, -1, 8)]), "query=8); block and query should"),
        (lambda: machine.measure("cpu", attend=[(1, 64, 64)]), "block=64, query=0); block and query should"),
        (
            lambda: machine.measure("cpu", attend=[Reading(1, 64, 0, 8)]),
            "should both be 0, or both 1 or more",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError) as refusal:
        call()
    assert words in str(refusal.value)
