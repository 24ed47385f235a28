"""The minis load offline and have learnt something; their training is resumed to the same bits."""

import json
import math
import sys

import pytest
import torch

from kvteach import text, zoo
from kvteach.activations import attention_modules
from kvteach.evaluate import perplexity
from kvteach.minis import data, train

MINIS = ("mini-llama", "mini-bloom")
SMALL = train.Shape(hidden=32, layers=2, heads=4, vocabulary=300)
ROW = torch.randint(0, 300, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_loads_generates_and_has_learnt(name):
    model, tokenizer = zoo.load(name, device="cpu")
    assert model.dtype == torch.float32 and not model.training
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (4, 8)
    assert getattr(config, "num_key_value_heads", 8) == 8
    assert len(attention_modules(model)) == 4 and attention_modules(model)[0].head_dim == 32

    said = "def größe(x):  # naïve\n\treturn x ≥ 3 🙂"
    assert tokenizer.decode(tokenizer(said)["input_ids"]) == said
    ids = tokenizer("Return a new array", return_tensors="pt")
    grown = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(grown[:, : ids["input_ids"].shape[1]], ids["input_ids"])

    for held_out in data.TEXTS:
        ids = text.windows(tokenizer, 4, 256, "evaluation", held_out).ids
        share = torch.bincount(ids.ravel()).double() / ids.numel()
        unigram = -torch.special.xlogy(share, share).sum()  # the best guess that ignores the context
        loss = perplexity(model, ids, progress=False).nll.mean()
        assert loss < unigram - 0.5 < math.log(4096) - 0.5


def test_the_minis_share_their_tokenizer():
    first, second = (zoo.NAMES[name].folder / "tokenizer.json" for name in MINIS)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", MINIS)
def test_the_card_says_what_was_measured(name):
    folder = zoo.NAMES[name].folder
    assert "held-out windows" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, family):
    def run(folder, tokens=12 * 64):
        model = SMALL.model(family)
        train.train(model, ROW, {"text": ROW[:64].view(2, 32).long()}, tmp_path / folder, tokens, 2, 32)
        return model.state_dict()

    whole = run("whole")
    clock, real = iter(range(0, 10**6, 61)), train.batch_of
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))  # a checkpoint after each step

    def stop_at_seven(row, step, *rest):
        if step == 7:
            raise KeyboardInterrupt
        return real(row, step, *rest)

    monkeypatch.setattr(train, "batch_of", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(
        train, "batch_of", lambda row, step, *rest: real(row, step, *rest) if step >= 7 else 1 / 0
    )
    resumed = run("stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "whole/curve.jsonl").read_text() == (tmp_path / "stopped/curve.jsonl").read_text()
    assert not list(tmp_path.rglob("*.partial"))

    with pytest.raises(ValueError, match="learning rate already"):
        run("stopped", tokens=20 * 64)
    with pytest.raises(ValueError, match="belongs to another model, text or batch"):
        train.train(SMALL.model(family), ROW[1:], {}, tmp_path / "stopped", 12 * 64, 2, 32)


def test_a_run_shortened_before_its_decay_is_a_short_run(tmp_path, monkeypatch):
    def run(folder, steps):
        model = SMALL.model("llama")
        train.train(model, ROW, {}, tmp_path / folder, steps * 64, 2, 32)
        return model.state_dict()

    def stop_at_twelve(row, step, *rest):
        if step == 12:
            raise KeyboardInterrupt
        return real(row, step, *rest)

    planned = run("planned", 20)  # decays from step 14
    clock, real = iter(range(0, 10**6, 61)), train.batch_of
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(train, "batch_of", stop_at_twelve)
    with pytest.raises(KeyboardInterrupt):
        run("shortened", 30)
    monkeypatch.setattr(train, "batch_of", real)
    shortened = run("shortened", 20)
    assert all(torch.equal(planned[name], shortened[name]) for name in planned)


def test_an_epoch_sees_each_window_once_and_the_next_in_another_order():
    row = torch.arange(200, dtype=torch.int32)
    epochs = [[train.batch_of(row, 5 * e + s, 4, 10) for s in range(5)] for e in range(2)]
    for batches in epochs:
        assert sorted(torch.cat(batches).ravel().tolist()) == list(range(200))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    with pytest.raises(ValueError, match="has 20 windows of 10 tokens, a step needs 40"):
        train.batch_of(row, 0, 40, 10)


def test_the_rate_before_the_decay_does_not_know_the_budget():
    assert [train.rate(step, 1000) for step in range(700)] == [train.rate(step, 2000) for step in range(700)]
    assert train.rate(999, 1000) < train.PEAK / 100


def test_training_text_holds_no_evaluation_document(monkeypatch):
    monkeypatch.setattr(data, "PACKAGES", ("json", "no_such_package"))
    bodies = list(data.documents())
    read = {part for body in bodies for part in body.split("\n\n")}
    held_out = {body for found in text.stdlib_docstrings("evaluation") for body in found}
    assert not held_out & set(bodies) and len(read) > 1000
    topics = set(text.documents("pydoc-topics", "evaluation"))
    assert not topics & set(bodies) and set(text.documents("pydoc-topics", "calibration")) <= set(bodies)


@pytest.mark.parametrize("name", MINIS)
def test_the_card_tells_what_is_measured(name):
    """One number of the stored card, measured again; the texts belong to Python 3.11."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the help texts of this Python are others")
    model, tokenizer = zoo.load(name, device="cpu")
    stored = json.loads((zoo.NAMES[name].folder / "measured.json").read_text())
    ids = text.windows(tokenizer, 32, 512, "evaluation", "pydoc-topics")
    found = perplexity(model, ids, progress=False).perplexity
    assert found == pytest.approx(stored["perplexity"]["pydoc-topics"], rel=1e-3)
    card = (zoo.NAMES[name].folder / "README.md").read_text("utf-8")
    assert f"| pydoc-topics | {stored['perplexity']['pydoc-topics']:.1f} |" in card
