"""Building the book from nothing, into a folder of its own; notebooks are not run, they carry their outputs."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def measure() -> dict:
    """Seconds and bytes; the widgets and MathJax must have been fetched, as `make book` does."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            Path(sys.executable).with_name("jupyter-book"),
            "build",
            "-q",
            "--path-output",
            folder,
            ROOT,
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        pages = Path(folder) / "_build" / "html"
        size = sum(file.stat().st_size for file in pages.rglob("*") if file.is_file())
    print(f"build {seconds:.1f} s, {size / 1e6:.1f} MB")
    return {"seconds": seconds, "bytes": size}
