"""Kept state as kills leave it at any moment of a step: the next process resumes to the same bits.

The moments are those at which running processes were stopped; see `tests.support.kept_images`.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.support.kept_images import (
    Image,
    open_file,
    path_of,
    place_of,
    progress_of,
    take_image,
    wait_for_file,
    wait_for_moment,
    wait_for_recovery,
)
from tests.support.kept_training import (
    Case,
    Digests,
    differences,
    pid_of,
    recover,
    references,
    train_until,
)
from tests.support.ranks import RankPool

pytestmark = [pytest.mark.fault, pytest.mark.distributed, pytest.mark.timeout(200)]

CASES = (
    Case("fp32"),
    Case("fp32 drop-in, amsgrad", amsgrad=True, streams=False),
    Case("bf16 with fp32 masters", torch.bfloat16, num_ranks=2),
    Case("bf16 state, device", torch.bfloat16, "bf16", simulated=True),
    Case("mixed", torch.bfloat16, "mixed", num_ranks=2),
    Case("int8, saves", torch.bfloat16, "int8", saves=True),
)
MORE_CASES = (
    Case("fp32, 2 ranks", num_ranks=2, width=900),
    Case("fp32, device", simulated=True, width=900),
    Case("fp32 drop-in, 2 ranks", streams=False, num_ranks=2),
    Case("bf16 with fp32 masters, device", torch.bfloat16, simulated=True),
    Case("bf16 state", torch.bfloat16, "bf16", width=900),
    Case("mixed, device", torch.bfloat16, "mixed", simulated=True),
    Case("int8, fp32 parameters", torch.float32, "int8", num_ranks=2),
    Case("fp32, saves", saves=True, width=900),
    Case("bf16 state, device, saves", torch.bfloat16, "bf16", simulated=True, saves=True),
)
UNFINISHED = {"update", "update, several threads", "between updates"}
NUM_FURTHER = 2
"""Steps after each recovery."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Return ranks whose kernels may use two threads each."""
    with RankPool() as pool:
        yield pool


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder in memory."""
    with TemporaryDirectory(dir="/dev/shm", prefix="kept-images-") as folder:
        yield Path(folder)


_TIMEOUT_S = 180.0
THREADS = {"NUMBA_NUM_THREADS": "2"}


def images_of(
    pool: RankPool, case: Case, folder: Path, num_images: int, rng: random.Random
) -> list[Image]:
    """Train, and take images of the kept state at random moments."""
    kept, end = folder / "kept", folder / "end"
    pids = pool.run(pid_of, case.num_ranks)
    with in_background(pool, train_until, case, kept, end) as running:
        try:
            files = [wait_for_file(path_of(kept, rank)) for rank in range(case.num_ranks)]
            images = []
            for number in range(num_images):
                order = rng.sample(range(case.num_ranks), case.num_ranks)
                wait_for_moment(files[order[0]], rng)
                in_order = [pids[rank] for rank in order]
                images.append(take_image(kept, folder / f"{number:03d}", in_order, pause_of(rng)))
        finally:
            end.touch()
            running.result()
    for file in files:
        file.close()
    shutil.rmtree(kept)
    return images


def images_of_recoveries(
    pool: RankPool, case: Case, images: Sequence[Image], folder: Path, rng: random.Random
) -> list[Image]:
    """Recover from images whose updates are not complete, and take an image of each recovery."""
    copies = [folder / f"{number:03d} again" for number in range(len(images))]
    for image, copy in zip(images, copies, strict=True):
        shutil.copytree(image.folder, copy)
    again = []
    pids = pool.run(pid_of, case.num_ranks)
    files = [[open_file(path) for path in sorted(copy.iterdir())] for copy in copies]
    watched = [next(f for f in of_one if place_of(f) in UNFINISHED) for of_one in files]
    before = [progress_of(file) for file in watched]
    locks = [copy / "rank-00000.lock" for copy in copies]  # created when a recovery begins
    with in_background(pool, recover, case, copies, 0) as running:
        for number, copy in enumerate(copies):

            def has_passed(later: Sequence[Path] = locks[number + 1 :]) -> bool:
                return running.done() or any(lock.exists() for lock in later)

            wait_for_recovery(watched[number], before[number], has_passed, rng)
            target = copy.with_suffix(".image")
            again.append(take_image(copy, target, rng.sample(pids, len(pids)), pause_of(rng)))
        running.result()
    for of_one in files:
        for file in of_one:
            file.close()
    for copy in copies:
        shutil.rmtree(copy)
    return again


@contextmanager
def in_background(
    pool: RankPool, function: Callable[..., Any], case: Case, *args: Any
) -> Iterator[Future[list[Any]]]:
    """Run a function on the ranks of a case while the context runs."""
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(
            pool.run, function, case.num_ranks, case, *args, env=THREADS, timeout=_TIMEOUT_S
        )


def pause_of(rng: random.Random) -> float:
    """Return seconds between the ranks' ends."""
    return rng.choice((0.0, 0.0005, 0.005))


