"""Streamed moments are the moments of the stored activations, however they were streamed, stopped or summed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvteach import calibration, sequential
from kvteach.activations import attention_modules, record
from kvteach.bases import METHODS, reads
from kvteach.calibration import calibrate
from kvteach.moments import ATTENDED, IN_BLOCKS, PLAIN, WEIGHTS, Moments, Source
from kvteach.rope import from_config, rotate


@pytest.fixture(params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def rows(activations, kind):
    """[batch, heads, tokens, d_h] -> [batch * tokens, heads * d_h]"""
    return getattr(activations, kind).transpose(1, 2).flatten(0, 1).flatten(1)


def same(a: Moments, b: Moments) -> bool:
    """Equal to the last bit."""
    return a.count == b.count and all(
        torch.equal(mine[kind], other[kind])
        for mine, other in ((a.gram, b.gram), (a.total, b.total), (a.weight, b.weight))
        for kind in mine.keys() | other.keys()
    )


def close(a: Moments, b: Moments) -> bool:
    """Equal up to float64 rounding."""
    return a.count == b.count and all(
        torch.allclose(mine[kind], other[kind])
        for mine, other in ((a.gram, b.gram), (a.total, b.total))
        for kind in mine
    )


def test_streamed_equals_stored(model):
    ids = tiny.ids(5, 11)
    moments = calibrate(model, ids, batch=2, progress=False)
    stored = record(model, ids)
    for layer, activations in enumerate(stored):
        for kind in ("keys_pre", "keys_post", "values"):
            x = rows(activations, kind)
            assert torch.allclose(moments.matrix(kind, layer), x.T @ x / len(x))
            assert torch.allclose(moments.mean(kind, layer).ravel(), x.mean(0))
            assert torch.allclose(moments.matrix(kind, layer, centred=True), torch.cov(x.T, correction=0))
            singular = torch.linalg.svdvals(x)
            assert torch.allclose(
                moments.spectrum(kind, layer)[: len(singular)], singular**2 / len(x), atol=1e-12
            )
        for head in range(model.config.num_attention_heads):
            x = activations.queries_post[:, head].flatten(0, 1)
            assert torch.allclose(moments.matrix("queries_post", layer, head), x.T @ x / len(x))
            assert torch.allclose(
                moments.matrix("queries_post", layer, head, centred=True), torch.cov(x.T, correction=0)
            )


def test_attended_moments_by_their_definition(model):
    """One softmax row at a time, as the definition says: a covariance for keys, an outer product for values."""
    ids = tiny.ids(2, 7)
    moments = calibrate(model, ids, attention=True, progress=False)
    for layer, activations in enumerate(record(model, ids, attention=True)):
        keys = activations.keys_post.transpose(1, 2).flatten(2)  # [batch, tokens, width]
        values = activations.values.transpose(1, 2).flatten(2)
        spread = torch.zeros_like(moments.gram["keys_attended"][layer])
        read = torch.zeros_like(spread)
        batch, heads, tokens, _ = activations.attention.shape
        for b, j, q in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(tokens)):
            row = activations.attention[b, j, q].double()
            spread += torch.cov(keys[b].T, aweights=row, correction=0) / heads
            read += (row @ values[b]).outer(row @ values[b]) / heads
        assert torch.allclose(moments.gram["keys_attended"][layer], spread, atol=1e-7)
        assert torch.allclose(moments.gram["values_attended"][layer], read, atol=1e-7)


def test_moments_in_blocks_by_their_definition(monkeypatch):
    """One row and block at a time; those that sequential conversion sums for each query head add up to them."""
    block = 4
    monkeypatch.setattr(calibration, "BLOCK", block)
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids(2, 11)
    turns, moments = from_config(model.config), calibrate(model, ids, attention=True, progress=False)
    place = torch.arange(11) % block
    for layer, seen in enumerate(record(model, ids, attention=True)):
        keys = rotate(seen.keys_pre, place, turns).transpose(1, 2).flatten(2)  # [batch, tokens, width]
        spread, met = (torch.zeros_like(moments.gram[kind][layer]) for kind in IN_BLOCKS)
        heads = seen.attention.shape[1]
        for b, j, q, start in torch.cartesian_prod(
            *map(torch.arange, (2, heads, 11)), torch.arange(0, 11, block)
        ):
            row = seen.attention[b, j, q, start : start + block]
            inside = keys[b, start : start + block]
            spread += (inside.T @ (row[:, None] * inside) - (row @ inside).outer(row @ inside)) / heads
            query = rotate(seen.queries_pre[b, j, q][None], q - start, turns)[0]
            met[j] += row.sum() * query.outer(query)
        torch.testing.assert_close(moments.gram["keys_in_blocks"][layer], spread, rtol=0, atol=1e-6)
        torch.testing.assert_close(moments.gram["queries_in_blocks"][layer], met, rtol=0, atol=1e-6)
        rows = [replace(seen, **{name: x[b : b + 1] for name, x in vars(seen).items()}) for b in (0, 1)]
        apart = sequential._empty([0, 1], moments.source, "cpu")
        for row in rows:
            sequential._add(apart, row, [0, 1], list(range(heads)), block, turns)
        torch.testing.assert_close(apart[:, 0].sum(0) / heads, spread, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            sum(sequential._queries(row, block, turns) for row in rows), met, rtol=0, atol=1e-6
        )
        plain = sum(sequential._queries(row, None, None) for row in rows)
        torch.testing.assert_close(plain, moments.gram["queries_post"][layer])


def test_moments_for_one_basis_are_all_that_it_reads(model):
    """Sums of those kinds and no others; the same basis comes of them, and of fewer none."""
    ids, rotates = tiny.ids(2, 7), model.config.model_type != "bloom"
    for name in METHODS:
        if name.startswith("commuting") and not rotates:
            continue
        few = calibrate(model, ids, attention=name, progress=False)
        weighted = any(kind.endswith(("attended", "in_blocks")) for kind in few.gram)
        everything = calibrate(model, ids, attention=weighted, progress=False)
        assert few.gram.keys() | few.weight.keys() == set(reads(name, rotates))
        assert all(torch.equal(few.gram[kind], everything.gram[kind]) for kind in few.gram)
        assert all(torch.equal(few.weight[kind], everything.weight[kind]) for kind in few.weight)
        find, heads, rank = METHODS[name], list(range(few.source.kv_heads)), few.source.head_dim
        made = [find(m, 0, heads, rank, rank) for m in (few, everything)]
        assert torch.equal(made[0].keys.encode, made[1].keys.encode)
        for kind in reads(name, rotates):
            gram, weight = ({k: held[k] for k in held if k != kind} for held in (few.gram, few.weight))
            with pytest.raises(ValueError, match=f"no moments of '{kind}'.*calibrate with attention=True"):
                find(Moments(few.source, few.count, few.total, gram, weight), 0, heads, rank, rank)
    with pytest.raises(LookupError, match="no basis 'svd'"):
        calibrate(model, ids, attention="svd", progress=False)


def test_keys_shifted_alike_leave_the_attended_covariance():
    """What softmax cannot see, the attended covariance must not count: here a bias on every key, without RoPE."""
    model = tiny.MODELS["bloom"]()
    before = calibrate(model, tiny.ids(), attention=True, progress=False)
    fused = model.transformer.h[0].self_attention.query_key_value
    with torch.no_grad():
        fused.bias.unflatten(0, (4, 3, 16))[:, 1] += 3.0
    after = calibrate(model, tiny.ids(), attention=True, progress=False)
    assert not torch.allclose(before.gram["keys_post"][0], after.gram["keys_post"][0])
    assert torch.allclose(before.gram["keys_attended"][0], after.gram["keys_attended"][0], atol=1e-6)


def test_weights_by_what_the_projections_do(model):
    """A unit vector for every input sums to W_Kᵀ W_K; the output's change for a change of head j's values is W_O^j."""
    moments, config = calibrate(model, tiny.ids(), progress=False), model.config
    white, width = torch.eye(config.hidden_size, dtype=torch.float64), moments.source.head_dim
    with torch.no_grad():
        for layer, module in enumerate(attention_modules(model)):
            if config.model_type == "bloom":
                fused, output = module.query_key_value, module.dense
                made = (fused(white) - fused.bias).unflatten(1, (4, 3, 16))
                keys, values = made[:, :, 1].flatten(1), made[:, :, 2].flatten(1)
            else:
                keys, values = (p(white) - p(0 * white) for p in (module.k_proj, module.v_proj))
                output = module.o_proj
            assert torch.allclose(moments.matrix("keys_weight", layer), keys.T @ keys)
            assert torch.allclose(moments.matrix("values_weight", layer), values.T @ values)
            for j in range(config.num_attention_heads):
                change = torch.zeros(width, config.num_attention_heads, width, dtype=torch.float64)
                change[:, j] = torch.eye(width)
                felt = output(change.flatten(1)) - output(0 * change.flatten(1))
                assert torch.allclose(moments.matrix("outputs_weight", layer, j), felt @ felt.T)


def test_weights_are_not_summed():
    model = tiny.MODELS["llama-gqa"]()
    one, two = (calibrate(model, tiny.ids(seed=seed), progress=False) for seed in (1, 2))
    for kind in WEIGHTS:
        assert torch.equal((one + two).weight[kind], one.weight[kind])
        assert torch.equal((Moments.zeros(one.source) + two).weight[kind], one.weight[kind])


def test_batch_size_and_order_do_not_matter(model):
    ids = tiny.ids(6, 9)
    one = calibrate(model, ids, batch=1, attention=True, progress=False)
    assert close(one, calibrate(model, ids, batch=4, attention=True, progress=False))
    assert close(one, calibrate(model, ids.flip(0), batch=3, attention=True, progress=False))


@settings(max_examples=10)
@given(cut=st.integers(1, 5))
def test_sums_add_up(cut):
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids(6, 5)
    parts = [calibrate(model, part, progress=False) for part in (ids[:cut], ids[cut:])]
    assert close(parts[0] + parts[1], calibrate(model, ids, progress=False))
    assert close(parts[0] + parts[1], parts[1] + parts[0])


def test_reach_is_the_longest_window(tmp_path):
    model = tiny.MODELS["llama-gqa"]()
    short, long = (calibrate(model, tiny.ids(2, tokens), progress=False) for tokens in (5, 9))
    assert (short.reach, long.reach, (short + long).reach, (long + short).reach) == (5, 9, 9, 9)
    (short + long).save(tmp_path / "both")
    assert Moments.load(tmp_path / "both").reach == 9
    assert Moments.zeros(short.source).reach == 0


def test_memory_does_not_grow_with_tokens():
    model = tiny.MODELS["llama-gqa"]()
    sizes = set()
    for windows in (1, 4, 16):
        moments = calibrate(model, tiny.ids(windows, 8), progress=False)
        sizes.add(sum(t.nbytes for part in (moments.gram, moments.total) for t in part.values()))
    assert len(sizes) == 1


def test_float32_models_are_summed_in_float64():
    """In float32 the small directions of keys that are nearly the same would drown; here they come out right."""
    model = tiny.MODELS["bloom"](dtype=torch.float32)
    with torch.no_grad():
        model.transformer.h[0].self_attention.query_key_value.bias.unflatten(0, (4, 3, 16))[:, 1] += 100.0
    ids = tiny.ids(4, 16)
    exact = rows(record(model, ids)[0], "keys_post").double()
    found = calibrate(model, ids, progress=False).spectrum("keys_post", 0)
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.linalg.svdvals(exact).square() / len(exact), rtol=1e-6, atol=1e-9)


# -- bad input --------------------------------------------------------------------------------------------


def test_nan_is_refused_with_its_place():
    model = tiny.MODELS["llama-gqa"]()
    model.model.embed_tokens.weight.data[7] = float("nan")
    ids = torch.ones(6, 5, dtype=torch.long)
    ids[3, 2] = 7
    with pytest.raises(ValueError, match=r"layer 0, batch 1: keys_pre hold NaN or infinity"):
        calibrate(model, ids, batch=2, progress=False)


@pytest.mark.parametrize(
    "windows",
    [
        torch.ones(5),
        torch.ones(0, 5, dtype=torch.long),
        torch.ones(5, 0, dtype=torch.long),
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.bool),
    ],
)
def test_windows_of_a_wrong_shape_are_refused(windows):
    with pytest.raises(ValueError, match=r"windows must be token ids \[windows, tokens\], at least one"):
        calibrate(tiny.MODELS["llama-gqa"](), windows, progress=False)


def test_moments_of_different_models_do_not_mix():
    ids = tiny.ids()
    gqa = calibrate(tiny.MODELS["llama-gqa"](), ids, progress=False)
    with pytest.raises(ValueError, match="two models"):
        gqa + calibrate(tiny.MODELS["llama-mha"](), ids, progress=False)
    other = tiny.MODELS["llama-gqa"]()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3  # as after one small step of fine-tuning
    with pytest.raises(ValueError, match="two models"):
        gqa + calibrate(other, ids, progress=False)
    with pytest.raises(ValueError, match="keys_attended, keys_in_blocks, queries_in_blocks, values_attended"):
        gqa + calibrate(tiny.MODELS["llama-gqa"](), ids, attention=True, progress=False)


def test_a_model_is_known_by_every_weight_in_its_dtype():
    model = tiny.MODELS["llama-gqa"]()
    assert Source.of(model) == Source.of(tiny.MODELS["llama-gqa"]()) == Source.of(model.model)
    assert Source.of(model) != Source.of(tiny.MODELS["llama-gqa"](dtype=torch.bfloat16))
    slower = tiny.MODELS["llama-gqa"]()
    slower.model.rotary_emb.inv_freq *= 0.5  # other positions, the same weights
    assert Source.of(model) != Source.of(slower)


def test_weights_without_numbers_are_named():
    with torch.device("meta"):
        model = tiny.MODELS["llama-gqa"]()
    with pytest.raises(ValueError, match=r"embed_tokens.weight holds no numbers: load the model with"):
        calibrate(model, tiny.ids(), progress=False)


def test_a_model_in_training_is_measured_without_dropout_and_keeps_its_modes():
    model = tiny.MODELS["llama-gqa"]()
    exact = calibrate(model, tiny.ids(), progress=False)
    for module in attention_modules(model):
        module.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert same(calibrate(model, tiny.ids(), progress=False), exact)
    assert [module.training for module in model.modules()] == modes
    assert not record(model, tiny.ids())[2].values.requires_grad
    assert torch.equal(record(model, tiny.ids())[2].values, record(model, tiny.ids())[2].values)


def test_attended_sums_of_half_precision_models_are_formed_in_float32():
    """The same bfloat16 activations, summed from their definition: rounding each product would be off by 1e-3."""
    model, ids = tiny.MODELS["llama-gqa"](dtype=torch.bfloat16), tiny.ids(1, 9)
    found = calibrate(model, ids, attention=True, progress=False).gram["values_attended"][0]
    layer = record(model, ids, attention=True)[0]
    values = layer.values.transpose(1, 2).flatten(2)[0].double()  # [tokens, width]
    read = layer.attention[0].double() @ values  # [heads, tokens, width]
    assert torch.allclose(found, (read.mT @ read).mean(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["list", "numpy", "int32"])
def test_windows_may_be_lists_or_arrays(kind):
    ids = tiny.ids()
    given = {"list": ids.tolist(), "numpy": ids.numpy(), "int32": ids.int()}[kind]
    model = tiny.MODELS["llama-gqa"]()
    assert same(calibrate(model, given, progress=False), calibrate(model, ids, progress=False))


def test_questions_without_an_answer_are_refused():
    moments = calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(), progress=False)
    with pytest.raises(ValueError, match="no moments of 'keys', only of keys_pre"):
        moments.matrix("keys", 0)
    with pytest.raises(ValueError, match="calibrate with attention=True"):
        moments.matrix("keys_attended", 0)
    with pytest.raises(IndexError, match="layers 0 to 2"):
        moments.matrix("values", 3)
    with pytest.raises(IndexError, match="head 2 does not exist: values have heads 0 to 1"):
        moments.matrix("values", 0, [0, 2])
    with pytest.raises(ValueError, match="no mean of 'keys_attended', only of keys_pre"):
        moments.mean("keys_attended", 0)
    with pytest.raises(IndexError, match="layers 0 to 2"):
        moments.mean("values", -1)
    assert torch.equal(moments.matrix("values", 0, numpy.int64(1)), moments.matrix("values", 0, [1]))
    with pytest.raises(ValueError, match="no token"):
        Moments.zeros(moments.source).matrix("values", 0)


def test_a_constant_text_gives_a_degenerate_spectrum_and_no_nan():
    moments = calibrate(
        tiny.MODELS["bloom"](), torch.ones(2, 6, dtype=torch.long), attention=True, progress=False
    )
    for kind in moments.gram:
        spectrum = moments.spectrum(kind, 0)
        assert torch.isfinite(spectrum).all()
        assert (spectrum >= 0).all()


# -- files ------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    moments = calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(), attention=True, progress=False)
    path = tmp_path / "new" / "moments.safetensors"
    moments.save(path)
    again = Moments.load(path)
    assert same(moments, again)
    assert again.source == moments.source
    assert set(again.gram) == set(PLAIN + ATTENDED + IN_BLOCKS)
    assert set(again.weight) == set(WEIGHTS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written beside it


def test_load_refuses_what_is_not_moments(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no moments at"):
        Moments.load(tmp_path / "nowhere")
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        Moments.load(junk)
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no moments of format"):
        Moments.load(tmp_path / "other")


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, ids, path = tiny.MODELS["llama-gqa"](), tiny.ids(7, 6), tmp_path / "moments"
    whole = calibrate(model, ids, batch=2, progress=False)
    passes = []

    def stop_in_the_third(*args, **kwargs):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop_in_the_third)  # in the middle of a batch
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ids, batch=2, path=path, progress=False)
    assert Moments.load(path).count == 2 * 2 * 6  # both finished batches, nothing of the third
    resumed = calibrate(model, ids, batch=2, path=path, progress=False)
    handle.remove()
    assert len(passes) == 3 + 2  # two batches were left
    assert same(resumed, whole)
    assert same(calibrate(model, ids, batch=2, path=path, progress=False), whole)  # finished: read, not run


def test_a_stop_inside_the_adding_saves_nothing_half_added(tmp_path, monkeypatch):
    model, ids, path = tiny.MODELS["llama-gqa"](), tiny.ids(3, 6), tmp_path / "moments"
    takes, take = [], Moments.take

    def stop_in_the_second(self, batch):
        takes.append(1)
        if len(takes) == 2:
            self.gram["values"] += 1  # begun
            raise KeyboardInterrupt
        take(self, batch)

    monkeypatch.setattr(Moments, "take", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ids, path=path, progress=False)
    monkeypatch.undo()
    assert same(Moments.load(path), calibrate(model, ids[:1], progress=False))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    moments, path = calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(), progress=False), tmp_path / "moments"
    moments.save(path)

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        moments.save(path)
    assert same(Moments.load(path), moments)
    assert [p.name for p in tmp_path.iterdir()] == ["moments"]


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids()
    first = calibrate(model, ids, path="~/moments", progress=False)
    model.model.layers[0].register_forward_pre_hook(lambda *args: 1 / 0)  # a second run must not be needed
    assert same(calibrate(model, ids, path="~/moments", progress=False), first)
    assert (tmp_path / "moments").is_file()


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL in the middle: whatever lies at the path is whole, and going on gives the sums of the whole text."""
    path = tmp_path / "moments"
    script = textwrap.dedent("""
        import sys, time
        import tiny
        from kvteach.calibration import calibrate
        model = tiny.MODELS["llama-gqa"]()
        model.model.layers[0].register_forward_pre_hook(lambda *a: time.sleep(0.05))
        calibrate(model, tiny.ids(60, 6), path=sys.argv[1], progress=False)
    """)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], env=environment)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < Moments.load(path).count < 60 * 6
    model, ids = tiny.MODELS["llama-gqa"](), tiny.ids(60, 6)
    assert same(calibrate(model, ids, path=path, progress=False), calibrate(model, ids, progress=False))


