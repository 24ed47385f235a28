"""Runs the chapters as Colab would: `make colab`.

Makes `.venv-colab` with the versions that Colab has loaded (colab.txt), installs the built wheel of kvteach and the
other packages of the install cell with `--no-deps`, as that cell does, and runs every chapter from top to bottom.
Fails when the install changed a version that was there before, or when a cell fails. Colab itself has a GPU build
of torch and a newer Python; what can be checked without it is checked here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-colab"
PYTHON = VENV / "bin" / "python"
RUN = "import sys, colab; colab.execute(sys.argv[1])"


def main() -> None:
    """Set up, install, run."""
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    if not PYTHON.exists():
        print("Colab's packages: about 400 MB to download, 1.5 GB in .venv-colab", flush=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pins = [pin for pin in (ROOT / "constraints.txt").read_text().split() if pin.startswith("torch==")]
        subprocess.run([*pip, *pins, "-r", ROOT / "book/_tools/colab.txt"], check=True)
    before = versions()
    import install_cell

    others = install_cell.packages()[1:]
    with tempfile.TemporaryDirectory() as folder:
        wheel = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
        subprocess.run([*wheel, "--wheel-dir", folder, ROOT], check=True)
        command = [*pip, "--no-deps", "--force-reinstall", *Path(folder).glob("kvteach-*.whl"), *others]
        subprocess.run(command, check=True)
    # the stored tables, which Colab fetches from the repository, where `kvteach.results` looks for them first
    where = [PYTHON, "-c", "from kvteach import results; print(results.FOLDER)"]
    tables = subprocess.run(where, check=True, capture_output=True, text=True, cwd=VENV).stdout.strip()
    shutil.copytree(ROOT / "book" / "data", tables, dirs_exist_ok=True)
    if changed := [pin for pin in before - versions() if not pin.startswith(("kvteach", "gguf"))]:
        sys.exit(f"The install cell changed what was there: {', '.join(changed)}")
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([PYTHON, "-c", RUN, path], check=True, env=environment, cwd=VENV)
        print(f"{path.name} {time.perf_counter() - start:.1f} s", flush=True)


def versions() -> set[str]:
    """What is installed there, one ``name==version`` each."""
    listed = subprocess.run([PYTHON, "-m", "pip", "freeze"], check=True, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def execute(path: str) -> None:
    """Run one notebook there, in that environment's own kernel, and forget what it prints."""
    import nbformat
    from nbclient import NotebookClient

    NotebookClient(nbformat.read(path, as_version=4), timeout=600, kernel_name="python3").execute()


if __name__ == "__main__":
    main()
