"""All benchmarks, or those that are named: `python tests/benchmarks/run.py [NAME ...] [--json FILE]`.

decode       steps of the original, compressed, native GQA, and of other ways through transformers
calibration  streaming moments against plain forward passes and against an SVD of stored activations
conversion   compress, with moments at hand, and sequential
imports      seconds until a name can be used
book         seconds of a build from nothing

Each prints lines for people; --json writes one document. Nothing here is a test, and no time is asserted anywhere.
"""

import argparse
import datetime
import importlib
import json
import os
import sys
from pathlib import Path

NAMES = ("decode", "calibration", "conversion", "imports", "book")


def main() -> None:
    """Run them one after the other, so that none slows another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    from kvteach import env

    found = {"date": datetime.date.today().isoformat(), "environment": env.report().splitlines()}
    for name in asked.names or NAMES:
        print(f"# {name} (load {os.getloadavg()[0]:.1f})", flush=True)
        found[name] = importlib.import_module(name).measure()
        if asked.json:  # after each, for who stops it
            Path(asked.json).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
