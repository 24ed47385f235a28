"""A model that copies finds every number, one that does not finds none; prompts have the length that was asked for."""

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvteach.passkey import passkey, prompt


class Letters:
    """One token a character; texts begin with token 0 as LLaMA's do with <s>."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}

    def batch_decode(self, rows):
        return ["".join(map(chr, row)) for row in rows.tolist()]


class Copier(torch.nn.Module):
    """Answers with the number it finds in the last `reach` tokens, and goes on talking."""

    config, device = SimpleNamespace(), "cpu"

    def __init__(self, reach):
        super().__init__()
        self.reach, self.seen = reach, []

    def generate(self, input_ids, max_new_tokens, **options):
        assert not options["do_sample"] and options["attention_mask"].shape == input_ids.shape
        self.seen += (texts := Letters().batch_decode(input_ids))
        keys = [re.search(r"\d{5}", text[-self.reach :]) for text in texts]
        answers = [f" {key[0] if key else 12}. Remember it."[:max_new_tokens] for key in keys]
        answers = torch.tensor([[ord(c) for c in answer.ljust(max_new_tokens)] for answer in answers])
        return torch.cat([input_ids, answers], 1)


def test_a_model_that_copies_finds_every_number():
    found = passkey(Copier(10_000), Letters(), lengths=(200, 333), depths=(0, 0.4, 1), trials=3)
    assert found.shape == (2, 3) and (found == 1).all()


def test_a_model_that_does_not_finds_none():
    assert (passkey(Copier(1), Letters(), lengths=(200,)) == 0).all()


def test_a_short_memory_finds_what_lies_near_the_end():
    found = passkey(Copier(200), Letters(), lengths=(190, 1000), depths=(0, 1))
    assert found.tolist() == [[1, 1], [0, 1]]


def test_prompts_have_their_length_and_the_number_its_depth():
    model = Copier(10_000)
    passkey(model, Letters(), lengths=(150, 1000), depths=(0, 0.5, 1), trials=2)
    assert [len(text) for text in model.seen] == [150] * 6 + [1000] * 6
    assert all(text.startswith("\0") and text.endswith("The pass key is") for text in model.seen)
    starts = [text.index("\nThe pass key is") for text in model.seen[6::2]]
    filler = 1000 - len(model.seen[-1][starts[-1] :]) - 1
    assert starts == [1, 1 + round(filler / 2), 1 + filler]


def test_the_seed_draws_the_numbers():
    drawn = []
    for seed in (0, 0, 1):
        model = Copier(1)
        passkey(model, Letters(), lengths=(200,), trials=3, seed=seed)
        drawn.append([re.search(r"\d{5}", text)[0] for text in model.seen])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_a_real_generate_runs():
    """An untrained model names no number; its mode comes back."""
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=128
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    assert (passkey(model, Letters(), lengths=(150,), trials=2) == 0).all()
    assert model.training


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="a prompt of 40 tokens cannot hold number and question, which take 99"
    ):
        passkey(Copier(1), Letters(), lengths=(200, 40))
    assert len(prompt(Letters(), "12345", 99, 0.5)) == 99
    with pytest.raises(ValueError, match="98 tokens"):
        prompt(Letters(), "12345", 98, 0.5)
    with pytest.raises(ValueError, match="2045 tokens and 7 of the answer exceed the model's 2048 positions"):
        passkey(tiny.MODELS["llama-gqa"](), Letters(), lengths=(2045,))
    for arguments in (dict(trials=0), dict(depths=(0.5, 1.1))):
        with pytest.raises(ValueError, match="trials must be at least 1 and depths within 0 to 1"):
            passkey(Copier(1), Letters(), **arguments)
