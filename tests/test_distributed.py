"""Several processes have the moments of one; what fails in one of them fails in all, leaves nothing half, and goes on.

Each test starts real processes, as torchrun would: with their place in the environment.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from test_moments import close, same

from kvteach import cli, distributed
from kvteach.calibration import calibrate
from kvteach.convert import compress
from kvteach.moments import WEIGHTS, Moments
from kvteach.plan import Plan

WINDOWS, LENGTH = 7, 6  # an odd number: shares are unequal
TIMEOUT = 60  # of a run in which nothing hangs; it is never waited for
MODULES = ("llama.modeling_llama", "mistral.modeling_mistral", "qwen2.modeling_qwen2", "bloom.modeling_bloom")
ROOT = Path(__file__).resolve().parents[1]


FORKED = multiprocessing.get_context("forkserver")  # imports once what every process needs
FORKED.set_forkserver_preload(
    ["kvteach.distributed", "transformers", *("transformers.models." + m for m in MODULES)]
)


def start(size: int, work, *arguments, timeout: float = TIMEOUT, ranks=None) -> list:
    """`size` processes, or those of `ranks`, that run ``work(processes, *arguments)`` in one group; see `ended`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size) if ranks is None else ranks:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        place |= {"MASTER_ADDR": "127.0.0.1"}
        end = FORKED.Queue()
        process = FORKED.Process(target=_run, args=(place, timeout, end, work, arguments), daemon=True)
        process.start()
        started.append((process, end))
    return started


def _run(place: dict, timeout: float, end, work, arguments) -> None:
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    try:
        with distributed.join(timeout) as processes:
            end.put(work(processes, *arguments))
    except Exception as error:
        end.put((type(error).__name__, str(error)))


def ended(started: list) -> list:
    """What each process returned, or the name and sentence of its error; None for one that was killed."""
    found = []
    for process, end in started:
        process.join(90)
        assert process.exitcode is not None, "a process hangs"
        found.append(None if process.exitcode else end.get(timeout=10))
    return found


def run(size: int, work, *arguments) -> list:
    return ended(start(size, work, *arguments))


def model_and_ids(windows: int = WINDOWS):
    return tiny.MODELS["llama-gqa"](), tiny.ids(windows, LENGTH)


# -- the work of one process, by name: it must be importable in the process that runs it --------------------


def summed(processes, folder: str, windows: int = WINDOWS, path: str | None = None, attention: bool = True):
    """Calibrate, and keep what this process got."""
    model, ids = model_and_ids(windows)
    moments = processes.calibrate(model, ids, attention=attention, path=path, progress=False)
    moments.save(f"{folder}/{processes.rank}")
    return sorted(os.listdir(Path(path).parent)) if path else None


def stopped_in_the_third(processes, rank: int, how: str, path: str):
    """Process `rank` is stopped in its third window; nothing is kept more often than a window."""
    model, ids = model_and_ids(9)
    passes = []

    def stop(*args):
        passes.append(1)
        if processes.rank == rank and len(passes) == 3:
            if how == "error":
                raise ValueError("this window is broken")
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(60)  # a signal may take a moment to arrive

    model.model.layers[1].register_forward_pre_hook(stop)
    return processes.calibrate(model, ids, attention=True, path=path, progress=False).count


def different(processes, what: str):
    model, ids = model_and_ids()
    if processes.rank == 1:
        ids = tiny.ids(WINDOWS, LENGTH, seed=2) if what == "windows" else ids
        model = tiny.MODELS["llama-mha"]() if what == "model" else model
    return processes.calibrate(model, ids, attention=what == "attention" and bool(processes.rank)).count


def raised_before(processes, where: int):
    if processes.rank == where:
        raise LookupError("no model of this name")
    model, ids = model_and_ids()
    return processes.calibrate(model, ids, progress=False).count


def free_after_leaving(processes, folder: str):
    """One process goes on alone and fails alone."""
    summed(processes, folder)
    processes.leave()
    if processes.rank == 0:
        raise OSError("the disk is full")
    return "left"


# -- equal to one process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_one():
    model, ids = model_and_ids()
    return calibrate(model, ids, attention=True, progress=False)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    kept = folder / "kept" / "moments"
    left = run(2, summed, str(folder), WINDOWS, str(kept))
    return [Moments.load(folder / name) for name in "01"], kept, left


