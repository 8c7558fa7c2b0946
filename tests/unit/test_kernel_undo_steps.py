"""A kill after any instruction of the update: a debugger's single steps show the memory after each.

The state and the log are in memory that this process shares with the updating one. Whenever a step
has changed the memory, the update is completed on a copy of it.
"""

from __future__ import annotations

import mmap
import os

import pytest

from offload_adam.kernels import adam_ir
from offload_adam.kernels.undo import FINISHED, RESUME, TAG, UndoLog
from tests.unit import undo_child
from tests.unit.kernel_cases import HostState
from tests.unit.undo_cases import (
    CASES,
    LAUNCH,
    header,
    new_log,
    run,
    shared,
    shared_nbytes,
    state_of,
    updated,
)

NUM_PIECES = 2
NUMELS = (1, 250, 83)
MOST_STEPS = 3_000_000

pytestmark = pytest.mark.skipif(
    not adam_ir.supports_ir() or not hasattr(os, "memfd_create"),
    reason="the plain loop keeps no undo log; memfd and ptrace are Linux's",
)


def copied(state: HostState, log: UndoLog) -> tuple[HostState, UndoLog]:
    copy = new_log(NUM_PIECES)
    copy.memory[:] = log.memory
    return state.copied(), copy


def is_finished(log: UndoLog) -> bool:
    return all(
        header(log, piece)[TAG] == LAUNCH and header(log, piece)[RESUME] == FINISHED
        for piece in range(NUM_PIECES)
    )


@pytest.mark.parametrize("name", CASES)
def test_a_kill_after_any_instruction_is_repaired(name: str) -> None:
    case = CASES[name]
    segments = case.segments(NUMELS)
    before = case.state(segments)
    expected = updated(before, segments, case).bits()
    descriptor = os.memfd_create("undo")
    os.truncate(descriptor, shared_nbytes(before, NUM_PIECES))
    memory = mmap.mmap(descriptor, 0)
    state, log = shared(before, NUM_PIECES, memory)
    for array, old in zip(vars(state).values(), vars(before).values(), strict=True):
        if array is not None:
            array[:] = old
    seen, states = memory[:], 0
    process = undo_child.start("steps", name, NUM_PIECES, descriptor, NUMELS)
    try:
        for _ in range(MOST_STEPS):
            _, status = os.waitpid(process.pid, 0)
            if not os.WIFSTOPPED(status):
                assert os.WIFEXITED(status)
                if os.WEXITSTATUS(status) == 3:
                    pytest.skip("ptrace is not permitted here")
                raise AssertionError(f"the updating process ended with {status}")
            if memory[:] != seen:
                seen = memory[:]
                states += 1
                again, kept = copied(state, log)
                kept.restore(LAUNCH, *state_of(again))
                run(again, segments, case, kept, num_threads=1)
                assert again.bits() == expected, f"after {states} changes of the memory"
                if is_finished(log):
                    break
            assert undo_child.ptrace(undo_child.PTRACE_SINGLESTEP, process.pid)
        assert is_finished(log)
        assert state.bits() == expected
        assert states > 3 * sum(NUMELS) // 16
    finally:
        process.kill()
        process.wait()
        os.close(descriptor)
