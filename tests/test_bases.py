"""Every basis against its definition, computed another way; none can be bettered on its own objective."""

import doctest
from functools import cache

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvteach import bases
from kvteach.activations import record
from kvteach.bases import METHODS, basis, method, optimal, pairs, procrustes
from kvteach.calibration import calibrate
from kvteach.moments import Moments

POOLED = ("mean-pool", "procrustes")
COMMUTING = ("mean-pool", "procrustes", "commuting", "commuting-attended", "commuting-stock")
seeds = st.integers(0, 2**31 - 1)
LAYER = 1


@cache
def calibrated(name: str):
    """Moments and stored activations of a tiny model: 5 windows × 40 tokens are more than any width here."""
    model, ids = tiny.MODELS[name](), tiny.ids(5, 40)
    return calibrate(model, ids, attention=True, progress=False), record(model, ids, attention=True)


def random(seed: int, *shape: int, complex: bool = False) -> torch.Tensor:
    dtype = torch.complex128 if complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cases(models=("llama-mha", "llama-gqa", "llama-mqa-bias", "bloom"), methods=tuple(METHODS)):
    """(model, method) pairs that make sense together."""
    return [
        pytest.param(model, name, id=f"{model}-{name}")
        for model in models
        for name in methods
        if not (model == "bloom" and name.startswith("commuting"))
    ]


def make(model: str, name: str, rank: int | None = None, heads=None, **options):
    """A basis of one layer; pooling methods get the only rank they have."""
    moments, _ = calibrated(model)
    d_h, heads = moments.source.head_dim, list(range(moments.source.kv_heads)) if heads is None else heads
    key_rank = d_h if name in (*POOLED, "commuting-stock") else rank
    value_rank = d_h if name in POOLED else rank
    return method(name)(moments, LAYER, heads, key_rank, value_rank, **options)


def stacked(model: str, kind: str, heads=None) -> torch.Tensor:
    """[batch * tokens, n * d_h] of the stored activations."""
    x = getattr(calibrated(model)[1][LAYER], kind)
    return (x if heads is None else x[:, heads]).transpose(1, 2).flatten(0, 1).flatten(1)


def through(x: torch.Tensor, side) -> torch.Tensor:
    mean = 0 if side.mean is None else side.mean
    return (x - mean) @ side.encode @ side.decode + mean


def objective(gram, weights, encode, decode) -> float:
    """E‖x (I − E D) W^½‖² as a trace, with nothing decomposed."""
    rest = torch.eye(len(gram), dtype=gram.dtype) - encode @ decode
    whole = torch.eye(len(gram)) if weights is None else torch.block_diag(*weights)
    return float((rest.mH @ gram @ rest @ whole.to(gram.dtype)).trace().real)


def output_projection(model: str) -> torch.Tensor:
    """W_O of every query head, [heads, d_h, hidden]."""
    module = tiny.MODELS[model]().base_model
    weight = (
        module.h[LAYER].self_attention.dense if model == "bloom" else module.layers[LAYER].self_attn.o_proj
    )
    return weight.weight.detach().T.unflatten(0, (calibrated(model)[0].source.query_heads, -1))


# -- the error that is returned is the objective, computed from stored activations --------------------------


def score_error(model, rest, heads):
    """Squared error of every query (of any window) with every key, summed over query heads."""
    activations = calibrated(model)[1][LAYER]
    queries = activations.queries_post.transpose(0, 1).flatten(1, 2)  # [query heads, batch * tokens, d_h]
    share = len(queries) // activations.keys_post.shape[1]
    rest = rest.unflatten(1, (len(heads), -1))
    return sum(
        (queries[j] @ rest[:, n].T).square().mean()
        for n, head in enumerate(heads)
        for j in range(head * share, (head + 1) * share)
    )


