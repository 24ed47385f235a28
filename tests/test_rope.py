"""RoPE: equal to transformers', a group of rotations, and exact means over positions."""

import pytest
import tiny
import torch
from transformers import BloomConfig, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvteach import bases, rope
from kvteach.activations import record
from kvteach.bases.pairs import complex_gram
from kvteach.calibration import calibrate
from kvteach.moments import Moments

THETA = rope.frequencies(8, theta=100.0)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moment(n=1, leading=()):
    x = random(*leading, 40, 8 * n)
    return x.mT @ x / 40


def by_loop(gram, start, stop):
    turned = [rope.rotation(p, THETA, gram.shape[-1] // 8) for p in range(start, stop)]
    return sum(r.T @ gram @ r for r in turned) / len(turned)


# ---------------------------------------------------------------------------------------------------------
# The rotation


def test_rotation_is_transformers_own():
    x, positions = random(2, 3, 5, 8), torch.tensor([0, 1, 7, 100, 3])
    angles = (positions[:, None] * THETA).repeat(1, 2)[None]
    query, key = apply_rotary_pos_emb(x, 2 * x, angles.cos(), angles.sin())
    assert torch.allclose(rope.rotate(x, positions, THETA), query)
    assert torch.allclose(rope.rotate(2 * x, positions, THETA), key)


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "llama-mqa-bias", "mistral", "qwen2"])
def test_keys_of_a_model_are_turned_so(name):
    model = tiny.MODELS[name]()
    theta = rope.from_config(model.config)
    assert torch.equal(theta, model.model.rotary_emb.inv_freq.double())
    for layer in record(model, tiny.ids(tokens=4)):
        turned = rope.rotate(layer.keys_pre, torch.arange(4), theta)
        assert torch.allclose(turned, layer.keys_post, atol=1e-6)  # transformers forms angles in float32


def test_negative_positions_turn_back():
    x, positions = random(3, 6, 8), torch.arange(6) * 1000
    there = rope.rotate(x, positions, THETA)
    assert torch.allclose(there.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(rope.rotate(there, -positions, THETA), x)


def test_scores_depend_on_the_distance_only():
    q, k = random(1, 8, seed=1), random(1, 8, seed=2)
    scores = [rope.rotate(q, [p + 5], THETA) @ rope.rotate(k, [p], THETA).T for p in (0, 3, 4000)]
    assert torch.allclose(scores[0], scores[1]) and torch.allclose(scores[0], scores[2])
    assert torch.allclose(scores[0], q @ rope.rotation(5, THETA) @ k.T)


def test_positions_broadcast_and_the_dtype_stays():
    x = random(2, 3, 4, 8).float()
    each = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6]])[:, None]  # [2, 1, 4]: every text has its own positions
    found = rope.rotate(x, each, THETA)
    assert found.dtype == torch.float32
    assert torch.equal(found[1], rope.rotate(x[1], each[1, 0], THETA))


def test_rotation_matrix():
    two = rope.rotation(7, THETA, heads=2)
    x = random(1, 16)
    assert torch.allclose(two @ two.T, torch.eye(16, dtype=torch.float64))
    assert torch.allclose((x @ two).view(2, 8), rope.rotate(x.view(2, 1, 8), [7], THETA)[:, 0])
    assert torch.allclose(rope.rotation(3, THETA) @ rope.rotation(4, THETA), rope.rotation(7, THETA))


def test_frequencies_and_turns():
    config = LlamaConfig(**tiny._LLAMA, num_key_value_heads=2)
    theta = rope.from_config(config)
    assert torch.allclose(theta, rope.frequencies(16, config.rope_parameters["rope_theta"]), rtol=1e-6)
    assert rope.turns(theta, 512)[0] == pytest.approx(512 / (2 * torch.pi))


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(kind):
    more = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | (more if kind == "llama3" else {})
    theta = rope.from_config(LlamaConfig(**tiny._LLAMA, rope_parameters=parameters))
    assert theta[-1] == pytest.approx(
        float(rope.frequencies(16)[-1]) / 4
    )  # the slowest is slowed down by both


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_turns_that_are_not_fixed_are_refused(kind):
    config = LlamaConfig(**tiny._LLAMA)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=f"rope_type is '{kind}'"):
        rope.from_config(config)


def test_models_without_rope_are_refused():
    with pytest.raises(ValueError, match="a bloom model has no RoPE"):
        rope.from_config(BloomConfig(hidden_size=64, n_head=4))


@pytest.mark.parametrize("head_dim, theta", [(0, 1e4), (7, 1e4), (8, 0.0), (8, float("nan"))])
def test_impossible_frequencies_are_refused(head_dim, theta):
    with pytest.raises(ValueError, match="even head_dim"):
        rope.frequencies(head_dim, theta)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="4 frequencies turn 8"):
        rope.rotate(random(3, 6), torch.arange(3), THETA)
    for matrix in (random(8, 4), random(12, 12)):
        with pytest.raises(ValueError, match="square, a multiple of 8"):
            rope.over_positions(matrix, THETA, 0, 4)
        with pytest.raises(ValueError, match="square, a multiple of 8"):
            rope.commutator(matrix, THETA)


# ---------------------------------------------------------------------------------------------------------
# What commutes


def test_only_complex_maps_within_a_frequency_commute():
    a, b = random(4, seed=3), random(4, seed=4)
    within = torch.cat(
        [torch.cat([torch.diag(a), torch.diag(b)], 1), torch.cat([torch.diag(-b), torch.diag(a)], 1)]
    )
    assert rope.commutator(within, THETA, position=9) < 1e-14
    across = within.clone()
    across[0, 1] = 1.0  # two frequencies
    assert rope.commutator(across, THETA) > 0.01
    real_only = torch.diag(torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64))  # half of a pair
    assert rope.commutator(real_only, THETA) > 0.1


