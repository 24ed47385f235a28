"""The harness on a task that needs no network: its accuracy is the one counted by hand from the logits."""

import sys

import datasets
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvteach.evaluate import lm_eval

WORDS = ["the", "cat", "dog", "sees", "hears", "a", "bird", "fish", "and", "then", "sleeps", "runs"]


@pytest.fixture
def tokenizer():
    vocabulary = {"<s>": 0, "<unk>": 1} | {word: n for n, word in enumerate(WORDS, 2)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )


@pytest.fixture
def own_tasks():
    """Without the harness's thousands of tasks, which take seconds to list."""
    return pytest.importorskip("lm_eval.tasks").TaskManager(include_defaults=False)


def questions(**_):
    rows = []
    for n in range(12):
        pick = [WORDS[(n * step + step) % len(WORDS)] for step in (1, 5, 7, 11)]
        context = " ".join(["the", *pick[: 1 + n % 3]])
        rows.append({"context": context, "choices": [pick[3], f"{pick[0]} and"], "label": n % 2})
    return {"test": datasets.Dataset.from_list(rows)}


TASK = {
    "task": "two_words",
    "custom_dataset": questions,
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}


def by_hand(model, tokenizer) -> float:
    right = []
    for row in questions()["test"]:
        context = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
        scores = []
        for choice in row["choices"]:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(context) - 1 + n, token] for n, token in enumerate(answer)))
        right.append(int(scores[1] > scores[0]) == row["label"])
    return sum(right) / len(right)


@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
def test_accuracy_is_the_one_counted_by_hand(name, tokenizer, own_tasks):
    model = tiny.MODELS[name](dtype=torch.float32).train()
    found = lm_eval(model, tokenizer, [TASK], batch_size=4, bootstrap_iters=0, task_manager=own_tasks)
    assert model.training
    model.eval()
    expected = by_hand(model, tokenizer)
    assert found["results"]["two_words"]["acc,none"] == pytest.approx(expected)
    assert 0 < expected < 1  # a task that can tell


def test_batch_size_and_length_reach_the_model(tokenizer, own_tasks):
    model, shapes = tiny.MODELS["llama-gqa"](dtype=torch.float32), []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, inputs, out: shapes.append(inputs[0].shape)
    )
    lm_eval(model, tokenizer, [TASK], batch_size=8, max_length=2, bootstrap_iters=0, task_manager=own_tasks)
    hook.remove()
    assert max(batch for batch, _ in shapes) == 8
    assert max(length for _, length in shapes) == 2


def test_without_the_harness_the_cure_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match="pip install lm-eval"):
        lm_eval(None, None, [])
