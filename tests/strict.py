"""Runs notebooks with nbval and compares every line they print with the stored one: `make notebooks`.

    python tests/strict.py [NOTEBOOK ...]        all of the book's when none is named

Compared, letter by letter: text, tables and values. Not compared: pictures, which nbval skips, and what
libraries say on standard error. Some chapters measure text that comes with Python and differs between its
minor versions; under another one than the outputs were stored with, they are run but not compared.
"""

import json
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "book" / "_tools"))

import refresh  # noqa: E402

CELL_SECONDS = 300  # nbval's own limit is 2000
MESSAGE_SECONDS = 60  # nbval waits 5 s for each message of the kernel, too short on a busy machine


class Rules:
    """What nbval cannot be told on its command line."""

    def pytest_collection_modifyitems(self, items):
        """More patience; and no comparison of warnings, which change with every library."""
        for item in items:
            item.output_timeout = MESSAGE_SECONDS
        for notebook in {item.parent for item in items}:
            notebook.skip_compare = (*notebook.skip_compare, "stderr")


def stored_with(path: Path) -> str | None:
    """The minor version of Python that the stored outputs come from; None where nobody has said."""
    return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("kvteach", {}).get("python")


def run(paths: list[Path], option: str) -> int:
    """nbval's exit status for these notebooks."""
    arguments = [
        option,
        "--nbval-current-env",
        f"--nbval-cell-timeout={CELL_SECONDS}",
        f"--nbval-sanitize-with={TESTS / 'nbval_sanitize.cfg'}",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    return pytest.main([*arguments, *map(str, paths)], plugins=[Rules()]) if paths else 0


def main(names: list[str]) -> int:
    """Strictly, where this Python is the one of the outputs; otherwise leniently, and say so."""
    os.environ.update(refresh.ENVIRONMENT)
    os.environ["TQDM_DISABLE"] = "1"  # a progress bar is no result
    here = "{}.{}".format(*sys.version_info[:2])
    paths = [Path(name) for name in names] or sorted((TESTS.parent / "book").glob("**/*.ipynb"))
    foreign = [path for path in paths if stored_with(path) not in (here, None)]
    failed = run([path for path in paths if path not in foreign], "--nbval")
    if foreign:
        versions = ", ".join(sorted({stored_with(path) for path in foreign}))
        print(
            f"Run but not compared, for their outputs come from Python {versions} and this is {here}: "
            + ", ".join(path.name for path in foreign)
        )
        failed = run(foreign, "--nbval-lax") or failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
