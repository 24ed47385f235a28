"""Calibration by several processes: each reads its share of the windows, and the sums are added.

    process p of n reads windows p, p + n, p + 2n, …        moments = M_0 + M_1 + … + M_(n−1)

Moments are additive, so the sum is that of one process up to the rounding of float64; it is added in an order that
depends on n alone, so the same run gives the same bits again. Processes are started by ``torchrun``, which tells
each its place in the environment. Sums travel over gloo on CPUs and over nccl on GPUs, errors always over gloo: what
fails in one process fails in all, with one sentence. Started without torchrun, the same code runs in its one process.

    with distributed.join() as processes:
        model, tokenizer = zoo.load("smollm2-135m")
        moments = processes.calibrate(model, text.windows(tokenizer, 64), path="moments.safetensors")
    if processes.rank == 0:
        ...
"""

import glob
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from . import calibration
from .moments import Moments

AGAIN = "finished windows are kept where a path was given, and the same command goes on from there"


class Failed(ConnectionError):
    """This process cannot go on, because another one failed or is gone.

    `told` is True when process 0 runs and raises the same sentence: then no other process need say it.
    """

    def __init__(self, sentence: str, told: bool = False):
        super().__init__(sentence)
        self.told = told


@dataclass(frozen=True)
class Processes:
    """The processes of one run, as one of them sees it.

    Attributes
    ----------
    rank, size : which of how many this one is, from 0.
    timeout : seconds that one waits for another, at most.
    messages : a gloo group beside the default one, for what is no sum.
    """

    rank: int = 0
    size: int = 1
    timeout: float = 0.0
    messages: dist.ProcessGroup | None = None

    def calibrate(
        self, model, windows, batch: int = 1, attention: bool | str = False, path=None, progress: bool = True
    ) -> Moments:
        """`kvteach.calibration.calibrate` by all processes together; each gets the sum. All must call it alike.

        Parameters
        ----------
        windows : all of them, in every process; each reads its share, which may be none.
        batch : windows per forward pass of one process.
        path : the file of the sum, written by process 0 when all are done. Until then ``PATH.share-S-of-N`` beside it
            keep the shares: a run that was stopped goes on from them, also with another number of processes. A
            finished file is read; one that a single process has begun is finished by process 0 alone.
        progress : process 0 shows a bar, of its own share.

        Raises
        ------
        Failed : in every process that still runs, when one has raised an error, is gone, or does not come within the
            timeout; processes were given different windows, batch or choice of attention, or different models.
        """
        if self.size == 1:
            return calibration.calibrate(model, windows, batch, attention, path, progress)
        path = None if path is None else Path(path).expanduser()
        with self._together():
            ids = calibration.token_ids(windows)
            run = calibration.run(ids, batch)
            shares = self._shares(path) if self.rank == 0 else None
        offers = self._exchange((run | {"attention": attention}, shares))
        if odd := [rank for rank, (asked, _) in enumerate(offers) if asked != offers[0][0]]:
            raise Failed(f"process {odd[0]} was given other windows, batch or attention than process 0", True)
        shares, bar = offers[0][1], progress and self.rank == 0
        files = {}  # of this process: file, or None where none is kept -> the windows that it sums
        if not shares and self.rank == 0:
            files[path] = ids
        for share in range(self.rank, min(shares, len(ids)), self.size):
            file = None if path is None else path.with_name(f"{path.name}.share-{share}-of-{shares}")
            files[file] = ids[share::shares]
        with self._together():
            mine = None
            for file, part in files.items():
                found = calibration.calibrate(model, part, batch, attention, file, bar)
                mine = found if mine is None else mine + found
            if mine is None:
                mine = calibration.empty(model, attention)
        with self._together():
            moments = mine.all_reduce()
            if path is not None and shares and self.rank == 0:
                moments.save(path, done=-(-len(ids) // batch), **run)
        if path is not None and shares:
            for file in files:
                file.unlink(missing_ok=True)
        return moments

    def leave(self) -> None:
        """End the group, before the `with` block does: each process then goes on for itself."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _shares(self, path: Path | None) -> int:
        """Into how many shares the windows are cut: as many as there are processes, or as a stopped run has left.

        0 when the sum of all is there already.
        """
        if path is None:
            return self.size
        for half in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):  # of a run that was killed
            half.unlink(missing_ok=True)
        if path.exists():
            return 0
        named = re.compile(re.escape(path.name) + r"\.share-\d+-of-(\d+)")
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        return max((int(found[1]) for name in names if (found := named.fullmatch(name))), default=self.size)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A step that all processes take; nobody goes on before all have ended it, and an error is everyone's."""
        try:
            yield
        except Failed:
            raise
        except Exception as error:
            self._exchange(error=error)
        self._exchange()

    def _exchange(self, value=None, error: Exception | None = None) -> list:
        """Every process's `value`, once all have come here.

        Process 0 calls the roll, one process after another, so that it can say which is missing; then it tells all.
        A killed process is noticed at once, since its connection breaks, and one that hangs after the timeout.
        """
        said = None if error is None else " ".join(str(error).split()) or type(error).__name__
        everyone, gone = [(value, said)], []
        if self.rank == 0:
            for rank in range(1, self.size):
                try:
                    dist.recv_object_list(heard := [None], src=rank, group=self.messages)
                    everyone += heard
                except RuntimeError:
                    gone.append(rank)
                    everyone.append((None, None))
            for rank in [rank for rank in range(1, self.size) if rank not in gone]:
                with suppress(RuntimeError):  # gone meanwhile: the next roll call says so
                    dist.send_object_list([everyone, gone], dst=rank, group=self.messages)
        else:
            try:
                dist.send_object_list(everyone, dst=0, group=self.messages)
                dist.recv_object_list(heard := [None, None], src=0, group=self.messages)
            except RuntimeError as reason:
                raise Failed(
                    f"process {self.rank} got no answer from process 0, which is gone, or has waited for another one "
                    f"for over {self.timeout:g} s; {AGAIN}"
                ) from (error or reason)
            everyone, gone = heard
        if failed := [(rank, said) for rank, (_, said) in enumerate(everyone) if said]:
            rank, said = failed[0]
            alike = [each for _, each in failed] == [said] * self.size  # no matter whose it is
            raise Failed(said if alike else f"process {rank} failed: {said}", told=True) from error
        if gone:
            raise Failed(
                f"process {', '.join(map(str, gone))} of {self.size} is gone, or has not come to the others within "
                f"{self.timeout:g} s; {AGAIN}",
                told=True,
            )
        return [value for value, _ in everyone]


@contextmanager
def join(timeout: float = 1800.0, device: str | None = None) -> Iterator[Processes]:
    """Within this context the processes that torchrun started are one group; without torchrun, the one there is.

    On a machine with GPUs each process takes the one of its number (``LOCAL_RANK``) as its ``cuda`` device. An error
    that leaves the block is raised in all processes. SIGTERM, by which torchrun ends the others when a process has
    died, becomes `Failed`, so that finished work is saved.

    Parameters
    ----------
    timeout : seconds that one process waits for another: longer than shares of the work may differ.
    device : where the models will be; ``"cpu"`` leaves GPUs alone. By default the GPUs, where there are any.

    Raises
    ------
    Failed : another process failed, is gone, or did not come within the timeout.
    ValueError : more processes than GPUs on this machine, or an environment that torchrun has not made.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Processes()
        return
    if "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {size}, but RANK is not set: start the processes with torchrun")
    rank = int(os.environ["RANK"])
    with _own_device(device) as backend, _stoppable(rank):
        processes = Processes(rank, size, timeout, _start(backend, timeout))
        try:
            yield processes
        except Failed:
            raise
        except Exception as error:
            if not dist.is_initialized():  # after `leave` it is nobody else's
                raise
            processes._exchange(error=error)
        finally:
            processes.leave()


@contextmanager
def command(device: str | None = None) -> Iterator[Processes]:
    """`join` for a command line: process 0 alone speaks, also of what failed in another one."""
    rank = 0
    try:
        with join(device=device) as processes, ExitStack() as silence:
            if rank := processes.rank:
                nowhere = open(os.devnull, "w")  # never closed: a logger may hold it
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            yield processes
    except Failed as failed:
        if failed.told and rank:
            raise SystemExit(1) from failed
        raise


def _start(backend: str, timeout: float) -> dist.ProcessGroup:
    """The default group for sums, and the one for messages."""
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        messages = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        # a first sum: nccl connects when it is used, and that should fail before the work, not after
        dist.all_reduce(torch.zeros(1, device="cuda" if backend == "nccl" else "cpu"))
        return messages
    except RuntimeError as reason:
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        raise Failed(
            f"process {rank}: the {size} processes did not all start within {timeout:g} s, or do not reach one another"
        ) from reason


@contextmanager
def _own_device(device: str | None) -> Iterator[str]:
    """The backend for sums; ``cuda`` means this process's own GPU within."""
    count = 0 if device == "cpu" else torch.cuda.device_count()
    own = int(os.environ.get("LOCAL_RANK", 0))
    if count and own >= count:
        raise ValueError(
            f"process {own} of this machine has no GPU of its own: start torchrun with --nproc-per-node {count}"
        )
    with torch.cuda.device(own) if count else nullcontext():
        yield "nccl" if count else "gloo"


@contextmanager
def _stoppable(rank: int) -> Iterator[None]:
    """SIGTERM as an exception; only the main thread of a process can have it so."""

    def stop(number, frame):
        raise Failed(f"process {rank} was told to stop, as torchrun does when another one has died; {AGAIN}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
