"""A model that is never whole in memory: the same moments and the same small model, bit for bit."""

import json
import os
from itertools import chain

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from kvteach import convert, evaluate, folder, layers, sequential, zoo
from kvteach.activations import attention_modules
from kvteach.calibration import calibrate
from kvteach.moments import Source
from kvteach.offload import device, fetch, is_offloaded, layers_on_disk
from kvteach.plan import Plan

PLANS = [
    Plan(kv_heads=1),
    Plan(kv_heads=1, stock=True),
    Plan(kv_ratio=0.5, basis="activation-svd", centred=True),
]
MODELS = [
    ("llama-gqa", False),
    ("llama-gqa", True),
    ("qwen2", False),
    ("llama-mqa-bias", False),
    ("bloom", True),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo.NAMES["mini-llama"].folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """(name, tied) -> a folder with a tiny model of float32 in many shards."""
    made = {}

    def make(name="llama-gqa", tied=False):
        if (name, tied) not in made:
            model = tiny.MODELS[name](dtype=torch.float32)
            model.config.tie_word_embeddings = tied
            if tied:
                model.tie_weights()
            made[name, tied] = at = tmp_path_factory.mktemp(name)
            model.save_pretrained(at, max_shard_size="30KB")
            tokenizer.save_pretrained(at)
            assert (at / "model.safetensors.index.json").is_file()
        return made[name, tied]

    return make


def load(at, **options):
    return zoo.load(at, **({} if "device_map" in options else {"device": "cpu"}), **options)[0]


def spread(at):
    """The model of a folder under transformers' own device maps: all on disk, and some layers there."""
    auto = load(at, device_map="auto", max_memory={"cpu": "20KB"})
    assert set(auto.hf_device_map.values()) == {"disk"}
    (blocks, _), *rest = layers_on_disk(zoo.FAMILIES[auto.config.model_type], "cpu").items()
    return auto, load(
        at, device_map=dict(rest) | {f"{blocks}.{n}": ("cpu", "disk", "cpu")[n] for n in range(3)}
    )


def moments_of(model, ids=None):
    return calibrate(model, tiny.ids(4) if ids is None else ids, attention=True, progress=False)


def same(a, b):
    """Two sets of moments, to the last bit."""
    assert a.source == b.source and (a.count, a.reach) == (b.count, b.reach)
    for mine, theirs in ((a.gram, b.gram), (a.total, b.total), (a.weight, b.weight)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[kind], theirs[kind]) for kind in mine)
    return True


@pytest.mark.parametrize("name, tied", MODELS)
def test_moments_and_identity_are_those_of_the_model_in_memory(source, name, tied):
    whole = load(source(name, tied))
    exact = moments_of(whole)
    for model in (load(source(name, tied), offload=True), *spread(source(name, tied))):
        assert is_offloaded(model) and not is_offloaded(whole)
        assert device(model) == device(model.get_output_embeddings()) == torch.device("cpu")
        assert same(moments_of(model), exact)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name, tied", MODELS)
