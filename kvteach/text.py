"""Calibration and evaluation windows: `windows` turns a named text into equal rows of token ids.

=====================  ===================================================================================
``pydoc-topics``       the help texts of Python itself (``pydoc_data.topics``): English, on every machine
``stdlib-docstrings``  the docstrings of Python's standard library, one document a module file; read, not imported
``wikitext-2``         from the Hugging Face hub, through the `datasets` library
``c4``                 the same
a file or folder       text of your own: one document a file, or one a paragraph of a single file
=====================  ===================================================================================

Documents go to calibration or evaluation by a hash of their name, so that no document is ever on both sides and
the split is the same on every machine. Python's own texts change a little with each minor version of Python;
`Windows.fingerprint` tells two texts apart, and pages print it beside their numbers.
"""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("calibration", "evaluation")

# name -> repository, configuration, and the hub's split for each of ours
HUB = {
    "wikitext-2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "evaluation": "test"},
    ),
    "c4": ("allenai/c4", "en", {"calibration": "train", "evaluation": "validation"}),
}

# Folders whose docstrings are no prose of the package, or belong to another one.
_PASSED_OVER = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Windows:
    """Equal rows of token ids.

    Attributes
    ----------
    ids : int64 tensor [windows, length].
    text, split : where they come from.
    """

    ids: "torch.Tensor"  # noqa: F821  (torch is imported when windows are made)
    text: str
    split: str

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of the sha256 of the token ids: equal only for equal text, tokenizer and shape."""
        return hashlib.sha256(repr(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes()).hexdigest()[
            :8
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        count, length = self.ids.shape
        return f"{self.text}, {self.split}: {count} windows × {length} tokens, fingerprint {self.fingerprint}"


def windows(
    tokenizer, count: int, length: int = 512, split: str = "calibration", text: str = "pydoc-topics"
) -> Windows:
    """The first `count` windows of `length` tokens of one side of a text.

    The documents of that side are joined by blank lines, tokenised without special tokens and cut.

    Raises
    ------
    ValueError : an unknown split, a count or length below one, a text that is too short (its size is named), or a
        file that is not UTF-8.
    LookupError : an unknown text.
    FileNotFoundError : a Python without the sources of its standard library.
    ConnectionError : a hub text without a network; another text is never taken in its place.
    """
    import torch

    if count < 1 or length < 1:
        raise ValueError(f"count and length are {count} and {length}; both must be at least 1")
    needed, ids = count * length, []
    for body in documents(text, split):
        ids += tokenizer(body + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise ValueError(
            f"the {split} side of {text!r} has {len(ids) // length} windows of {length} tokens, {count} were asked "
            "for: ask for fewer or shorter ones, or name a longer text"
        )
    return Windows(torch.tensor(ids[:needed]).view(count, length), str(text), split)


def documents(text: str, split: str) -> Iterator[str]:
    """The documents of one side of a text, in a fixed order; errors as for `windows`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    if text == "pydoc-topics":
        from pydoc_data.topics import topics

        return (topics[name] for name in _side(topics, split))
    if text == "stdlib-docstrings":
        return ("\n\n".join(found) for found in stdlib_docstrings(split) if found)
    if text in HUB:
        return _hub_rows(text, split)
    if (path := Path(text).expanduser()).is_dir():
        files = [file for file in path.rglob("*") if file.suffix in {".txt", ".md"} and file.is_file()]
        names = _side((file.relative_to(path).as_posix() for file in files), split)
        return (_read(path / name) for name in names)
    if path.is_file():
        return _side((part for part in _read(path).split("\n\n") if part.strip()), split)
    raise LookupError(
        f"no text {text!r}: name pydoc-topics, stdlib-docstrings, {', '.join(HUB)}, or a file or folder of .txt "
        "or .md"
    )


def python_files(folder: Path) -> Iterator[str]:
    """Names, relative to `folder` and with ``/``, of its ``.py`` files; tests and other packages are passed over."""
    for top, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _PASSED_OVER)
        for file in sorted(files):
            if file.endswith(".py"):
                yield (Path(top) / file).relative_to(folder).as_posix()


def docstrings(file: Path) -> list[str]:
    """The docstrings of a Python file in their order. It is parsed, never run; what does not parse has none."""
    try:
        with warnings.catch_warnings():  # old files hold escapes that Python now warns of
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has no line, it comes first
    return [body for node in nodes if (body := ast.get_docstring(node))]


def stdlib_docstrings(split: str) -> Iterator[list[str]]:
    """The docstrings of each standard-library file of one side; FileNotFoundError where sources are not installed."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = list(python_files(folder))
    if not names:
        raise FileNotFoundError(
            f"the sources of Python's standard library are not in {str(folder)!r}: install a Python that brings "
            "them, or take 'pydoc-topics', which is on every machine"
        )
    return (docstrings(folder / name) for name in _side(names, split))


def _read(file: Path) -> str:
    """The file's text; ValueError that names it when it is not UTF-8."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _side(names: Iterable[str], split: str) -> Iterator[str]:
    """The names that hash to `split` (two of three to calibration), in the order of that hash."""
    hashed = sorted((hashlib.sha256(name.encode()).digest(), name) for name in names)
    return (name for digest, name in hashed if SPLITS[digest[-1] % 3 == 0] == split)


def _hub_rows(text: str, split: str) -> Iterator[str]:
    """Rows of a data set on the hub, streamed: only what is read is fetched."""
    repository, configuration, splits = HUB[text]
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{text!r} comes from the hub through the datasets library: pip install datasets, "
            "or take 'pydoc-topics', which is on every machine"
        ) from error
    try:
        rows = load_dataset(repository, configuration, split=splits[split], streaming=True)
        for row in rows:
            if row["text"].strip():
                yield row["text"]
    except (OSError, ConnectionError) as error:
        raise ConnectionError(
            f"{text!r} lies on the hub, which cannot be reached ({type(error).__name__}): go online, "
            "or take 'pydoc-topics', which is on every machine"
        ) from error
