"""Copies of the files of kept state as a kill would leave them, taken from stopped processes.

A process that is stopped stands between two instructions, like one that is killed. So a copy of its
files is what the next process would find after a kill, and training can continue after the copy.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offload_adam.kept import file as kept_file
from offload_adam.kept.file import KeptFile
from offload_adam.kept.folder import FolderHolder
from offload_adam.kept.holder import NotKeptError
from offload_adam.kernels.undo import AREA_NBYTES, COUNT, TAG
from offload_adam.step.kept_launches import launch_number
from tests.support.kept_training import SAVING

_WAIT_S = 60.0
_UPDATE_S = 0.0004  # about the time of one launch
_SEQUENCE_BITS = 38  # `launch_number` shifts the step's number by so many bits


class Image(NamedTuple):
    """A copy of the files of all ranks.

    decided: number of the step that was decided last on any rank, 0 if none was.
    places: what each rank was doing, "decided on some ranks" if they differ in that, and "save"
        while a checkpoint was being written.
    """

    folder: Path
    decided: int
    places: tuple[str, ...]


def path_of(folder: Path, rank: int) -> Path:
    """Return the path of a rank's file of kept state."""
    return folder / f"rank-{rank:05d}"


def open_file(path: Path) -> KeptFile:
    """Map the file of another process, without its lock."""
    return kept_file._open(FolderHolder(path))[0]


def wait_for_file(path: Path) -> KeptFile:
    """Map the file of a process that has begun to train, as soon as it has decided a step."""
    deadline_s = time.monotonic() + _WAIT_S
    while True:
        try:
            file = open_file(path)
        except NotKeptError:
            pass
        else:
            if file.found().decided:
                return file
            file.close()
        assert time.monotonic() < deadline_s, f"{path} has no decided step"
        time.sleep(0.02)


def place_of(file: KeptFile) -> str:
    """Return what the process of a file was doing."""
    prepared, decided, _ = file.found()
    if file.launch > file.done:
        counts = _areas(file)[:, COUNT][_areas(file)[:, TAG] == file.launch]
        return "update, several threads" if np.count_nonzero(counts) > 1 else "update"
    if prepared > decided:
        return "agreement"
    if file.done >> _SEQUENCE_BITS < decided:
        return "before updates"  # or the step was skipped
    if file.done < launch_number(decided, 0, 0):
        return "between updates"
    return "other"


def _areas(file: KeptFile) -> np.ndarray:
    return file.undo.reshape(-1, AREA_NBYTES)[:, :24].view(np.int64)


@contextmanager
def stopped(pids: Sequence[int], delay_s: float = 0.0) -> Iterator[None]:
    """Stop processes one after the other, and continue them at the end of the context."""
    for index, pid in enumerate(pids):
        if index:
            _spin(delay_s)
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        _wait_until_stopped(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _wait_until_stopped(pid: int) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    for task in Path(f"/proc/{pid}/task").iterdir():
        while (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TX":
            assert time.monotonic() < deadline_s, f"process {pid} does not stop"


def _spin(duration_s: float) -> None:
    end_s = time.perf_counter() + duration_s
    while time.perf_counter() < end_s:
        pass


def spin_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition about another process, without a pause."""
    deadline_s = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the process does not get there"


def wait_for_moment(file: KeptFile, rng: random.Random) -> None:
    """Wait until a process is somewhere in its step; half of the time, in its update."""
    kind = rng.choice(("any", "update", "update", "agreement"))
    if kind == "update":
        launch = file.launch
        spin_until(lambda: file.launch != launch)
        _spin(rng.uniform(0.0, _UPDATE_S))
    elif kind == "agreement":
        spin_until(lambda: file.found().prepared > file.found().decided)
    else:
        time.sleep(rng.uniform(0.0, 0.03))


def progress_of(file: KeptFile) -> tuple[object, ...]:
    """Return what changes when a launch runs."""
    return file.launch, file.done, _areas(file).tobytes()


def wait_for_recovery(
    file: KeptFile, before: tuple[object, ...], has_passed: Callable[[], bool], rng: random.Random
) -> None:
    """Wait until a process completes the update of an image.

    Args:
        before: the progress of the image.
        has_passed: returns whether the recovery is over; it may have had nothing to complete.
    """
    spin_until(lambda: progress_of(file) != before or has_passed())
    _spin(rng.uniform(0.0, _UPDATE_S))


def take_image(source: Path, target: Path, pids: Sequence[int], delay_s: float) -> Image:
    """Stop the processes of all ranks, and copy their files.

    Args:
        pids: of all ranks, in the order in which they are stopped.
        delay_s: seconds between two ranks.
    """
    target.mkdir(parents=True)
    with stopped(pids, delay_s):
        is_saving = (source / SAVING).exists()
        for path in sorted(source.iterdir()):
            if path.suffix != ".lock":
                shutil.copyfile(path, target / path.name)
    files = [open_file(path) for path in sorted(target.iterdir())]
    decided = {file.found().decided for file in files}
    places = tuple(place_of(file) for file in files)
    for file in files:
        file.close()
    if len(decided) > 1:
        places += ("decided on some ranks",)
    if is_saving:
        places += ("save",)
    return Image(target, max(decided), places)