def output_error(model, rest, heads):
    """Squared error that the rows `rest` [rows, n * d_h] make behind W_O, heads apart."""
    projection = output_projection(model)
    share = len(projection) // calibrated(model)[0].source.kv_heads
    rest = rest.unflatten(1, (len(heads), -1))
    return sum(
        (rest[:, n] @ projection[j]).square().sum(1).mean()
        for n, head in enumerate(heads)
        for j in range(head * share, (head + 1) * share)
    )


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("model, name", cases(methods=(*POOLED, "activation-svd", "score-weighted")))
def test_error_is_the_objective_on_stored_activations(model, name, centred):
    heads = list(range(calibrated(model)[0].source.kv_heads))[::-1][:3]  # any order, not all
    found = make(model, name, rank=5, heads=heads, centred=centred)
    rests = {}
    for kind, side in (("keys_post", found.keys), ("values", found.values)):
        x = stacked(model, kind, heads)
        rests[kind] = x - through(x, side)
    if name == "score-weighted":
        expected = score_error(model, rests["keys_post"], heads), output_error(model, rests["values"], heads)
    else:
        expected = [rest.square().sum(1).mean() for rest in rests.values()]
    assert [found.keys.error, found.values.error] == pytest.approx([float(e) for e in expected], rel=1e-9)


@pytest.mark.parametrize("model", ["llama-mha", "llama-gqa", "bloom"])
def test_attention_weighted_error_row_by_row(model):
    """By definition: the variance of score errors under each softmax row, and what A (V − V̂) W_O leaves."""
    moments, activations = calibrated(model)[0], calibrated(model)[1][LAYER]
    heads, found = list(range(moments.source.kv_heads)), make(model, "attention-weighted", rank=5)
    rows = activations.attention.transpose(0, 1).flatten(1, 2)  # [query heads, batch * tokens, tokens]
    tokens = rows.shape[-1]
    for side, kind in ((found.keys, "keys_post"), (found.values, "values")):
        x = stacked(model, kind)
        rest = (x - through(x, side)).unflatten(0, (-1, tokens))  # [batch, tokens, d]
        rest = rest.repeat_interleave(tokens, 0)  # one copy a query: [batch * tokens, tokens, d]
        mean = torch.einsum("jqm,qmd->jqd", rows, rest)
        if kind == "values":
            expected = sum(output_error(model, mean[j], heads) for j in range(len(rows))) / len(rows)
        else:
            off = rest - mean[:, :, None]  # [query heads, queries, tokens, d]
            spread = torch.einsum("jqm,jqmd,jqme->de", rows, off, off) / rows[..., 0].numel()
            weight = torch.block_diag(*basis.readers(moments, "queries_post", LAYER, heads))
            expected = (spread @ weight).trace()
        assert side.error == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("model", ["llama-mha", "llama-gqa"])
