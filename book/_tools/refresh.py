"""Runs notebooks from top to bottom and stores what they print: `make outputs`, `make outputs PAGE=book/x.ipynb`.

What is stored is the same after every run with the same result, so a change in a notebook's file is a change
in what it says: numbers instead of random widget ids, no timings, no version of a tool. A notebook with
a failing cell is left as it was.
"""

import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import install_cell
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from kvteach import figures

BOOK = Path(__file__).resolve().parents[1]
WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 600
KEPT = {"tags", "mystnb", "jupyter"}  # of a cell's metadata
# The same for every run, here and where the result is compared with a new one (tests/strict.py).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",  # the last digits of a sum depend on how many threads share it
    "OMP_WAIT_POLICY": "PASSIVE",  # on busy cores, threads that wait by spinning are two hundred times slower
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",  # a progress bar is for who waits, not for who reads
}
HEX = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


def execute(notebook, folder: Path) -> None:
    """In a fresh kernel whose working folder is the notebook's own."""
    notebook.metadata.pop("widgets", None)
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=True,
        record_timing=False,
    ).execute(stderr=subprocess.DEVNULL)  # where a kernel warns, on each start, that it uses TCP


def shrink_pictures(notebook) -> None:
    """Fewer colours, a fraction of the bytes. Of fresh pictures only: doing it twice is not the same as once."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                small = figures.shrink(base64.b64decode(picture))
                output.data["image/png"] = base64.b64encode(small).decode()


def normalise(notebook) -> None:
    """Keep what the book and its tests read, and nothing that differs from one run to the next."""
    notebook.metadata = {
        **{key: notebook.metadata[key] for key in ("accelerator", "colab") if key in notebook.metadata},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        # Some pages measure CPython's own manual, which differs between minor versions of Python.
        "kvteach": {"python": "{}.{}".format(*sys.version_info[:2])},
        **{key: notebook.metadata[key] for key in ("widgets",) if key in notebook.metadata},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT}
        if re.fullmatch(r"[0-9a-f]{8}(-.*)?", cell.id):  # a random one; names given by hand stay
            cell.id = f"cell-{number}"
    number_widgets(notebook)


def joined(outputs: list) -> list:
    """With what was printed in one go, however many pieces it came in."""
    whole = []
    for output in outputs:
        if whole and output.get("name") and output.get("name") == whole[-1].get("name"):
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def number_widgets(notebook) -> None:
    """Give the widgets the ids 1, 2, 3 … in the order in which the page shows them."""
    if not notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state"):
        notebook.metadata.pop("widgets", None)
        return
    state = notebook.metadata["widgets"][WIDGETS]["state"]
    order: dict[str, str] = {}

    def visit(model: str) -> None:
        if model in state and model not in order:
            order[model] = f"{len(order) + 1:032x}"
            for inner in HEX.findall(json.dumps(state[model], sort_keys=True)):
                visit(inner)

    def renamed(text: str, unknown: str | None = None) -> str:
        return HEX.sub(lambda match: order.get(match[0], unknown or match[0]), text)

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if VIEW in output.get("data", {}):
                visit(output.data[VIEW]["model_id"])
    # What no picture contains (the link between a slider and its frames) is told apart by what it contains.
    for model in sorted(
        set(state) - set(order), key=lambda m: renamed(json.dumps(state[m], sort_keys=True), "?")
    ):
        visit(model)

    new = json.loads(renamed(json.dumps(state)))
    notebook.metadata["widgets"][WIDGETS]["state"] = dict(sorted(new.items()))
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if VIEW in output.get("data", {}):
                output.data[VIEW]["model_id"] = order[output.data[VIEW]["model_id"]]


def write(notebook, path: Path) -> bool:
    """Replace the file in one move, if its content changes."""
    text = nbformat.writes(notebook) + "\n"
    if path.read_text(encoding="utf-8") == text:
        return False
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return True


def refresh(path: Path) -> None:
    """One notebook, with a line that says how long it took and whether anything changed."""
    print(f"{path.name} ", end="", flush=True)
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    install_cell.put(notebook)
    execute(notebook, path.parent)
    shrink_pictures(notebook)
    normalise(notebook)
    nbformat.validate(notebook)
    changed = write(notebook, path)
    print(f"{time.perf_counter() - start:.1f} s, {'stored' if changed else 'unchanged'}", flush=True)


def main(names: list[str]) -> None:
    """All notebooks of the book, or those named."""
    os.environ.update(ENVIRONMENT)
    os.environ["TQDM_DISABLE"] = "1"  # a progress bar is no result
    paths = [Path(name) for name in names] or sorted(BOOK.rglob("*.ipynb"))
    failed = False
    for path in paths:
        try:
            refresh(path)
        except CellExecutionError as error:
            failed = True
            print(f"failed, and left as it was:\n{error}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nStopped: the notebook that was running is left as it was.")
