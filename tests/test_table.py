"""The long table of chapter 4: a cell of it, chosen at random, is computed again."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "_tools"))

import table

STORED = json.loads(table.FILE.read_text("utf-8"))
ROWS = STORED["rows"]


def test_rows_are_different_cases_of_the_list():
    found = [table.of(row) for row in ROWS]
    assert len(set(found)) == len(found)
    assert set(found) <= set(table.cases())


def test_the_cases_are_different():
    assert len(set(table.cases())) == len(table.cases())


def test_each_text_of_the_table_comes_with_its_original():
    shown = {(row["model"], row["text"], row["length"], row["windows"]) for row in ROWS}
    originals = [row for row in ROWS if row["basis"] == "original"]
    assert {(row["model"], row["text"], row["length"], row["windows"]) for row in originals} == shown
    assert all(row["ratio"] == 1 and row["agreement"] == 1 for row in originals)


def test_bytes_shrink_as_the_plan_says():
    whole = {row["model"]: row["bytes_per_token"] for row in ROWS if row["basis"] == "original"}
    for row in ROWS:
        share = row["bytes_per_token"] / whole[row["model"]]
        if row["kv_heads"]:
            assert share == row["kv_heads"] / (3 if row["model"] == "smollm2-135m" else 8)
        elif row["kv_ratio"]:
            assert abs(share - row["kv_ratio"]) <= 1 / 192  # ranks are even numbers of 192


def test_one_cell_again():
    seed = random.randrange(10**6)
    minis = [row for row in ROWS if row["model"].startswith("mini-") and row["length"] == 512]
    row = random.Random(seed).choice(minis)
    again = table.result(table.of(row))
    if again["fingerprint"] != row["fingerprint"]:
        pytest.skip("this Python brings another text: the numbers of the table belong to 3.11")
    for name in ("ratio", "kl", "perplexity", "bytes_per_token"):
        assert again[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), f"seed {seed}: {name} of {row}"


def test_a_row_in_the_file_is_not_computed_again(tmp_path, monkeypatch, capsys):
    asked = []
    first, second = table.cases()[:2]

    def result(case):
        asked.append(case)
        return table.dataclasses.asdict(case) | {"ratio": 1.0, "seconds": 0.0}

    monkeypatch.setattr(table, "FILE", tmp_path / "data" / "bases.json")
    monkeypatch.setattr(table, "cases", lambda: [first, second])
    monkeypatch.setattr(table, "result", result)
    table.write([result(first)])
    asked.clear()
    table.main()
    assert asked == [second]
    assert [table.of(row) for row in json.loads(table.FILE.read_text("utf-8"))["rows"]] == [first, second]
