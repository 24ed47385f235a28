"""Train a mini: ``python -m kvteach.minis.train mini-llama --tokens 4e6``.

The one dial is the number of tokens. Learning rate: 100 steps of warming up, then constant, and over the last 30 % of
the run linearly to zero ("warmup–stable–decay"). All before the decay is the same for every budget, so a run that was
stopped may be taken up with more tokens or fewer, and gives what a run planned like that from the start would give.

A run is a folder: ``tokenizer/``, ``checkpoint.safetensors`` (weights and AdamW's two moments, written aside and
renamed once a minute), ``curve.jsonl``, and at the end the model as `save_pretrained` writes it, with its card.
Which windows a step sees depends on the seed and the step alone, so the same command after a Ctrl-C or a crash goes on
where it was.
"""

import argparse
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import env, text
from ..evaluate import perplexity
from . import data

NAMES = {"mini-llama": "llama", "mini-bloom": "bloom"}
WARMUP, DECAY = 100, 0.3  # steps; share of the run
PEAK = 2e-3  # learning rate
HELD_OUT = 8  # windows of each text


@dataclass(frozen=True)
class Shape:
    """A mini's sizes; every query head has its own key-value head."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    vocabulary: int = data.VOCABULARY

    def model(self, family: str, seed: int = 0):
        """A fresh model of `family` (``llama`` or ``bloom``), float32, drawn from `seed`."""
        from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

        ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if family == "bloom":
                return BloomForCausalLM(
                    BloomConfig(
                        vocab_size=self.vocabulary,
                        hidden_size=self.hidden,
                        n_layer=self.layers,
                        n_head=self.heads,
                        **ends,
                    )
                )
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=self.vocabulary,
                    hidden_size=self.hidden,
                    intermediate_size=2 * self.hidden,
                    num_hidden_layers=self.layers,
                    num_attention_heads=self.heads,
                    num_key_value_heads=self.heads,
                    max_position_embeddings=2048,
                    tie_word_embeddings=True,
                    **ends,
                )
            )


def rate(step: int, steps: int) -> float:
    """The learning rate of one step."""
    return PEAK * min((step + 1) / WARMUP, 1.0, (steps - step) / (DECAY * steps))


def batch_of(row: Tensor, step: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """The windows of one step, int64 [batch, length]: each epoch is a fresh permutation of the row's windows."""
    windows = len(row) // length
    if windows < batch:
        raise ValueError(f"the text has {windows} windows of {length} tokens, a step needs {batch}")
    epoch, place = divmod(step, windows // batch)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed + epoch))
    chosen = order[place * batch : (place + 1) * batch]
    return row[: windows * length].view(windows, length)[chosen].long()


def train(model, row: Tensor, held_out: dict[str, Tensor], folder: Path, tokens: float, batch=4, length=512):
    """Train `model` in place on `row` (token ids) until it has seen `tokens`; go on from `folder` where it can.

    Raises ValueError when the folder's checkpoint comes from another model, text or shape of batch, or when its run
    is past the point where the new budget's decay begins.
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    steps, device = max(1, round(tokens / (batch * length))), next(model.parameters()).device
    recipe = hashlib.sha256(
        model.config.to_json_string().encode() + row.numpy().tobytes() + f"{batch} {length}".encode()
    ).hexdigest()
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    file, curve = folder / "checkpoint.safetensors", folder / "curve.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    start, spent = _restore(model, optimiser, file, recipe, steps)
    lines = [line for line in _lines(curve) if line["step"] <= start]  # of what was lost, nothing stays
    curve.write_text("".join(json.dumps(line) + "\n" for line in lines))
    begun = saved = time.monotonic()

    def save(step: int) -> None:
        tensors = {f"weight.{name}": weight.detach() for name, weight in model.named_parameters()}
        for name, weight in model.named_parameters():
            tensors |= {f"{key}.{name}": optimiser.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
        about = {"recipe": recipe, "step": step, "steps": steps, "seconds": spent + time.monotonic() - begun}
        aside = file.with_suffix(".partial")
        save_file(tensors, aside, {"kvteach.minis": json.dumps(about)})
        os.replace(aside, file)

    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", disable=env.bars_off())
    for step in bar:
        ids = batch_of(row, step, batch, length).to(device)
        with torch.autocast(device.type, torch.bfloat16):  # products in bfloat16, weights and sums in float32
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = rate(step, steps)
        optimiser.step()
        optimiser.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == steps:
            line = {"step": done, "tokens": done * batch * length, "loss": round(loss.item(), 4)}
            line["lr"] = float(f"{rate(step, steps):.4g}")
            if done % 200 == 0 or done == steps:
                line |= {
                    name: round(perplexity(model, ids, progress=False).nll.mean().item(), 4)
                    for name, ids in held_out.items()
                }
            with curve.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=line["loss"])
        if time.monotonic() - saved > 60 or done == steps:
            save(done)
            saved = time.monotonic()
    return spent + time.monotonic() - begun


def _restore(model, optimiser, file: Path, recipe: str, steps: int) -> tuple[int, float]:
    """Put a checkpoint into model and optimiser; the steps done and the seconds they took, (0, 0) without one."""
    from safetensors import safe_open

    if not file.is_file():
        return 0, 0.0
    with safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()["kvteach.minis"])
        if about["recipe"] != recipe:
            raise ValueError(
                f"{str(file)!r} belongs to another model, text or batch: take another folder, or delete it"
            )
        decays = (1 - DECAY) * min(steps, about["steps"])
        if steps != about["steps"] and about["step"] > decays:
            raise ValueError(
                f"{str(file)!r} is at step {about['step']} of {about['steps']}, where the learning rate already "
                f"falls: a run of {steps} steps had to begin before"
            )
        for name, weight in model.named_parameters():
            weight.data.copy_(stored.get_tensor(f"weight.{name}"))
            state = {key: stored.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
            state = {key: tensor.to(weight.device) for key, tensor in state.items()}
            optimiser.state[weight] = {"step": torch.tensor(float(about["step"])), **state}
    return about["step"], about["seconds"]


def _lines(curve: Path) -> list[dict]:
    """The whole lines of a curve; a last one that was cut off by a crash is left out."""
    if not curve.is_file():
        return []
    return [json.loads(line) for line in curve.read_text().splitlines() if line.endswith("}")]


def prepare(folder: Path):
    """Tokenizer and training row of a run folder, made when they are not there."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    file = folder / "row.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print("reading docstrings (a minute or two)", flush=True)
        bodies = list(data.documents())
        tokenizer = data.tokenizer_of(bodies)
        tokenizer.save_pretrained(folder / "tokenizer")
        aside = file.with_suffix(".partial")
        save_file({"row": data.row(tokenizer, bodies)}, aside)
        os.replace(aside, file)
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), load_file(file)["row"]


def main(arguments=None) -> None:
    """Train one mini and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--tokens", type=float, default=4e6, help="training tokens (default 4e6)")
    parser.add_argument("--folder", type=Path, default=Path("minis"), help="where runs are kept")
    asked = parser.parse_args(arguments)
    tokenizer, row = prepare(asked.folder)
    print(f"{len(row)} tokens of text", flush=True)
    model = Shape().model(NAMES[asked.name]).to(env.device())
    held_out = {name: text.windows(tokenizer, HELD_OUT, 512, "evaluation", name).ids for name in data.TEXTS}
    run = asked.folder / asked.name
    seconds = train(model, row, held_out, run, asked.tokens)

    from .card import write

    write(asked.name, model.cpu().eval(), tokenizer, run / "model", asked.tokens, len(row), seconds)


if __name__ == "__main__":
    main()