def test_two_processes_have_the_moments_of_one(by_one, by_two):
    both, kept, left = by_two
    assert same(*both)  # to the last bit
    assert close(both[0], by_one) and set(both[0].weight) == set(WEIGHTS)
    assert all(torch.equal(both[0].weight[kind], by_one.weight[kind]) for kind in WEIGHTS)
    assert same(Moments.load(kept), both[0])
    assert left == [["moments"]] * 2 or left == [[*left[0]], ["moments"]]
    assert os.listdir(kept.parent) == ["moments"]  # the shares are gone


def test_the_basis_is_that_of_one_process(by_one, by_two):
    """The directions kept span the same space: equal projectors, whatever the signs of the vectors."""
    for kind in ("keys_post", "keys_attended", "values"):
        for layer in range(by_one.source.layers):
            projectors = []
            for moments in (by_one, by_two[0][0]):
                vectors = torch.linalg.eigh(moments.matrix(kind, layer)).eigenvectors[:, -16:]  # [d, 16]
                projectors.append(vectors @ vectors.T)
            assert torch.allclose(*projectors, rtol=0, atol=1e-9)


def test_the_compressed_model_is_that_of_one_process(by_one, by_two):
    model, ids = model_and_ids()
    with torch.no_grad():
        one, two = (
            compress(model, m, Plan(kv_heads=1), progress=False)(ids).logits for m in (by_one, by_two[0][0])
        )
    assert torch.allclose(one, two, rtol=0, atol=1e-9)


def test_the_file_is_a_finished_file_of_one_process(by_two):
    """Whoever reads it, alone or together, runs no window again."""
    both, kept, _ = by_two
    model, ids = model_and_ids()
    model.model.layers[0].register_forward_pre_hook(lambda *args: 1 / 0)
    assert same(calibrate(model, ids, attention=True, path=kept, progress=False), both[0])


def test_again_gives_the_same_bits_and_a_process_without_windows_brings_zeros(tmp_path, by_two):
    model, ids = model_and_ids(2)
    run(3, summed, str(tmp_path), 2)
    three = [Moments.load(tmp_path / name) for name in "012"]
    assert same(three[0], three[1]) and same(three[0], three[2])
    assert close(three[0], calibrate(model, ids, attention=True, progress=False))
    again, kept, _ = by_two
    run(2, summed, str(tmp_path), WINDOWS, str(kept))  # a finished file, read by both
    assert all(same(Moments.load(tmp_path / name), again[0]) for name in "01")
    run(2, summed, str(tmp_path))
    assert all(same(Moments.load(tmp_path / name), again[0]) for name in "01")


def test_alone_it_is_the_calibration_of_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model, ids = model_and_ids()
    with distributed.join() as processes:
        assert (processes.rank, processes.size) == (0, 1)
        found = processes.calibrate(model, ids, progress=False)
    assert same(found, calibrate(model, ids, progress=False))


# -- one of them fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, again", [(1, 2), (0, 3)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, rank, again):
    path = tmp_path / "moments"
    path.with_name("moments.share-0-of-2.77.partial").write_bytes(b"half")  # of a run killed while it wrote
    found = run(2, stopped_in_the_third, rank, "SIGKILL", str(path))
    assert found[rank] is None
    name, sentence = found[1 - rank]
    assert name == "Failed" and "goes on from there" in sentence
    assert ("process 1 of 2 is gone" if rank else "no answer from process 0, which is gone") in sentence
    shares = {file.name: Moments.load(file).count for file in tmp_path.iterdir()}  # whole, all of them
    assert set(shares) == {"moments.share-0-of-2", "moments.share-1-of-2"}
    done = {0: 5 * LENGTH, 1: 4 * LENGTH}
    assert 0 < shares[f"moments.share-{rank}-of-2"] <= 2 * LENGTH  # the windows before the third
    assert shares[f"moments.share-{1 - rank}-of-2"] == done[1 - rank]
    model, ids = model_and_ids(9)
    run(again, summed, str(tmp_path), 9, str(path))  # with as many, or with one more, which has no share
    assert close(Moments.load(path), calibrate(model, ids, attention=True, progress=False))
    assert not list(tmp_path.glob("*share*"))


