"""What the minis read: docstrings, as one long row of token ids, and the tokenizer that makes it.

The training text is the docstrings of `PACKAGES` and the calibration sides of two built-in texts. Packages copy from
each other, so a docstring is taken once, and one that also stands on an evaluation side is not taken at all.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import text

# Installed by requirements.txt, most of them by way of others; one that is missing is left out.
PACKAGES = """
torch transformers numpy pandas matplotlib sympy networkx sqlalchemy pyarrow huggingface_hub datasets accelerate
tokenizers safetensors gguf fontTools PIL IPython ipywidgets traitlets jupyter_client nbformat nbclient sphinx docutils
babel jinja2 markdown_it myst_parser bs4 hypothesis playwright pydantic attr rich prompt_toolkit jedi parso setuptools
pip requests click fsspec filelock
""".split()
TEXTS = ("pydoc-topics", "stdlib-docstrings")  # calibration side: read; evaluation side: held out
END = "<|end|>"  # stands between documents
VOCABULARY = 4096


def documents() -> Iterator[str]:
    """The training documents, in a fixed order that mixes the packages."""
    seen = {body for bodies in text.stdlib_docstrings("evaluation") for body in bodies}
    named = [(f"stdlib/{n}", bodies) for n, bodies in enumerate(text.stdlib_docstrings("calibration"))]
    named += [("topic/" + body, [body]) for body in text.documents("pydoc-topics", "calibration")]
    for package in PACKAGES:
        if spec := importlib.util.find_spec(package):  # found, never imported
            folder = Path(spec.submodule_search_locations[0])
            named += [
                (f"{package}/{name}", text.docstrings(folder / name)) for name in text.python_files(folder)
            ]
    for _, bodies in sorted(named, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        fresh = [body for body in dict.fromkeys(bodies) if body not in seen]
        seen.update(fresh)
        if fresh:
            yield "\n\n".join(fresh)


def tokenizer_of(bodies: Iterable[str], vocabulary: int = VOCABULARY):
    """A byte-level BPE tokenizer trained on `bodies`, as transformers loads it; `END` is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: any text can be written
    bpe.train_from_iterator(
        bodies, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=letters)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=2048
    )


def row(tokenizer, bodies: Iterable[str]) -> Tensor:
    """All documents as one int32 row of token ids, each followed by `END`."""
    ids = []
    for body in bodies:
        ids += tokenizer(body, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)
