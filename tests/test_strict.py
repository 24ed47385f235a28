"""Shows that comparing stored outputs finds something: a changed digit fails, an unchanged copy passes."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "book" / "01-svd-by-hand.ipynb"  # needs no model


def strict(*notebooks: Path) -> subprocess.CompletedProcess:
    """The command that `make notebooks` runs."""
    command = [sys.executable, "tests/strict.py", *map(str, notebooks)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def change_a_digit(notebook) -> None:
    """The last digit of the first line that a cell has printed."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and re.search(r"\d", output.text):
                change = lambda digit: str((int(digit[0]) + 1) % 10)  # noqa: E731
                output.text = re.sub(r"\d(?=\D*$)", change, output.text, count=1)
                return
    raise AssertionError("the chapter prints no number")


def test_a_changed_number_is_found_and_an_unchanged_copy_passes(tmp_path):
    notebook = nbformat.read(CHAPTER, as_version=4)
    notebook.metadata.setdefault("kvteach", {})["python"] = "{}.{}".format(*sys.version_info[:2])
    nbformat.write(notebook, tmp_path / "same.ipynb")
    change_a_digit(notebook)
    nbformat.write(notebook, tmp_path / "changed.ipynb")

    done = strict(tmp_path / "same.ipynb", tmp_path / "changed.ipynb")

    assert done.returncode != 0
    assert re.search(r"\b1 failed", done.stdout), done.stdout
    assert "changed.ipynb" in done.stdout and "FAILED" in done.stdout.upper()
    assert not re.search(r"^FAILED.*same\.ipynb", done.stdout, re.M), done.stdout


def test_outputs_of_another_python_are_run_but_not_compared(tmp_path):
    """A cell that fails still fails; a number that differs does not."""
    differs = nbformat.v4.new_code_cell(
        "print(1)", execution_count=1, outputs=[nbformat.v4.new_output("stream", text="2\n")]
    )
    breaks = nbformat.v4.new_code_cell("1 / 0", execution_count=2)
    notebook = nbformat.v4.new_notebook(cells=[differs], metadata={"kvteach": {"python": "3.1"}})
    nbformat.write(notebook, tmp_path / "differs.ipynb")
    notebook.cells.append(breaks)
    nbformat.write(notebook, tmp_path / "breaks.ipynb")

    lenient = strict(tmp_path / "differs.ipynb")
    assert lenient.returncode == 0 and "not compared" in lenient.stdout, lenient.stdout
    assert strict(tmp_path / "breaks.ipynb").returncode != 0