def check(
    pool: RankPool, case: Case, images: Sequence[Image], expected: Sequence[Sequence[Digests]]
) -> None:
    """Recover from images, and compare with the reference.

    Args:
        expected: for each rank, the digests after each step from 0 on.
    """
    folders = [image.folder for image in images]
    of_ranks = pool.run(
        recover, case.num_ranks, case, folders, NUM_FURTHER, env=THREADS, timeout=_TIMEOUT_S
    )
    for rank, recovered in enumerate(of_ranks):
        for image, (step, found) in zip(images, recovered, strict=True):
            what = f"{case.name}, rank {rank}, step {image.decided}, {image.places}"
            assert step == image.decided, what
            for further, digests in enumerate(found):
                wrong = list(differences(digests, expected[rank][step + further]))
                assert not wrong, f"{what}, {further} steps later: {wrong}"
    for one in folders:
        shutil.rmtree(one)


def run_case(pool: RankPool, case: Case, folder: Path, num_images: int, seed: int) -> Counter[str]:
    """Take images, recover from each, and return how many caught what."""
    rng = random.Random(seed)
    images = images_of(pool, case, folder, num_images, rng)
    unfinished = [image for image in images if UNFINISHED & set(image.places)]
    again = images_of_recoveries(pool, case, unfinished, folder, rng)
    num_steps = max(image.decided for image in images) + NUM_FURTHER
    expected = pool.run(
        references, case.num_ranks, case, num_steps, env=THREADS, timeout=_TIMEOUT_S
    )
    check(pool, case, images + again, expected)
    caught = Counter(place for image in images for place in set(image.places))
    caught["recovery"] = sum(
        image.decided == before.decided and bool(UNFINISHED & set(image.places))
        for image, before in zip(again, unfinished, strict=True)
    )
    caught["images"] = len(images) + len(again)
    return caught


def run_cases(pool: RankPool, cases: Sequence[Case], folder: Path, num_images: int) -> Counter[str]:
    """Run several cases, and return how many images caught what."""
    caught: Counter[str] = Counter()
    for number, case in enumerate(cases):
        caught += run_case(pool, case, folder / str(number), num_images, number)
    print(caught)
    return caught


def test_images_resume_to_the_same_bits(pool: RankPool, shared: Path) -> None:
    caught = run_cases(pool, CASES, shared, 10)
    assert caught["update"] + caught["update, several threads"] > 2, caught
    assert all(caught[place] for place in ("between updates", "agreement", "recovery", "save")), (
        caught
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_images_resume_to_the_same_bits(pool: RankPool, shared: Path) -> None:
    caught = run_cases(pool, CASES + MORE_CASES, shared, 80)
    assert caught["images"] > 1000, caught
    for place in (
        "update",
        "update, several threads",
        "between updates",
        "before updates",
        "agreement",
        "decided on some ranks",
        "recovery",
        "save",
    ):
        assert caught[place] > 10, caught
