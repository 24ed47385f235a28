"""What every executable chapter must keep to. Whether its numbers are right is for strict.py to say."""

import copy
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_tools"))

import install_cell  # noqa: E402
import refresh  # noqa: E402

NOTEBOOKS = sorted((ROOT / "book").glob("**/*.ipynb"))
PICTURES = {"image/png", "image/jpeg", "image/svg+xml", "image/gif"}
MOST_LINES = 25
MOST_BYTES = 500_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    """Each chapter in turn."""
    return nbformat.read(request.param, as_version=4)


def code(notebook) -> list:
    """Its code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook) -> list[str]:
    """All HTML that it shows: outputs, the frames of its widgets, and its text."""
    parts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    parts += [
        "".join(output.get("data", {}).get("text/html", ""))
        for cell in code(notebook)
        for output in cell.outputs
    ]
    state = notebook.metadata.get("widgets", {}).get(refresh.WIDGETS, {}).get("state", {})
    return parts + [str(model["state"].get("value", "")) for model in state.values()]


def test_there_are_chapters():
    assert NOTEBOOKS, "no notebook under book/: every other test here would pass without looking"


def test_was_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_are_stored(notebook):
    """Without stored outputs nbval compares nothing and passes."""
    silent = [c.source for c in code(notebook) if re.search(r"^print\(", c.source, re.M) and not c.outputs]
    assert not silent, f"run `make outputs`: no output stored for\n{silent[0]}"
    assert any(cell.outputs for cell in code(notebook))


def test_no_output_is_an_error(notebook):
    errors = [o for cell in code(notebook) for o in cell.outputs if o.output_type == "error"]
    assert not errors, errors[0].evalue


def test_is_stored_as_make_outputs_leaves_it(notebook):
    """No random id, no timing, no version of a tool: a diff shows only what was meant."""
    python = notebook.metadata.get("kvteach", {}).get("python")
    again = copy.deepcopy(notebook)
    refresh.normalise(again)
    again.metadata["kvteach"]["python"] = python
    assert again == notebook, "run `make outputs`"


def test_first_code_cell_installs_the_package_on_colab(notebook):
    cell = code(notebook)[0]
    assert cell.source == install_cell.source(), "run `make outputs`: it writes this cell"
    assert "hide-cell" in cell.metadata.get("tags", [])


def test_cells_are_short(notebook):
    long = [cell.source for cell in code(notebook) if len(cell.source.splitlines()) > MOST_LINES]
    assert not long, f"over {MOST_LINES} lines: {long[0][:200]}"


def test_drawn_pictures_have_alt_text(notebook):
    """The cell's metadata, mystnb.image.alt, becomes the picture's alt text on the page."""
    for cell in code(notebook):
        draws = any(PICTURES & set(output.get("data", {})) for output in cell.outputs)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert not draws or alt.strip(), f"a picture without alt text is drawn by\n{cell.source}"


def test_written_pictures_have_alt_text(notebook):
    """In text, in HTML and in each frame of a figure that moves."""
    for text in shown(notebook):
        for tag in re.findall(r"<img\b[^>]*>", text):
            assert re.search(r"""\balt=(["'])\s*\S.*?\1""", tag, re.S), tag[:200]
        assert not re.search(r"!\[\s*\]\(", text), text
        for figure in re.findall(r"^(`{3,}|:{3,})\{(?:figure|image)\}(.*?)^\1", text, re.S | re.M):
            assert re.search(r"^:alt:\s*\S", figure[1], re.M), figure[1]


def test_no_file_of_the_book_is_large():
    ours = (p for p in (ROOT / "book").rglob("*") if p.is_file() and "vendor" not in p.parts)
    assert not [f"{p.name}: {p.stat().st_size} bytes" for p in ours if p.stat().st_size > MOST_BYTES]


def test_notebooks_are_valid_json_with_one_kernel():
    for path in NOTEBOOKS:
        assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
