"""Passkey retrieval: a number hidden in filler text, asked for at the end.

    filler, then "The pass key is 71432. Remember it.", then filler, then "What is the pass key? The pass key is"

A perplexity hardly moves when a model can no longer look back far; this does. The task is that of Mohtashami and
Jaggi (arXiv 2305.16300), with the prompt made to an exact number of tokens.
"""

import random
import re

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .activations import quiet
from .env import bars_off
from .evaluate import positions
from .offload import device

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


def passkey(
    model,
    tokenizer,
    lengths=(256, 512),
    depths=(0.1, 0.5, 0.9),
    trials: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Share of `trials` in which a greedy `generate` gives the number back.

    Parameters
    ----------
    lengths : tokens of the whole prompt, exactly.
    depths : where the number stands, as a share of the filler: 0 at the beginning, 1 right before the question.
    trials : five-digit numbers tried at each place, one batch.
    seed : of the numbers. They are drawn anew for each place, and are the same for every model and tokenizer.

    Returns
    -------
    float64 [lengths, depths], from 0 to 1.

    Raises
    ------
    ValueError : a length that number and question do not fit in, or that, with the answer, exceeds the model's
        positions; a depth outside [0, 1]; less than one trial.
    """
    if trials < 1 or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"trials must be at least 1 and depths within 0 to 1; got {trials} and {depths}")
    shares = torch.empty(len(lengths), len(depths), dtype=torch.float64)
    draw = random.Random(seed)
    places = [(i, j, n, depth) for i, n in enumerate(lengths) for j, depth in enumerate(depths)]
    tasks = []
    for i, j, length, depth in places:  # all prompts before any run: what does not fit is told at once
        keys = [str(draw.randrange(10_000, 100_000)) for _ in range(trials)]
        ids = torch.tensor([prompt(tokenizer, key, length, depth) for key in keys])
        room = max(len(_tokens(tokenizer, f" {key}.")) for key in keys)
        if (limit := positions(model)) and length + room > limit:
            raise ValueError(
                f"{length} tokens and {room} of the answer exceed the model's {limit} positions: ask for shorter ones"
            )
        tasks.append((i, j, keys, ids, room))
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for i, j, keys, ids, room in tqdm(tasks, "passkey", disable=not progress or bars_off()):
        ids = ids.to(device(model))
        with quiet(model):
            answers = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=padding,
            )
        found = [re.search(r"\d+", text) for text in tokenizer.batch_decode(answers[:, ids.shape[1] :])]
        shares[i, j] = sum(f is not None and f[0] == key for f, key in zip(found, keys, strict=True)) / trials
    return shares


def prompt(tokenizer, key: str, length: int, depth: float) -> list[int]:
    """The token ids of one prompt, `length` of them. ValueError when `length` is too short to hold `key`."""
    start = tokenizer("")["input_ids"]  # what it begins every text with, such as <s>; often nothing
    needle, question = _tokens(tokenizer, NEEDLE.format(key=key)), _tokens(tokenizer, QUESTION)
    room = length - len(start) - len(needle) - len(question)
    if room < 0:
        raise ValueError(
            f"a prompt of {length} tokens cannot hold number and question, which take {length - room}"
        )
    once = _tokens(tokenizer, FILLER)
    filler = (once * (room // len(once) + 1))[:room]
    before = round(depth * room)
    return [*start, *filler[:before], *needle, *filler[before:], *question]


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
