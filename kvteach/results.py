"""Numbers that took long to measure, stored in ``book/data``: `names` finds tables, `load` reads one, `ratio` one cell.

In a checkout the files are read from there. Where only the package is installed, as in Colab, the file of this version
is fetched from the repository.
"""

import json
import urllib.request
from pathlib import Path

from . import __version__

FOLDER = Path(__file__).resolve().parents[1] / "book" / "data"
REMOTE = "https://raw.githubusercontent.com/kvteach/kvteach/v{version}/book/data/{name}.json"
# What a row is about unless it is asked otherwise.
USUAL = {
    "kv_heads": None,
    "kv_ratio": None,
    "length": 512,
    "calibrated": 512,
    "reach": 512,
    "text": "pydoc-topics",
}


def load(name: str) -> dict:
    """A stored table: ``"made with"`` tells versions and device, ``"rows"`` is a list of rows.

    ConnectionError when the file is neither here nor to be fetched.
    """
    if (file := FOLDER / f"{name}.json").is_file():
        return json.loads(file.read_text("utf-8"))
    try:
        with urllib.request.urlopen(REMOTE.format(version=__version__, name=name), timeout=30) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no table {name!r} in {str(FOLDER)!r}, and it cannot be fetched ({error}): go online, or work in a "
            "checkout of the repository"
        ) from error


def names(start: str) -> list[str]:
    """Stored tables of a checkout whose names start so, in order; none where only the package is installed."""
    return sorted(file.stem for file in FOLDER.glob(f"{start}*.json"))


def ratio(table: dict, **wanted) -> str:
    """The perplexity ratio of one row and its standard error; a dash where there is no such row.

    >>> row = USUAL | {"model": "m", "basis": "b", "kv_heads": 2, "ratio": 1.034, "ratio_error": 0.004}
    >>> ratio({"rows": [row]}, model="m", basis="b", kv_heads=2), ratio({"rows": [row]}, model="m", basis="b")
    ('1.03 ± 0.00', '–')
    """
    wanted = USUAL | wanted
    for row in table["rows"]:
        if all(row[name] == value for name, value in wanted.items()):
            return f"{row['ratio']:.2f} ± {row['ratio_error']:.2f}"
    return "–"