def test_bases_that_say_they_commute_do():
    moments = calibrate(tiny.MODELS["llama-mha"](), tiny.ids(), progress=False)
    theta = rope.from_config(tiny.MODELS["llama-mha"]().config)
    found = {}
    for name in ("commuting", "activation-svd"):
        keys = bases.method(name)(moments, 1, [0, 1], 16, 16).keys
        found[name] = rope.commutator(keys.encode @ keys.decode, theta, position=5)
    assert found["commuting"] < 1e-12
    assert found["activation-svd"] > 0.1


# ---------------------------------------------------------------------------------------------------------
# Means over positions


@pytest.mark.parametrize("start, stop", [(0, 1), (0, 17), (5, 6), (1000, 1013)])
@pytest.mark.parametrize("n", [1, 3])
def test_mean_over_positions_is_the_loop(n, start, stop):
    gram = second_moment(n)
    assert torch.allclose(rope.over_positions(gram, THETA, start, stop), by_loop(gram, start, stop))


def test_leading_axes_are_kept():
    gram = second_moment(2, leading=(3, 2))
    found = rope.over_positions(gram, THETA, 2, 9)
    assert found.shape == gram.shape
    assert torch.allclose(found[2, 1], by_loop(gram[2, 1], 2, 9))


def test_mean_over_positions_keeps_energy_symmetry_and_sign():
    gram = second_moment(2)
    found = rope.over_positions(gram, THETA, 0, 4096)
    assert torch.allclose(found, found.T)
    assert float(found.trace()) == pytest.approx(float(gram.trace()))
    assert torch.linalg.eigvalsh(found).min() > 0


def test_many_positions_leave_what_commutes():
    """After whole turns of all frequencies only E[z̄_f z_f] is left: what a commuting basis sees."""
    theta = 2 * torch.pi * torch.tensor([3, 5, 8, 13], dtype=torch.float64) / 64
    found = rope.over_positions(second_moment(2), theta, 0, 64)
    assert rope.commutator(found, theta) < 1e-12
    gram = second_moment(2)
    assert torch.allclose(complex_gram(gram, 2), complex_gram(found, 2))


@pytest.mark.parametrize("phase", [0.0, 2 * torch.pi, -4 * torch.pi, 1e-9, torch.pi, 6.2])
def test_mean_turn_is_the_mean(phase):
    phases = torch.tensor([phase], dtype=torch.float64)
    direct = torch.polar(torch.ones(37, dtype=torch.float64), phases * torch.arange(5, 42)).mean()
    assert torch.allclose(rope.mean_turn(phases, 5, 42)[0], direct)


@pytest.mark.parametrize("start, stop", [(0, 0), (3, 3), (5, 2), (-1, 4)])
def test_no_positions_are_refused(start, stop):
    with pytest.raises(ValueError, match="stop above it"):
        rope.over_positions(second_moment(), THETA, start, stop)


def test_placed_moments_are_those_of_moved_windows():
    """Exactly: a window that begins at position s attends alike, its keys and queries are turned by s."""
    model, ids, starts = tiny.MODELS["llama-gqa"](), tiny.ids(tokens=6), 3
    theta = rope.from_config(model.config)
    at_zero = calibrate(model, ids, attention=True, progress=False)
    placed = rope.placed(at_zero, theta, starts)
    assert placed.count == at_zero.count and placed.gram.keys() == at_zero.gram.keys()

    for layer, seen in enumerate(record(model, ids, attention=True)):
        for kind in ("keys_post", "queries_post"):
            x = getattr(seen, kind)
            moved = torch.stack(
                [rope.rotate(x, s, theta) for s in range(starts)]
            )  # [starts, batch, heads, …]
            rows = moved.movedim(2, -2).flatten(0, 2).flatten(1)  # [starts * batch * tokens, heads * d_h]
            mean, gram = rows.mean(0), rows.T @ rows / len(rows)
            assert torch.allclose(placed.mean(kind, layer).ravel(), mean, atol=1e-6)
            if kind == "keys_post":
                assert torch.allclose(placed.matrix(kind, layer), gram, atol=1e-6)
        attended = at_zero.matrix("keys_attended", layer)
        turned = [rope.rotation(s, theta, 2) for s in range(starts)]
        assert torch.allclose(
            placed.matrix("keys_attended", layer), sum(r.T @ attended @ r for r in turned) / starts
        )


def test_placed_leaves_the_rest_alone():
    model = tiny.MODELS["llama-gqa"]()
    moments = calibrate(model, tiny.ids(), progress=False)
    before = {kind: gram.clone() for kind, gram in moments.gram.items()}
    placed = rope.placed(moments, rope.from_config(model.config), 100)
    for kind in ("keys_pre", "queries_pre", "values"):
        assert torch.equal(placed.gram[kind], before[kind])
    assert all(torch.equal(moments.gram[kind], before[kind]) for kind in before)
    assert torch.allclose(
        rope.placed(moments, rope.from_config(model.config), 1).gram["keys_post"], before["keys_post"]
    )
    assert isinstance(placed + moments, Moments)  # half of the windows anywhere, half of them at 0


def test_placed_needs_a_model_that_rotates():
    moments = calibrate(tiny.MODELS["bloom"](), tiny.ids(), progress=False)
    with pytest.raises(ValueError, match="do not turn the heads of a bloom model"):
        rope.placed(moments, THETA, 10)
    moments = calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(), progress=False)
    with pytest.raises(ValueError, match="head_dim 16"):
        rope.placed(moments, THETA, 10)