def test_what_is_written_layer_by_layer_is_what_is_converted_in_memory(
    source, tmp_path, tokenizer, name, tied, plan
):
    if (plan.stock and name == "bloom") or (plan.kv_heads and name == "llama-mqa-bias"):
        return
    whole, model = load(source(name, tied)), load(source(name, tied), offload=True)
    moments = moments_of(whole)
    exact = convert.compress(whole, moments, plan, progress=False)
    folder.save(exact, tokenizer, tmp_path / "one/small", str(source(name, tied)), measured={"kl": 0.5})
    with folder.whole(tmp_path / "two/small") as aside:
        small = convert.compress(model, moments, plan, progress=False, folder=aside)
        assert is_offloaded(small) and type(small) is type(exact) and not small.training
        with torch.no_grad():
            assert torch.equal(small(tiny.ids()).logits, exact(tiny.ids()).logits)
        folder.write(small, tokenizer, aside, str(source(name, tied)), measured={"kl": 0.5})
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["small"]
    for file in ("config.json", "generation_config.json", "tokenizer.json", "README.md"):
        one, two = ((tmp_path / way / "small" / file).read_text() for way in ("one", "two"))
        assert one == two if file.endswith("md") else json.loads(one) == json.loads(two)
    again = load(tmp_path / "two/small")
    assert not is_offloaded(again) and again.state_dict().keys() == exact.state_dict().keys()
    assert all(torch.equal(x, exact.state_dict()[key]) for key, x in again.state_dict().items())
    index = json.loads((tmp_path / "two/small/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == exact.num_parameters()
    assert len(set(index["weight_map"].values())) == 1 + len(attention_modules(exact))
    assert ("lm_head.weight" in index["weight_map"]) is not tied


def test_other_device_maps_convert_alike(source, tmp_path):
    whole = load(source())
    moments = moments_of(whole)
    exact = convert.compress(whole, moments, PLANS[0], progress=False).state_dict()
    for number, model in enumerate((whole, *spread(source()))):  # a model in memory may be written too
        at = tmp_path / str(number)
        small = convert.compress(model, moments, PLANS[0], progress=False, folder=at)
        assert all(torch.equal(fetch(small, name), weight) for name, weight in exact.items())
        assert all(
            torch.equal(x, exact[name]) for name, x in type(small).from_pretrained(at).state_dict().items()
        )


def test_a_map_that_offloads_nothing_is_a_model_in_memory(source):
    model = load(source(), device_map="auto", max_memory={"cpu": "1GB"})
    assert not is_offloaded(model) and same(moments_of(model), moments_of(load(source())))
    assert not is_offloaded(convert.compress(model, moments_of(model), PLANS[0], progress=False))


def test_one_layer_is_in_memory_at_a_time(source, tmp_path, monkeypatch):
    """Weights are looked at whenever anything may be there: at each module that runs, each basis, each part written."""
    model = load(source(), offload=True)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    rest = sum(
        fetch(model, name).numel()
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    )
    held, small = [], []

    def look(*ignored):
        tensors = chain(model.parameters(), *(made.parameters() for made in small))
        held.append(sum(weight.numel() for weight in tensors if not weight.is_meta))

    def looking(function, keep=False):
        def call(*arguments, **named):
            look()
            made = function(*arguments, **named)
            if keep:
                small.append(made)
            look()
            return made

        return call

    for module in model.modules():
        module.register_forward_pre_hook(look)
        module.register_forward_hook(look)
    moments = moments_of(model)
    monkeypatch.setattr(convert, "_skeleton", looking(convert._skeleton, keep=True))
    for name in ("fill", "read", "fetch"):
        monkeypatch.setattr(convert, name, looking(getattr(convert, name)))
    made = convert.compress(model, moments, PLANS[0], progress=False, folder=tmp_path / "small")
    assert len(held) > 100 and rest <= max(held) <= rest + layer
    assert sum(weight.numel() for weight in made.parameters() if not weight.is_meta) == rest


def test_an_offloaded_model_is_measured_alike(source, tmp_path):
    whole, ids = load(source()), tiny.ids(3)
    moments = moments_of(whole)
    small = convert.compress(whole, moments, PLANS[0], progress=False)
    exact = evaluate.compare(small, whole, ids, progress=False)
    errors = layers.layer_errors(small, whole, ids)
    for number, model in enumerate((load(source(), offload=True), *spread(source()))):
        written = convert.compress(model, moments, PLANS[0], progress=False, folder=tmp_path / str(number))
        found = evaluate.compare(written, evaluate.Reference.of(model, ids, progress=False), progress=False)
        assert found.as_dict() == exact.as_dict()
        assert evaluate.cached_bytes(written) == evaluate.cached_bytes(small)
        assert torch.equal(layers.layer_errors(written, model, ids).output, errors.output)


def test_the_dtype_that_is_asked_for(source):
    half = load(source(), offload=True, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert Source.of(half) == Source.of(load(source(), dtype="bfloat16")) != Source.of(load(source()))


def test_an_offloaded_small_model_is_saved_elsewhere(source, tmp_path, tokenizer):
    model = load(source(), offload=True)
    small = convert.compress(model, moments_of(model), PLANS[0], progress=False, folder=tmp_path / "work")
    with pytest.warns(UserWarning, match="offloaded modules"):  # transformers' own
        folder.save(small, tokenizer, tmp_path / "small", str(source()))
    made = load(tmp_path / "small").state_dict()
    assert all(torch.equal(fetch(small, name), weight) for name, weight in made.items())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_interrupted_half_way_leaves_nothing(source, tmp_path, monkeypatch, stop):
    model = load(source(), offload=True)
    moments, fill, calls = moments_of(model), convert.fill, []

    def interrupted(*arguments):
        calls.append(sorted(path.name for path in at.iterdir()))
        if len(calls) == 2:
            raise stop("now")
        fill(*arguments)

    monkeypatch.setattr(convert, "fill", interrupted)
    for name in ("direct", "aside"):
        calls.clear()
        with pytest.raises(stop):
            if name == "direct":
                at = tmp_path / "small"
                convert.compress(model, moments, PLANS[0], progress=False, folder=at)
            else:
                with folder.whole(tmp_path / "small") as at:
                    convert.compress(model, moments, PLANS[0], progress=False, folder=at)
        assert calls[1] == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
        assert not list(tmp_path.iterdir())


def test_bad_input(source, tmp_path, tokenizer):
    model = load(source(), offload=True)
    moments = moments_of(model)
    with pytest.raises(ValueError, match=r"the model is offloaded: give kvteach.compress a folder"):
        convert.compress(model, moments, PLANS[0])
    with pytest.raises(ValueError, match="several devices, or are offloaded"):
        sequential.compress(model, tiny.ids(2), PLANS[0], progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(FileExistsError, match="holds files already"):
        convert.compress(model, moments, PLANS[0], folder=tmp_path / "full")
    assert (tmp_path / "full/file").exists()
    with pytest.raises(ValueError, match="name offload or a device_map, not both"):
        zoo.load(source(), offload=True, device_map="auto")


def test_a_folder_without_safetensors(source, tmp_path):
    model = load(source())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"offload reads safetensors files, .* has none: load it whole once"):
        zoo.load(tmp_path, offload=True)


def test_a_missing_or_damaged_shard(source, tmp_path):
    names = sorted(path.name for path in source().iterdir() if path.suffix == ".safetensors")
    for what in ("missing", "damaged"):
        at = tmp_path / what
        at.mkdir()
        for path in source().iterdir():
            os.link(path, at / path.name)
        (at / names[3]).unlink()
        if what == "damaged":
            (at / names[3]).write_bytes(b"x" * 100)
        with pytest.raises(OSError if what == "missing" else ValueError, match=r"cannot load|is damaged"):
            zoo.load(at, offload=True, device="cpu")