def test_going_on_with_another_run_is_refused(tmp_path):
    model, ids, path = tiny.MODELS["llama-gqa"](), tiny.ids(4, 6), tmp_path / "moments"
    calibrate(model, ids, path=path, progress=False)
    with pytest.raises(ValueError, match="another text"):
        calibrate(model, tiny.ids(4, 6, seed=2), path=path, progress=False)
    with pytest.raises(ValueError, match="another batch"):
        calibrate(model, ids, batch=2, path=path, progress=False)
    with pytest.raises(ValueError, match="another choice of attention"):
        calibrate(model, ids, attention=True, path=path, progress=False)
    with pytest.raises(ValueError, match="another model"):
        calibrate(tiny.MODELS["llama-mha"](), ids, path=path, progress=False)


# -- processes --------------------------------------------------------------------------------------------


def _share(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    model = tiny.MODELS["llama-gqa"]()
    share = tiny.ids(5, 6)[rank::2] if rank < 2 else None  # unequal shares, and none at all
    mine = Moments.zeros(Source.of(model)) if share is None else calibrate(model, share, progress=False)
    before = {kind: gram.clone() for kind, gram in mine.gram.items()}
    mine.all_reduce().save(f"{folder}/{rank}")
    assert all(torch.equal(mine.gram[kind], gram) for kind, gram in before.items())
    other = calibrate(model, tiny.ids(), attention=rank == 1, progress=False)
    with pytest.raises(
        ValueError, match="process 1 holds moments of another model or other kinds than process 0"
    ):
        other.all_reduce()
    dist.destroy_process_group()


def test_processes_together_have_the_moments_of_one(tmp_path):
    torch.multiprocessing.spawn(_share, (str(tmp_path),), nprocs=3)
    first, second, third = (Moments.load(tmp_path / name) for name in "012")
    assert same(first, second)
    assert same(first, third)
    assert set(first.weight) == set(WEIGHTS)
    assert close(first, calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(5, 6), progress=False))


def test_all_reduce_without_a_group_says_what_to_do():
    with pytest.raises(RuntimeError, match="run under torchrun"):
        calibrate(tiny.MODELS["llama-gqa"](), tiny.ids(), progress=False).all_reduce()
