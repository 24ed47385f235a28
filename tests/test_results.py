"""Stored tables: found in a checkout, fetched elsewhere, one sentence when neither works."""

import doctest
import io
import json

import pytest

from kvteach import results


def test_examples():
    assert doctest.testmod(results).attempted and not doctest.testmod(results).failed


def test_every_row_is_found_by_what_it_is_about():
    table = results.load("bases")
    about = (*results.USUAL, "model", "basis")
    for row in table["rows"]:
        found = results.ratio(table, **{name: row[name] for name in about})
        assert found == f"{row['ratio']:.2f} ± {row['ratio_error']:.2f}"


def test_tables_are_found_by_the_start_of_their_names(tmp_path, monkeypatch):
    assert results.names("dec") == ["decode"] and results.names("no such") == []
    monkeypatch.setattr(results, "FOLDER", tmp_path / "nowhere")
    assert results.names("dec") == []


def test_without_a_checkout_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        return io.BytesIO(json.dumps({"rows": []}).encode())

    monkeypatch.setattr(results.urllib.request, "urlopen", urlopen)
    assert results.load("bases") == {"rows": []}
    assert asked[0].endswith(f"/v{results.__version__}/book/data/bases.json")


@pytest.mark.parametrize("answer", [OSError("no network"), io.BytesIO(b"<html>")])
def test_neither_here_nor_there(tmp_path, monkeypatch, answer):
    def urlopen(address, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results.urllib.request, "urlopen", urlopen)
    with pytest.raises(ConnectionError, match="go online"):
        results.load("bases")