def test_a_process_that_hangs_is_named_after_the_timeout(tmp_path):
    started = start(2, stopped_in_the_third, 1, "SIGSTOP", str(tmp_path / "moments"), timeout=10)
    [(name, sentence)] = ended(started[:1])
    started[1][0].kill()
    assert name == "Failed"
    assert "process 1 of 2 is gone, or has not come to the others within 10 s" in sentence
    assert not (tmp_path / "moments").exists()


def test_an_error_in_one_process_is_raised_in_all_and_the_work_is_kept(tmp_path):
    path = tmp_path / "moments"
    found = run(3, stopped_in_the_third, 2, "error", str(path))
    assert found == [("Failed", "process 2 failed: this window is broken")] * 3
    assert {file.name for file in tmp_path.iterdir()} == {f"moments.share-{s}-of-3" for s in range(3)}
    run(2, summed, str(tmp_path), 9, str(path))  # fewer processes: one reads two shares
    model, ids = model_and_ids(9)
    assert close(Moments.load(path), calibrate(model, ids, attention=True, progress=False))


def test_sigterm_saves_what_is_done(tmp_path):
    """torchrun ends the others so; each keeps its finished windows."""
    path = tmp_path / "moments"
    found = run(2, stopped_in_the_third, 1, "SIGTERM", str(path))
    assert "process 1 was told to stop" in found[1][1]
    assert "process 1 of 2 is gone" in found[0][1]
    assert Moments.load(tmp_path / "moments.share-1-of-2").count == 2 * LENGTH


def test_processes_that_were_asked_for_different_things_are_refused():
    for what in ("windows", "attention"):
        for end in run(2, different, what):
            assert end == ("Failed", "process 1 was given other windows, batch or attention than process 0")
    for end in run(2, different, "model"):
        assert end[0] == "Failed" and "process 1 holds moments of another model" in end[1]


def test_an_error_before_the_calibration_reaches_all_processes():
    for where in (0, 1):
        found = run(2, raised_before, where)
        assert found == [("Failed", f"process {where} failed: no model of this name")] * 2


def test_after_leaving_each_is_for_itself(tmp_path):
    assert run(2, free_after_leaving, str(tmp_path)) == [("OSError", "the disk is full"), "left"]


def test_a_process_that_never_starts():
    [(name, sentence)] = ended(start(2, raised_before, 0, timeout=3, ranks=[0]))
    assert (name, sentence) == (
        "Failed",
        "process 0: the 2 processes did not all start within 3 s, or do not reach one another",
    )


def test_an_environment_that_torchrun_has_not_made(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not set: start the processes with torchrun"):
        distributed.join().__enter__()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with distributed._own_device("cpu") as backend:
        assert backend == "gloo"
    with pytest.raises(ValueError, match="no GPU of its own: start torchrun with --nproc-per-node 1"):
        distributed.join().__enter__()


# -- the command ------------------------------------------------------------------------------------------


def torchrun(*arguments):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kvteach",
    ]
    return subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_the_command_under_torchrun_writes_one_folder_once(tmp_path):
    asked = [
        "compress",
        "mini-llama",
        "--kv-heads",
        "2",
        "--windows",
        "3",
        "--length",
        "32",
        "--eval-windows",
        "1",
    ]
    found = torchrun(*asked, "--no-sequential", "--out", tmp_path / "small", "--json", "-")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)  # one document, from one process
    assert told["cache_bytes_per_token"] == 2048
    assert found.stderr.count("planned:") == 1 and found.stderr.count("written:") == 1
    assert os.listdir(tmp_path) == ["small"]  # no share, nothing to resume
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir(tmp_path / "small"))


def test_an_error_under_torchrun_is_said_once(tmp_path):
    found = torchrun("compress", "mini-llama", "--kv-heads", "2", "--out", tmp_path / "small")
    assert found.returncode == 1
    said = [line for line in found.stderr.splitlines() if line.startswith("kvteach:")]
    assert said == [
        "kvteach: layer by layer a model is converted in one process: add --no-sequential, or start this without "
        "torchrun"
    ]
    assert not os.listdir(tmp_path)


def test_commands_for_one_process_are_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["spectrum", "mini-llama"]) == 1
    assert "only compress runs in several processes" in capsys.readouterr().err
