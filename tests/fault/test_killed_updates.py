"""Updates with an undo log that are killed at random moments, several hundred times."""

from __future__ import annotations

import mmap
import os
import time

import numpy as np
import pytest

from offload_adam.kernels import adam_ir
from offload_adam.kernels.undo import COUNT, FINISHED, RESUME, TAG
from tests.unit import undo_child
from tests.unit.kernel_cases import run_update
from tests.unit.undo_cases import (
    CASES,
    SCALARS,
    header,
    run,
    shared,
    shared_nbytes,
    state_of,
)

NUMELS = (500_000, 1, 900_001)
NUM_PIECES = 2
NUM_KILLS = int(os.environ.get("OFFLOAD_ADAM_TEST_KILLS", "60"))
LONGEST_S = 0.03

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not adam_ir.supports_ir() or not hasattr(os, "memfd_create"),
        reason="the plain loop keeps no undo log; memfd is Linux's",
    ),
]


def test_updates_killed_at_random_moments_are_completed() -> None:
    rng = np.random.default_rng(0)
    caught = 0
    for kill in range(NUM_KILLS):
        name = [*CASES][kill % len(CASES)]
        caught += caught_pieces(name, float(rng.uniform(0, LONGEST_S)))
    print(f"{caught} of {NUM_PIECES * NUM_KILLS} pieces were killed in the middle")
    assert caught > NUM_KILLS // 4


def caught_pieces(name: str, delay_s: float) -> int:
    """Kill a process that updates in a loop; return how many pieces were unfinished."""
    case = CASES[name]
    segments = case.segments(NUMELS)
    before = case.state(segments)
    descriptor = os.memfd_create("undo")
    os.truncate(descriptor, shared_nbytes(before, NUM_PIECES))
    state, log = shared(before, NUM_PIECES, mmap.mmap(descriptor, 0))
    for array, old in zip(vars(state).values(), vars(before).values(), strict=True):
        if array is not None:
            array[:] = old
    process = undo_child.start("loop", name, NUM_PIECES, descriptor, NUMELS)
    time.sleep(delay_s)
    process.kill()
    process.wait(timeout=60)
    os.close(descriptor)
    numbers = [header(log, piece).copy() for piece in range(NUM_PIECES)]
    launch = int(max(one[TAG] for one in numbers))
    if launch == 0:
        return 0
    log.restore(launch, *state_of(state))
    run(state, segments, case, log, launch=launch)
    for _ in range(launch):
        run_update(before, segments, SCALARS, case.source)
    assert state.bits() == before.bits(), f"{name}, launch {launch}, {numbers}"
    return sum(one[TAG] == launch and one[RESUME] != FINISHED and one[COUNT] > 0 for one in numbers)
