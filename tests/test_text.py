"""Windows come from the text that was named, the two sides never share a document."""

from pydoc_data.topics import topics

import pytest

from kvteach import text


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, body, **kwargs):
        return {"input_ids": [ord(letter) for letter in body]}


def read(windows) -> str:
    return "".join(map(chr, windows.ids.ravel().tolist()))


def test_sides_are_disjoint_and_complete():
    calibration, evaluation = (list(text.documents("pydoc-topics", split)) for split in text.SPLITS)
    assert sorted(calibration + evaluation) == sorted(topics.values())
    assert not set(calibration) & set(evaluation)


def test_the_split_depends_on_the_name_alone(tmp_path):
    def sides():
        return {split: set(text.documents(tmp_path, split)) for split in text.SPLITS}

    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"body {number}")
    before = sides()
    (tmp_path / "new.md").write_text("a thirteenth")
    after = sides()
    assert all(before[split] <= after[split] for split in text.SPLITS)
    assert sum(map(len, after.values())) == 13


def test_windows_are_the_text_in_order():
    windows = text.windows(Letters(), count=3, length=50)
    assert windows.ids.shape == (3, 50)
    assert read(windows) == next(text.documents("pydoc-topics", "calibration"))[:150]
    assert text.windows(Letters(), 2, 50).fingerprint != windows.fingerprint
    assert text.windows(Letters(), 3, 50).fingerprint == windows.fingerprint
    assert text.windows(Letters(), 3, 50, "evaluation").fingerprint != windows.fingerprint
    assert (
        repr(windows)
        == f"pydoc-topics, calibration: 3 windows × 50 tokens, fingerprint {windows.fingerprint}"
    )


def test_the_side_of_a_document_is_pinned():
    """By the sha256 of its name, one of three to evaluation: a change here would mix old and new splits."""
    import hashlib

    for name, body in topics.items():
        side = text.SPLITS[hashlib.sha256(name.encode()).digest()[-1] % 3 == 0]
        assert body in set(text.documents("pydoc-topics", side))


def test_a_folder_is_read_by_relative_names_whatever_lies_in_it(tmp_path, monkeypatch):
    for top in ("one", "two"):
        folder = tmp_path / top / "deep"
        folder.mkdir(parents=True)
        (folder.parent / "folder.txt").mkdir()
        for number in range(9):
            (folder / f"{number}.txt").write_text(f"{top} {number}")
    one, two = ([*text.documents(tmp_path / top, "calibration")] for top in ("one", "two"))
    assert one and [body.split()[1] for body in one] == [body.split()[1] for body in two]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [*text.documents("~/one", "calibration")] == one
    (tmp_path / "one" / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad.txt' is not UTF-8 text"):
        [*text.documents(tmp_path / "one", "calibration"), *text.documents(tmp_path / "one", "evaluation")]


def test_documents_are_joined_by_blank_lines_without_special_tokens(tmp_path):
    class Strict(Letters):
        def __call__(self, body, add_special_tokens=True, **kwargs):
            assert not add_special_tokens
            return super().__call__(body)

    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(f"paragraph {n}" for n in range(20)) + "\n\n\n\n")
    bodies = list(text.documents(file, "calibration"))
    assert all(body.strip() for body in bodies)
    joined = "".join(body + "\n\n" for body in bodies)
    assert read(text.windows(Strict(), 1, len(joined), text=file)) == joined


def test_a_file_of_paragraphs(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(f"paragraph {n}" for n in range(20)))
    both = [set(text.documents(file, split)) for split in text.SPLITS]
    assert not both[0] & both[1]
    assert len(both[0] | both[1]) == 20
    assert text.windows(Letters(), 1, 12, text=file).ids.shape == (1, 12)


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match=r"has \d+ windows of 512 tokens, 1000000 were asked for"):
        text.windows(Letters(), 10**6)
    with pytest.raises(ValueError, match="split is 'test'; it is one of calibration, evaluation"):
        text.windows(Letters(), 1, split="test")
    with pytest.raises(ValueError, match="split is 'test'"):
        text.documents("pydoc-topics", "test")
    with pytest.raises(ValueError, match="must be at least 1"):
        text.windows(Letters(), 0)
    with pytest.raises(
        LookupError, match="no text 'wiki': name pydoc-topics, stdlib-docstrings, wikitext-2, c4, or a file"
    ):
        text.windows(Letters(), 1, text="wiki")


def test_docstrings_are_read_in_order_and_nothing_is_run(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n    def f(self):\n        """Method.\n\n'
        '        More."""\ndef g():\n    """Function."""\nasync def h():\n    "Last."\n'
    )
    assert text.docstrings(file) == ["Module.", "Class.", "Method.\n\nMore.", "Function.", "Last."]
    file.write_text("def f(:")
    assert text.docstrings(file) == []
    file.write_bytes(b"\0")
    assert text.docstrings(file) == []


def test_python_files_leave_out_tests_and_other_packages(tmp_path):
    for name in ("b.py", "a/c.py", "a/notes.txt", "test/d.py", "a/tests/e.py", "site-packages/f/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(text.python_files(tmp_path)) == ["a/c.py", "b.py"]


def test_the_standard_library_is_a_text():
    import argparse

    sides = [list(text.documents("stdlib-docstrings", split)) for split in text.SPLITS]
    assert all(len(side) > 50 for side in sides)
    assert sides == [list(text.documents("stdlib-docstrings", split)) for split in text.SPLITS]
    assert sum(body.startswith(argparse.__doc__.strip()[:200]) for side in sides for body in side) == 1
    windows = text.windows(Letters(), 2, 100, "evaluation", "stdlib-docstrings")
    assert read(windows) == "\n\n".join(sides[1])[:200]


def test_a_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sources of Python's standard library are not in"):
        text.windows(Letters(), 1, text="stdlib-docstrings")


def test_hub_texts_are_read_from_a_data_set(tmp_path, monkeypatch):
    """The real loading code, on a data set in a local folder."""
    (tmp_path / "train.jsonl").write_text('{"text": "the training side"}\n{"text": " "}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "the test side"}\n')
    splits = {"calibration": "train", "evaluation": "test"}
    monkeypatch.setitem(text.HUB, "wikitext-2", (str(tmp_path), None, splits))
    assert list(text.documents("wikitext-2", "calibration")) == ["the training side"]
    assert read(text.windows(Letters(), 1, 8, "evaluation", "wikitext-2")) == "the test"


def test_no_network_never_means_another_text(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="'c4' lies on the hub, which cannot be reached"):
        text.windows(Letters(), 1, text="c4")


def test_a_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        text.windows(Letters(), 1, text="c4")
