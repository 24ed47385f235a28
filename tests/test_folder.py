"""A compressed folder is whole or not there; sizes said beforehand are those of the model."""

import json

import pytest
import tiny
import torch

from kvteach import convert, folder, sizes, text, zoo
from kvteach.calibration import calibrate
from kvteach.minis import data
from kvteach.plan import Plan


@pytest.fixture(scope="module")
def tokenizer():
    """Of 97 tokens or fewer, as the tiny models have: letters only."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(n): n - 31 for n in range(32, 127)} | {data.END: 0}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=data.END, pad_token=data.END)


@pytest.fixture(scope="module")
def small():
    return compressed("llama-mha", Plan(kv_heads=2))


def compressed(name, plan):
    model = tiny.MODELS[name]()
    return convert.compress(model, calibrate(model, tiny.ids(8), attention=True, progress=False), plan, False)


@pytest.mark.parametrize(
    "plan", [Plan(kv_heads=1), Plan(kv_heads=1, stock=True), Plan(kv_ratio=0.5)], ids=str
)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_sizes_are_those_of_the_model(name, plan):
    model = tiny.MODELS[name]()
    assert sizes.of(model.config).parameters == model.num_parameters()
    if name == "bloom" and plan.stock:
        with pytest.raises(ValueError, match="leave stock out"):
            sizes.planned(model.config, plan)
        return
    before = sizes.planned(model.config, plan)
    made = compressed(name, plan)
    cache = made(input_ids=tiny.ids(1, 1), use_cache=True).past_key_values
    assert before.parameters == made.num_parameters()
    assert before.cached == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert sizes.of(made.config) == before


def test_sizes_of_a_plan_that_does_not_fit():
    config = tiny.MODELS["llama-mha"]().config
    with pytest.raises(ValueError, match="kv_heads is 3; for 4 key-value heads it must be one of 1, 2, 4"):
        sizes.planned(config, Plan(kv_heads=3))
    with pytest.raises(ValueError, match="compressed already"):
        sizes.planned(compressed("llama-mha", Plan(kv_heads=2)).config, Plan(kv_heads=1))


@pytest.mark.parametrize(
    "plan", [Plan(kv_heads=2), Plan(kv_heads=2, stock=True), Plan(kv_ratio=0.5)], ids=str
)
def test_what_is_saved_loads_and_says_how_it_was_made(tmp_path, tokenizer, plan):
    small = compressed("llama-mha", plan)
    before = dict(small.config.kvteach)
    seen = text.Windows(tiny.ids(4), "some text", "calibration")
    at = folder.save(small, tokenizer, tmp_path / "a/b", "mini-llama", seen, {"perplexity": 1 / 3})
    assert at == (tmp_path / "a/b").resolve() and [path.name for path in at.parent.iterdir()] == ["b"]
    assert small.config.kvteach == before
    loaded, same = zoo.load(at, device="cpu")
    assert type(loaded) is type(small) and same("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    weights = small.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(loaded(tiny.ids()).logits, small(tiny.ids()).logits, rtol=0, atol=1e-12)
    facts = loaded.config.kvteach
    assert facts["source_name"] == "mini-llama" and Plan(**facts["plan"]) == plan
    assert facts["calibration"]["fingerprint"] == seen.fingerprint
    card = (at / "README.md").read_text()
    for said in (f"form {plan.form}", "some text", seen.fingerprint, plan.basis, "0.333333", "mini-llama"):
        assert said in card
    assert ("import kvteach" in card) is not plan.stock


def test_the_original_is_found_from_any_folder(tmp_path, tokenizer, small, monkeypatch):
    (tmp_path / "original").mkdir()
    monkeypatch.chdir(tmp_path)
    at = folder.save(small, tokenizer, "out", "original")
    facts = json.loads((at / "config.json").read_text())["kvteach"]
    assert facts["source_name"] == str(tmp_path / "original") and "calibration" not in facts
    assert "base_model" not in (at / "README.md").read_text()
    at = folder.save(small, tokenizer, "hub", "owner/name")
    assert "base_model: owner/name" in (at / "README.md").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("at", ["model", "tokenizer", "card"])
def test_nothing_half_written_is_left(tmp_path, tokenizer, small, monkeypatch, error, at):
    def stop(*args, **kwargs):
        raise error

    where = {
        "model": (small, "save_pretrained"),
        "tokenizer": (tokenizer, "save_pretrained"),
        "card": (folder, "_card"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[at], stop)
        with pytest.raises((KeyboardInterrupt, OSError)):
            folder.save(small, tokenizer, tmp_path / "out", "mini-llama")
    assert not list(tmp_path.iterdir())
    folder.save(small, tokenizer, tmp_path / "out", "mini-llama")  # and the next try goes through


def test_only_a_new_or_an_empty_folder_is_written(tmp_path, tokenizer, small):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="mine' holds files already: name a new folder or an empty one"):
        folder.save(small, tokenizer, mine, "mini-llama")
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="is a file: name a new folder"):
        folder.check(mine / "thesis.tex")
    with pytest.raises(PermissionError, match=r"no folder can be made in .*thesis\.tex"):
        folder.check(mine / "thesis.tex" / "out")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(FileExistsError, match=r"out.partial' is there, half-written"):
        folder.save(small, tokenizer, tmp_path / "out", "mini-llama")
    (tmp_path / "empty").mkdir()
    assert (folder.save(small, tokenizer, tmp_path / "empty", "mini-llama") / "config.json").is_file()


def test_an_original_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="the model is not compressed"):
        folder.save(tiny.MODELS["llama-mha"](), tokenizer, tmp_path / "out", "mini-llama")
    assert not list(tmp_path.iterdir())
