"""Ranks that are killed with SIGKILL and started again: the job ends with the same bits."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from offload_adam.errors import KeptInUseError
from offload_adam.kept.file import KeptFile
from offload_adam.kept.holder import NotKeptError
from tests.support.kept_images import open_file, path_of, place_of, spin_until, wait_for_moment
from tests.support.kept_jobs import Job, Resumed
from tests.support.kept_training import Case, Training, differences, references
from tests.support.ranks import RankPool

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

CASE = Case("fp32, 2 ranks", num_ranks=2)
ONE_RANK = Case("fp32")
ATTACH_S = 0.15
"""About the time from the first line of a rank to its first step."""


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder in memory."""
    with TemporaryDirectory(dir="/dev/shm", prefix="kept-kills-") as folder:
        yield Path(folder)


def last_decided(folder: Path) -> tuple[int, set[str]]:
    """Return the step that was decided last, 0 if none was, and what the ranks were doing."""
    decided, places = [0], set()
    for rank in range(CASE.num_ranks):
        try:
            with closing(open_file(path_of(folder, rank))) as file:
                decided.append(file.found().decided)
                places.add(place_of(file))
        except NotKeptError:  # the kill came before it was created
            places.add("creation")
    return max(decided), places


def at_step(file: KeptFile, step: int) -> Callable[[], bool]:
    """Return a function that says whether a step was decided."""
    return lambda: file.found().decided >= step


def kill_somewhere(job: Job, folder: Path, victims: list[int], rng: random.Random) -> list[Resumed]:
    """Kill some ranks at a random moment, and return what each rank had resumed, if it had."""
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0.0, ATTACH_S))
        job.kill(victims)
        return []
    started = job.receive()
    with closing(open_file(path_of(folder, victims[0]))) as file:
        spin_until(at_step(file, started[0].step + rng.randrange(6)))
        wait_for_moment(file, rng)
    job.kill(victims)
    return started


def run_with_kills(
    ranks: RankPool, folder: Path, kills: Sequence[list[int]], seed: int
) -> Counter[str]:
    """Train, and kill and restart the job; compare each start and the end with the reference.

    Args:
        kills: the ranks that are killed each time. The others must end by themselves.

    Returns:
        How many kills caught what.
    """
    rng = random.Random(seed)
    kept = folder / "kept"
    caught: Counter[str] = Counter()
    starts: list[list[Resumed]] = []
    decided = 0
    with ExitStack() as jobs:
        job = Job(CASE, kept)
        for number, victims in enumerate(kills):
            jobs.callback(job.close)
            job.begin(folder / f"store-{number}", 10**6)
            following = Job(CASE, kept)  # imports meanwhile
            started = kill_somewhere(job, kept, victims, rng)
            assert all(one.step == decided for one in started)
            before, (decided, places) = decided, last_decided(kept)
            assert decided >= before, "decided steps were lost"
            caught.update(places if started else ["attaching"])
            starts.append(started)
            job = following
        jobs.callback(job.close)
        job.begin(folder / "store", 5)
        starts += job.receive(), job.receive()
    assert [one.step for one in starts[-2] + starts[-1]] == [decided] * 2 + [decided + 5] * 2
    expected = ranks.run(references, CASE.num_ranks, CASE, decided + 5)
    for started in starts:
        for rank, found in enumerate(started):
            assert not list(differences(found.digests, expected[rank][found.step]))
    print(dict(caught), decided)
    return caught


def test_kills(ranks: RankPool, shared: Path) -> None:
    run_with_kills(ranks, shared, ([0, 1], [1], [0, 1], [0, 1]), 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_kills(ranks: RankPool, shared: Path) -> None:
    caught = run_with_kills(ranks, shared, ([0], [1], [0, 1], [0, 1]) * 10, 1)
    assert caught["attaching"] > 3, caught
    assert sum(n for place, n in caught.items() if place.startswith("update")) > 3, caught


def test_another_job_waits_for_the_state(ranks: RankPool, shared: Path) -> None:
    """It gets an error while the first runs, and resumes once the first has been killed."""
    with closing(Job(ONE_RANK, shared / "kept")) as job:
        job.begin(shared / "store", 10**6)
        job.receive()
        with pytest.raises(KeptInUseError) as caught:
            Training(ONE_RANK, shared / "kept", attach_timeout=0.3)
        pid = job.processes[0].pid
        assert f"process {pid} on {socket.gethostname()}" in str(caught.value)
        killer = threading.Timer(0.5, job.kill, [[0]])
        killer.start()
        training = Training(ONE_RANK, shared / "kept", attach_timeout=30.0)
        killer.join()
    found = training.digests()
    training.optimizer.close()
    (expected,) = ranks.run(references, 1, ONE_RANK, training.step)
    assert not list(differences(found, expected[training.step]))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("state_nbytes", [2**28, 2**29, 2**30])
def test_time_to_resume(state_nbytes: int, shared: Path) -> None:
    """Resuming does not copy the state, so it takes less time than a start without it."""
    case = ONE_RANK._replace(width=round((state_nbytes / 16 / 2.08) ** 0.5))
    fresh_s = Training(case, shared / "fresh").construction_s
    with closing(Job(case, shared / "kept")) as job:
        job.begin(shared / "store", 10**6)
        job.receive()
        with closing(open_file(path_of(shared / "kept", 0))) as file:
            spin_until(at_step(file, 2))
            spin_until(lambda: file.launch > file.done)
            job.kill([0])
            print(place_of(file))
    training = Training(case, shared / "kept")
    nbytes = path_of(shared / "kept", 0).stat().st_size
    print(f"{nbytes:,} bytes: {fresh_s:.3f} s new, {training.construction_s:.3f} s resumed")
    assert training.step >= 2
    training.optimizer.close()
