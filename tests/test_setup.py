"""The sentences of the set-up, and that only what has changed is done again. Needs no network."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_tools"))

import freeze  # noqa: E402
import setup_env  # noqa: E402


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "free about 4 GB"),
        ("npm error code ENOSPC", "free about 4 GB"),
        ("OSError: [Errno 122] Disk quota exceeded", "quota"),
        (
            "NewConnectionError(': Failed to establish a new connection: [Errno -3] name resolution')",
            "network",
        ),
        ("npm error code EAI_AGAIN", "network"),
        ("[Errno 13] Permission denied: '.venv'", "folder of your own"),
    ],
)
def test_a_known_cause_gets_one_sentence_with_its_remedy(output, remedy):
    sentence = setup_env.explain("Collecting numpy\n" + output + "\n")
    assert remedy in sentence
    assert sentence.count(". ") == 0 and sentence.endswith(".")


def test_an_unknown_cause_gets_none():
    assert setup_env.explain("ERROR: ResolutionImpossible") is None


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 9)])
def test_an_old_python_is_named_with_the_way_out(version):
    with pytest.raises(setup_env.Problem, match=r"3\.10 or newer.*PYTHON="):
        setup_env.check_python(version)


@pytest.mark.parametrize("version", [(3, 10), (3, 13), (4, 0)])
def test_a_newer_python_is_fine(version):
    setup_env.check_python(version)


def test_a_full_disk_is_noticed_before_the_download():
    with pytest.raises(setup_env.Problem, match=r"1\.5 GB free"):
        setup_env.check_space(1.5e9)
    setup_env.check_space(4e9)


def test_a_python_without_ensurepip_is_told_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(setup_env.Problem, match="apt install python3-venv"):
        setup_env.make_venv()


def test_a_failing_command_is_explained():
    script = "import sys; sys.exit('[Errno 28] No space left on device')"
    with pytest.raises(setup_env.Problem, match="disk is full"):
        setup_env.run([sys.executable, "-c", script])


def test_without_python_make_says_what_to_install():
    done = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "There is no no-such-python here: install Python 3.10 or newer" in done.stdout


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Three steps made from three strings, in a folder that looks installed."""
    monkeypatch.setattr(setup_env, "STAMPS", tmp_path)
    monkeypatch.setattr(setup_env, "PYTHON", Path(sys.executable))
    return lambda *inputs: [(f"step{i}", [text], "", None) for i, text in enumerate(inputs)]


def names(left) -> list[str]:
    """Of the steps that are left to do."""
    return [name for name, *_ in left]


def test_only_a_changed_step_and_those_after_it_are_done_again(steps, tmp_path):
    for name, now, *_ in setup_env.pending(steps("a", "b", "c")):
        (tmp_path / name).write_text(now)
    assert names(setup_env.pending(steps("a", "b", "c"))) == []
    assert names(setup_env.pending(steps("a", "B", "c"))) == ["step1", "step2"]


def test_an_interrupted_step_is_done_again(steps, tmp_path):
    """Its stamp is written last, so there is none."""
    (name, now, *_), *_ = setup_env.pending(steps("a", "b"))
    (tmp_path / name).write_text(now)
    assert names(setup_env.pending(steps("a", "b"))) == ["step1"]


@pytest.mark.parametrize(
    ("python", "pin"),
    [
        (None, "torch==2.13.0"),
        (">=3.10", "torch==2.13.0"),
        (">=3.11.5", 'torch==2.13.0; python_full_version >= "3.11.5"'),
    ],
)
def test_a_pin_has_no_local_part_and_asks_for_the_python_it_needs(python, pin):
    assert freeze.line("torch", "2.13.0+cpu", python) == pin