def test_commuting_error_is_a_mean_over_angles(model):
    """Queries turned by a random angle in every frequency: the squared score error has this mean, exactly."""
    heads = list(range(calibrated(model)[0].source.kv_heads))
    found = make(model, "commuting", rank=6)
    keys = stacked(model, "keys_post")
    rest = (keys - through(keys, found.keys)).unflatten(1, (len(heads), 2, -1))
    queries = calibrated(model)[1][LAYER].queries_post.transpose(0, 1).flatten(1, 2).unflatten(2, (2, -1))
    share, expected = len(queries) // len(heads), 0
    for j, query in enumerate(queries):  # [tokens, 2, d_h / 2]; half of |q|²|e|² is the mean over the angle
        size = query.square().sum(1).mean(0) * rest[:, j // share].square().sum(1).mean(0) / 2
        expected += size.sum()
    assert found.keys.error == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("model, name", cases(methods=("weight-svd",)))
def test_weight_svd_is_the_svd_of_the_weights(model, name):
    found = make(model, name, rank=5)
    for kind, side in (("keys_weight", found.keys), ("values_weight", found.values)):
        whole = calibrated(model)[0].spectrum(kind, LAYER)
        assert side.error == pytest.approx(float(whole[5:].sum()), rel=1e-9)
    if model != "bloom":
        attention = tiny.MODELS[model]().model.layers[LAYER].self_attn
        right = torch.linalg.svd(attention.k_proj.weight.detach().T).Vh[:5]
        assert torch.allclose(found.keys.encode @ found.keys.decode, right.T @ right)


# -- equivalences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, name", cases())
def test_full_rank_is_the_identity(model, name):
    """One head alone for pooling, all heads for the rest: nothing is lost, on any text."""
    heads = [0] if name in (*POOLED, "commuting-stock") else None
    n, d_h = len(heads or range(calibrated(model)[0].source.kv_heads)), calibrated(model)[0].source.head_dim
    found = make(model, name, rank=n * d_h, heads=heads)
    for side in (found.keys, found.values):
        assert torch.allclose(side.encode @ side.decode, torch.eye(n * d_h, dtype=torch.float64), atol=1e-10)
        assert side.error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("model, name", cases())
def test_encoding_what_was_decoded_gives_it_back(model, name):
    """decode @ encode = 1 and unit columns, so a cached row stands for itself and keeps its size."""
    found = make(model, name, rank=6)
    for side in (found.keys, found.values):
        rank = side.encode.shape[1]
        assert torch.allclose(side.decode @ side.encode, torch.eye(rank, dtype=torch.float64), atol=1e-10)
        if name not in POOLED:
            assert torch.allclose(side.encode.norm(dim=0), torch.ones(rank, dtype=torch.float64))


def test_activation_svd_is_the_svd_of_stacked_activations():
    found = make("llama-mha", "activation-svd", rank=7)
    for kind, side in (("keys_post", found.keys), ("values", found.values)):
        right = torch.linalg.svd(stacked("llama-mha", kind), full_matrices=False).Vh[:7]
        assert torch.allclose(side.encode @ side.decode, right.T @ right, atol=1e-9)
        assert torch.allclose(side.encode, side.decode.T)


@pytest.mark.parametrize("model", ["llama-mha", "llama-gqa", "llama-mqa-bias", "bloom"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_one_head_is_kq_svd(model, rank):
    """Against the SVD of K Qᵀ itself, with the queries of all heads that read this key head below one another."""
    activations = calibrated(model)[1][LAYER]
    share = activations.queries_post.shape[1] // activations.keys_post.shape[1]
    keys = stacked(model, "keys_post", [0])
    queries = (
        activations.queries_post[:, :share].transpose(0, 1).flatten(0, 2)
    )  # [share * batch * tokens, d_h]
    left, sigma, right = torch.linalg.svd(keys @ queries.T, full_matrices=False)
    found = make(model, "score-weighted", rank=rank, heads=[0]).keys
    best = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    assert torch.allclose(through(keys, found) @ queries.T, best, atol=1e-9)
    assert found.error * len(keys) * len(queries) / share == pytest.approx(
        float(sigma[rank:].square().sum()), abs=1e-9
    )


@given(seeds, st.integers(1, 6))
def test_equal_weights_are_no_weights(seed, rank):
    x = random(seed, 20, 6)
    weights = 3.0 * torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    plain, weighted = optimal.best_projection(x.T @ x, rank), optimal.best_projection(x.T @ x, rank, weights)
    assert torch.allclose(plain.encode @ plain.decode, weighted.encode @ weighted.decode, atol=1e-7)
    assert weighted.error == pytest.approx(3 * plain.error, abs=1e-9)


@given(seeds, st.integers(0, 5))
def test_weighted_error_is_the_tail_and_the_trace(seed, rank):
    x, w = random(seed, 20, 6), random(seed + 1, 3, 4, 2)
    gram, weights = x.T @ x, w.mT @ w
    values, encode, decode = optimal.directions(gram, weights)
    direct = objective(gram, weights, encode[:, :rank], decode[:rank])
    assert direct == pytest.approx(float(values[rank:].sum()), rel=1e-6)
    assert torch.allclose(encode @ decode, torch.eye(6, dtype=torch.float64), atol=1e-7)


@pytest.mark.parametrize("model", ["llama-mha", "bloom"])
def test_mean_pool_is_the_average(model):
    found = make(model, "mean-pool", heads=[0, 1, 3])
    for kind, side in (("keys_post", found.keys), ("values", found.values)):
        x = stacked(model, kind, [0, 1, 3]).unflatten(1, (3, -1))
        assert torch.allclose(x.flatten(1) @ side.encode, x.mean(1))
        assert torch.allclose(x.mean(1).repeat(1, 3), x.flatten(1) @ side.encode @ side.decode)


def test_procrustes_undoes_a_turn():
    """Heads that are one head turned lose nothing; a random text's heads lose less than by the plain mean."""
    turns = torch.linalg.qr(random(0, 3, 4, 4)).Q
    base = random(1, 50, 4)
    x = torch.cat([base @ turn for turn in turns], 1)
    aligned = procrustes.align(x.T @ x, 3)
    assert torch.allclose(base @ turns[1] @ aligned[1], base @ turns[0])
    for model in ("llama-mha", "bloom"):
        found, plain = make(model, "procrustes"), make(model, "mean-pool")
        assert found.keys.error < plain.keys.error
        assert found.values.error < plain.values.error


@pytest.mark.parametrize("model", ["llama-mha", "llama-gqa", "bloom"])
def test_procrustes_only_turns(model):
    n, found = calibrated(model)[0].source.kv_heads, make(model, "procrustes")
    for side in (found.keys, found.values):
        for turn in side.decode.T.chunk(n):  # [d_h, d_h]
            assert torch.allclose(turn @ turn.T, torch.eye(len(turn), dtype=torch.float64))
        assert torch.allclose(side.encode * n, side.decode.T)


@pytest.mark.parametrize("model, name", cases(("llama-mha", "llama-gqa"), COMMUTING))
def test_encoding_commutes_with_rope(model, name):
    """Rotate then encode = encode then rotate with the latents' own frequencies, near and far."""
    side = make(model, name, rank=10).keys
    rotary = tiny.MODELS[model]().model.rotary_emb
    x = stacked(model, "keys_pre")[:6]  # [6, d]
    n, d_h = calibrated(model)[0].source.kv_heads, calibrated(model)[0].source.head_dim
    positions = torch.tensor([0, 1, 17, 511, 8191, 1_000_003], dtype=torch.float64)
    angles = positions[:, None] * rotary.inv_freq.double()  # [6, d_h / 2]

    def rotated(heads, angles):
        """[6, heads, width] by the library's own function."""
        twice = torch.cat([angles, angles], 1)
        return apply_rotary_pos_emb(heads, heads, twice.cos(), twice.sin())[1]

    late = rotated(x.unflatten(1, (n, d_h)), angles).flatten(1) @ side.encode
    early = rotated((x @ side.encode)[:, None], angles[:, side.frequencies])[:, 0]
    assert torch.allclose(late, early, atol=1e-10)
    if name in ("mean-pool", "procrustes", "commuting-stock"):  # what is cached turns like an ordinary head
        assert side.frequencies.tolist() == list(range(d_h // 2))


def test_other_bases_do_not_claim_to_commute():
    for name in ("weight-svd", "activation-svd", "score-weighted", "attention-weighted", "blockwise"):
        assert make("llama-mha", name, rank=4).keys.frequencies is None
    assert all(make("bloom", name, rank=4).keys.frequencies is None for name in POOLED)


def test_complex_moments_do_not_see_rope():
    """The same from keys before and after RoPE, and the mean of z̄ᵀz by its definition."""
    moments, n = calibrated("llama-mha")[0], 4
    before, after = (pairs.complex_gram(moments.matrix(kind, LAYER), n) for kind in ("keys_pre", "keys_post"))
    x = stacked("llama-mha", "keys_pre").unflatten(1, (n, 2, -1))
    z = torch.complex(x[:, :, 0], x[:, :, 1]).permute(2, 0, 1)  # [d_h / 2, tokens, n]
    assert torch.allclose(before, z.mH @ z / z.shape[1])
    assert torch.allclose(before, after)


def test_centring_keys_is_invisible_to_softmax():
    """Nothing subtracted, nothing added: the scores of a query move by one constant."""
    found, keys = (
        make("llama-gqa", "score-weighted", rank=5, centred=True).keys,
        stacked("llama-gqa", "keys_post"),
    )
    with_mean, without = through(keys, found), keys @ found.encode @ found.decode
    shift = (with_mean - without) @ random(0, keys.shape[1])
    assert torch.allclose(shift, shift[:1].expand_as(shift))


# -- optimality: a random change never helps ----------------------------------------------------------------


def drawn(seed: int, n: int = 3, d_h: int = 2, complex: bool = False):
    """Moments with some numerically empty directions, and weights of rank one or two."""
    x = random(seed, 30, n * d_h, complex=complex) @ random(seed + 1, n * d_h, n * d_h, complex=complex)
    w = random(seed + 2, n, 2, d_h)
    return x.mH @ x / 30, w.mT @ w


@settings(max_examples=60)
@given(seeds, st.integers(1, 5), st.floats(1e-4, 10), st.booleans())
def test_no_change_of_a_weighted_basis_helps(seed, rank, size, complex):
    gram, weights = drawn(seed, complex=complex)
    values, encode, decode = optimal.directions(gram, weights)
    encode, decode, error = encode[:, :rank], decode[:rank], float(values[rank:].sum())
    slack = 1e-9 * float(values.sum())
    changes = (
        (encode + size * random(seed + 3, *encode.shape, complex=complex), decode),
        (encode, decode + size * random(seed + 4, *decode.shape, complex=complex)),
        (
            encode + size * random(seed + 5, *encode.shape, complex=complex),
            decode + size * random(seed + 6, *decode.shape, complex=complex),
        ),
    )
    for pair in changes:
        assert objective(gram, weights, *pair) >= error - slack
    # Another subspace, with the best decoder that it allows: D = (Eᵀ G E)⁻¹ Eᵀ G.
    other = encode + size * random(seed + 7, *encode.shape, complex=complex)
    fitted = torch.linalg.solve(other.mH @ gram @ other, other.mH @ gram)
    assert objective(gram, weights, other, fitted) >= error - slack


@settings(max_examples=40)
@given(st.sampled_from(["activation-svd", "score-weighted"]), seeds, st.floats(1e-3, 1))
def test_no_other_basis_and_no_other_mean_does_better_on_the_text(name, seed, size):
    """The same on the stored activations of a model, centred, with the mean changed as well."""
    heads, x = list(range(4)), stacked("llama-mha", "keys_post")
    side = make("llama-mha", name, rank=6, centred=True).keys
    mean = side.mean + size * random(seed, 64)
    encode = side.encode + size * random(seed + 1, *side.encode.shape)
    for m, e in ((mean, side.encode), (side.mean, encode), (mean, encode)):
        rest = x - ((x - m) @ e @ side.decode + m)
        found = (
            score_error("llama-mha", rest, heads) if name == "score-weighted" else rest.square().sum(1).mean()
        )
        assert found >= side.error * (1 - 1e-9)


@settings(max_examples=40)
@given(st.sampled_from(["commuting", "commuting-attended", "commuting-stock"]), seeds, st.integers(1, 15))
def test_no_other_split_of_ranks_over_frequencies_does_better(name, seed, half):
    """Water-filling against a random split, each frequency at its own best; stock against its own kind."""
    moments = calibrated("llama-mha")[0]
    found = make("llama-mha", name, rank=2 * half).keys
    gram = moments.matrix("keys_post" if name == "commuting" else "keys_attended", LAYER)
    queries = basis.readers(moments, "queries_post", LAYER, [0, 1, 2, 3]).diagonal(dim1=1, dim2=2)
    power = queries.unflatten(1, (2, 8)).sum(1).T / 2  # [8, 4]
    each = pairs.complex_gram(gram, 4) * (power[:, :, None] * power[:, None]).sqrt()
    values = torch.linalg.eigvalsh(each).flip(1)  # [8, 4]
    if name == "commuting-stock":
        assert found.error == pytest.approx(float(values[:, 1:].sum()), rel=1e-9)
        return
    chosen = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:half]
    assert found.error <= float(values.ravel().index_fill(0, chosen, 0).sum()) * (1 + 1e-9)
    assert found.error == pytest.approx(float(values.ravel().sort().values[: 32 - half].sum()), rel=1e-9)


@settings(max_examples=40)
@given(seeds, st.floats(1e-4, 1), st.booleans())
def test_no_turn_of_one_head_and_no_mix_of_heads_does_better(seed, size, complex):
    """Procrustes: any turn of any head; two heads: any turn of both. Pooling: any other encoder for its decoder."""
    for n in (2, 3):
        gram, m = drawn(seed, n, 2, complex)[0], 2
        turns = procrustes.align(gram, n)

        def gain(turns, gram=gram):
            wide = turns.flatten(0, 1)  # [n · m, m]
            return float((wide.mH @ gram @ wide).trace().real)

        skew = size * random(seed + 3, n, m, m, complex=complex)
        other = turns @ torch.linalg.matrix_exp(skew - skew.mH)
        for i in range(n):
            one = turns.clone()
            one[i] = other[i]
            assert gain(one) <= gain(turns) * (1 + 1e-7)
        if n == 2:
            assert gain(other) <= gain(turns) * (1 + 1e-7)
    side = make("llama-mha", "mean-pool").values
    gram = calibrated("llama-mha")[0].matrix("values", LAYER)
    encode = side.encode + size * random(seed + 4, *side.encode.shape)
    assert basis.lost(gram, encode, side.decode) >= side.error * (1 - 1e-12)


def test_each_method_wins_on_its_own_objective():
    """Across methods, at one rank: SVD-a by plain error, score-weighted by scores, att under attention."""
    moments, heads = calibrated("llama-mha")[0], [0, 1, 2, 3]
    queries = basis.readers(moments, "queries_post", LAYER, heads)
    names = ("weight-svd", "activation-svd", "score-weighted", "attention-weighted", "commuting")
    for winner, kind, weights in (
        ("activation-svd", "keys_post", None),
        ("score-weighted", "keys_post", queries),
        ("attention-weighted", "keys_attended", queries),
    ):
        gram = moments.matrix(kind, LAYER)
        errors = {}
        for name in names:
            side = make("llama-mha", name, rank=8).keys
            errors[name] = objective(gram, weights, side.encode, side.decode)
        assert min(errors, key=errors.get) == winner


# -- moments that are hard on numerics ----------------------------------------------------------------------


def broken(model: str, how: str) -> Moments:
    """Copies of a model's moments, spoiled."""
    moments = calibrated(model)[0]
    parts = {
        name: {k: t.clone() for k, t in getattr(moments, name).items()}
        for name in ("total", "gram", "weight")
    }
    one, d_h = random(3, moments.source.kv_heads * moments.source.head_dim), moments.source.head_dim
    for part in (parts["gram"], parts["weight"]):
        for tensor in part.values():
            if how == "zero":
                tensor.zero_()
            elif how == "tiny":
                tensor *= 1e-12
            elif how == "huge":
                tensor *= 1e12
            elif how == "rank one":
                row = one[: tensor.shape[-1]]
                tensor[:] = row.outer(row)
            elif how == "one dead head":
                tensor[..., :d_h] = 0
                tensor[..., :d_h, :] = 0
            elif how == "badly scaled":
                scale = torch.logspace(-8, 8, tensor.shape[-1], dtype=torch.float64)
                tensor *= scale * scale[:, None]
    for tensor in parts["total"].values():
        tensor *= {"zero": 0, "tiny": 1e-6, "huge": 1e6}.get(how, 1)
    return Moments(moments.source, moments.count, *parts.values())


@pytest.mark.parametrize("how", ["zero", "tiny", "huge", "rank one", "one dead head", "badly scaled"])
@pytest.mark.parametrize("model, name", cases(("llama-gqa", "bloom")))
def test_spoiled_moments_give_finite_bases(model, name, how):
    moments = broken(model, how)
    heads, d_h = list(range(moments.source.kv_heads)), moments.source.head_dim
    full = len(heads) * d_h
    for rank in (d_h,) if name in (*POOLED, "commuting-stock") else (2, full - 2, full):
        found = method(name)(moments, LAYER, heads, rank, rank)
        for side in (found.keys, found.values):
            for tensor in (side.encode, side.decode, torch.tensor(side.error)):
                assert torch.isfinite(tensor).all()
            assert side.error >= 0
            if rank == full:  # rank that the text does not fill is filled all the same
                wrong = side.encode @ side.decode - torch.eye(full, dtype=torch.float64)
                # Scales 1e16 apart make a decoder that large; rounding of the product grows with it.
                assert wrong.abs().max() <= 1e-6 * max(1, side.decode.abs().max())


@pytest.mark.parametrize(
    "name", ["activation-svd", "score-weighted", "attention-weighted", "blockwise", "commuting"]
)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_a_scale_changes_nothing_but_the_error(name, factor):
    plain = make("llama-gqa", name, rank=6)
    scaled = method(name)(broken("llama-gqa", "tiny" if factor < 1 else "huge"), LAYER, [0, 1], 6, 6)
    for a, b in ((plain.keys, scaled.keys), (plain.values, scaled.values)):
        assert torch.allclose(a.encode @ a.decode, b.encode @ b.decode, atol=1e-8)
        times = factor if name == "activation-svd" else factor**2
        assert b.error == pytest.approx(a.error * times, rel=1e-6)


@settings(max_examples=40)
@given(seeds, st.integers(1, 4), st.integers(1, 6))
def test_rank_left_over_goes_to_the_plain_error(seed, seen, rank):
    """Weights that see few directions: those first and exactly, then the largest of what nobody weighed."""
    gram, _ = drawn(seed)
    w = random(seed + 2, 3, 1, 2)
    w[seen - 3 :] = 0 if seen < 3 else w[seen - 3 :]
    weights = w.mT @ w
    values, encode, decode = optimal.directions(gram, weights)
    felt = min(seen, 3)
    assert int((values > 0).sum()) == felt
    if rank >= felt:
        assert objective(gram, weights, encode[:, :rank], decode[:rank]) <= 1e-9 * float(values.sum())
    rest = torch.eye(6, dtype=gram.dtype) - encode[:, :felt] @ decode[:felt]
    tail = torch.linalg.eigvalsh(rest.T @ gram @ rest).flip(0)  # principal components of what was left
    assert torch.allclose(encode.norm(dim=0), torch.ones(6, dtype=gram.dtype))
    for r in range(felt, 7):
        plain = basis.lost(gram, encode[:, :r], decode[:r])
        assert plain == pytest.approx(float(tail[r - felt :].sum()), abs=1e-9 * float(tail.sum()))


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "heads, shown", [([], r"\[\]"), ([0, 0], r"\[0, 0\]"), ([2], r"\[2\]"), ([-1], r"\[-1\]")]
)
def test_heads_that_make_no_group_are_refused(name, heads, shown):
    with pytest.raises(
        ValueError, match=rf"heads is {shown}; it must be one or more different .* from 0 to 1"
    ):
        method(name)(calibrated("llama-gqa")[0], 0, heads, 16, 16)


@pytest.mark.parametrize("side", ["key_rank", "value_rank"])
@pytest.mark.parametrize("rank", [0, -2, 34, 2.0])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in POOLED])
def test_ranks_out_of_range_are_refused(name, side, rank):
    ranks = {"key_rank": 16, "value_rank": 16} | {side: rank}
    with pytest.raises(
        ValueError, match=rf"{side} is {rank}; it must be a whole number from 1 to 32 for 2 heads"
    ):
        method(name)(calibrated("llama-gqa")[0], 0, [0, 1], **ranks)


@pytest.mark.parametrize("name", POOLED)
def test_pooling_has_one_rank(name):
    for ranks, side in (((8, 16), "key_rank"), ((16, 8), "value_rank")):
        with pytest.raises(
            ValueError, match=rf"{side} is 8; {name} makes one head of the group, so it must be 16"
        ):
            method(name)(calibrated("llama-gqa")[0], 0, [0, 1], *ranks)


def test_other_mistakes_are_named():
    moments, _ = calibrated("llama-gqa")
    with pytest.raises(
        LookupError, match="no basis 'svd'; it is one of mean-pool, procrustes, weight-svd, activ"
    ):
        method("svd")
    with pytest.raises(ValueError, match="key_rank is 7; RoPE turns pairs, so it must be even"):
        method("commuting")(moments, 0, [0, 1], 7, 7)
    with pytest.raises(ValueError, match="key_rank is 8; for one direction a frequency it must be 16"):
        method("commuting-stock")(moments, 0, [0, 1], 8, 8)
    with pytest.raises(ValueError, match="a bloom model has no RoPE to commute with"):
        method("commuting")(calibrated("bloom")[0], 0, [0, 1], 8, 8)
    for name in ("weight-svd", "attention-weighted", "blockwise", "commuting-attended", "commuting-stock"):
        with pytest.raises(ValueError, match="centred must be False"):
            method(name)(moments, 0, [0, 1], 16, 16, centred=True)
    with pytest.raises(IndexError, match="layer 3 does not exist: the model has layers 0 to 2"):
        method("activation-svd")(moments, 3, [0, 1], 8, 8)
    with pytest.raises(ValueError, match="seen no token"):
        method("activation-svd")(Moments.zeros(moments.source), 0, [0, 1], 8, 8)
    plain = calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(), progress=False)
    for name in ("attention-weighted", "commuting-attended"):
        with pytest.raises(ValueError, match=r"no moments of 'keys_attended'.*calibrate with attention=True"):
            method(name)(plain, 0, [0, 1], 8, 8)


def test_blockwise_without_rope_is_attention_weighted_and_reads_keys_of_its_own_with_it():
    plain, blocks = (make("bloom", name, rank=6) for name in ("attention-weighted", "blockwise"))
    assert torch.equal(plain.keys.encode, blocks.keys.encode) and torch.equal(
        plain.values.decode, blocks.values.decode
    )
    moments = calibrated("llama-mha")[0]
    found = method("blockwise")(moments, LAYER, [0, 1, 2, 3], 8, 8).keys
    gram = moments.matrix("keys_in_blocks", LAYER)
    queries = basis.readers(moments, "queries_in_blocks", LAYER, [0, 1, 2, 3])
    assert found.error == pytest.approx(objective(gram, queries, found.encode, found.decode))


def test_docstrings():
    for module in (bases, optimal, pairs, procrustes, basis):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed
