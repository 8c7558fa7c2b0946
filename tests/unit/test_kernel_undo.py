"""A killed update is completed to the bits of an undisturbed one, wherever it was killed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from offload_adam.kernels import adam_ir
from offload_adam.kernels.undo import (
    AREA_NBYTES,
    BLOCKS,
    COUNT,
    FINISHED,
    HEADER_NBYTES,
    MAX_PIECES,
    NOT_RESUMED,
    RESUME,
    TAG,
    VECTORS,
    Ring,
    UndoLog,
)
from tests.unit.kernel_cases import HostState, Segment, run_update
from tests.unit.undo_cases import (
    CASES,
    LAUNCH,
    NUM_PIECES,
    SCALARS,
    Case,
    area,
    between,
    cuts,
    header,
    new_log,
    planes,
    run,
    state_of,
    updated,
)

pytestmark = pytest.mark.skipif(
    not adam_ir.supports_ir(), reason="the plain loop keeps no undo log"
)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def ring_of(case: Case) -> Ring:
    return VECTORS if case.state_format == "fp32" else BLOCKS


def entries_of(log: UndoLog, piece: int, ring: Ring) -> list[tuple[int, int]]:
    """Return offset and number of elements of the entries that may be overwritten in part."""
    count = int(header(log, piece)[COUNT])
    entries = []
    for number in range(max(0, count - ring.depth), count):
        start = HEADER_NBYTES + number % ring.slots * ring.entry_nbytes
        offset, numel = area(log, piece)[start : start + 16].view(np.int64).tolist()
        entries.append((offset, numel))
    return entries


def kill_at(
    state: HostState,
    before: HostState,
    segments: Sequence[Segment],
    case: Case,
    log: UndoLog,
    piece: int,
    stop: int,
    rng: np.random.Generator,
) -> None:
    """Change state and log as a piece does that is killed at a position.

    Elements of the last entries have old values, new ones, or those of no run at all.
    """
    resume = header(log, piece)[RESUME] if header(log, piece)[TAG] == LAUNCH else NOT_RESUMED
    part = between(segments, cuts(segments)[piece], stop)
    run(state, part, case, UndoLog(area(log, piece)))
    header(log, piece)[RESUME] = resume
    for offset, numel in entries_of(log, piece, ring_of(case)):
        elements = slice(offset, offset + numel)
        for after, old in zip(planes(state), planes(before), strict=True):
            choice = rng.integers(3, size=numel)
            after[elements] = np.where(choice == 0, old[elements], after[elements])
            after[elements] = np.where(choice == 1, 0x5A, after[elements])
        if state.exponents is not None:
            state.exponents[offset // 128] = rng.integers(256, size=2)


def stops_of(segments: Sequence[Segment], number: int, rng: np.random.Generator) -> list[int]:
    """Return a position in each piece at which it is killed."""
    edges = cuts(segments)
    if number == 0:
        return edges[1:]
    return [int(rng.integers(low, high + 1)) for low, high in itertools.pairwise(edges)]


@each_case
def test_a_log_changes_no_bit(case: Case) -> None:
    segments = case.segments()
    before = case.state(segments)
    expected = updated(before, segments, case)
    assert expected.bits() != before.bits()
    for num_pieces in (1, 2, NUM_PIECES):
        log, after = new_log(num_pieces), before.copied()
        run(after, segments, case, log)
        assert after.bits() == expected.bits()
        for piece in range(num_pieces):
            assert header(log, piece)[TAG] == LAUNCH
            assert header(log, piece)[RESUME] == FINISHED
        # A finished launch does nothing when it runs again, and there is nothing to restore.
        log.restore(LAUNCH, *state_of(after))
        run(after, segments, case, log)
        assert after.bits() == expected.bits()


@each_case
def test_a_killed_update_is_completed(case: Case) -> None:
    segments = case.segments()
    before = case.state(segments)
    expected = updated(before, segments, case).bits()
    rng = np.random.default_rng(0)
    for number in range(60):
        state, log = before.copied(), new_log()
        for piece, stop in enumerate(stops_of(segments, number, rng)):
            if number % 4 != 3 or piece != 1:  # else this piece has not begun
                kill_at(state, before, segments, case, log, piece, stop, rng)
        log.restore(LAUNCH, *state_of(state))
        run(state, segments, case, log)
        assert state.bits() == expected


@each_case
def test_a_second_kill_is_repaired_like_the_first(case: Case) -> None:
    segments = case.segments()
    before = case.state(segments)
    expected = updated(before, segments, case).bits()
    rng = np.random.default_rng(1)
    for number in range(30):
        state, log = before.copied(), new_log()
        for _ in range(3):
            for piece, end in enumerate(cuts(segments)[1:]):
                done = int(header(log, piece)[RESUME]) if header(log, piece)[TAG] else 0
                first = max(cuts(segments)[piece], position_of(segments, done))
                stop = int(rng.integers(first, end + 1))
                kill_at(state, before, segments, case, log, piece, stop, rng)
            killed = log.memory.copy()
            log.restore(LAUNCH, *state_of(state))
            # The kill may come before `restore` has written its last numbers.
            for piece in range(NUM_PIECES):
                numbers = killed[piece * AREA_NBYTES :][:24].view(np.int64)
                written = (slice(0, 0), slice(COUNT, COUNT + 1), slice(COUNT, RESUME + 1))
                header(log, piece)[written[number % 3]] = numbers[written[number % 3]]
            log.restore(LAUNCH, *state_of(state))
        run(state, segments, case, log)
        assert state.bits() == expected


def position_of(segments: Sequence[Segment], offset: int) -> int:
    """Return the position of a flat offset; 0 for a negative one."""
    position = 0
    for one in segments:
        if one.start <= offset < one.end:
            return position + offset - one.start
        position += one.gradient.size
    return 0


@each_case
def test_without_restoring_the_result_would_be_wrong(case: Case) -> None:
    segments = case.segments((700,))
    before = case.state(segments)
    expected = updated(before, segments, case).bits()
    for stop in (128, 300, 700):
        state, log = before.copied(), new_log(1)
        part = between(segments, 0, stop)
        run(state, part, case, log)
        offset, numel = entries_of(log, 0, ring_of(case))[-1]
        for after, old in zip(planes(state), planes(before), strict=True):
            after[offset : offset + numel] = old[offset : offset + numel]
        header(log, 0)[RESUME] = offset + numel if offset + numel < 700 else FINISHED
        run(state, segments, case, log)
        assert state.bits() != expected


def killed_once(case: Case) -> tuple[HostState, UndoLog]:
    """Return state and log of an update that was killed in its only piece."""
    segments = case.segments((700,))
    before = case.state(segments)
    state, log = before.copied(), new_log(1)
    part = between(segments, 0, 304)
    run(state, part, case, log)
    header(log, 0)[RESUME] = NOT_RESUMED
    return state, log


@each_case
def test_another_launch_is_not_restored(case: Case) -> None:
    state, log = killed_once(case)
    bits, memory = state.bits(), log.memory.copy()
    log.restore(LAUNCH + 1, *state_of(state))
    assert state.bits() == bits
    np.testing.assert_array_equal(log.memory, memory)


@pytest.mark.parametrize("case", [CASES["fp32"], CASES["bf16 split"], CASES["int8 split"]])
def test_a_damaged_log_raises_and_changes_nothing(case: Case) -> None:
    state, log = killed_once(case)
    ring = ring_of(case)
    last = int(header(log, 0)[COUNT] - 1) % ring.slots
    entry = HEADER_NBYTES + last * ring.entry_nbytes
    damages = [(8, -1), (16, -3), (16, 1 << 40), (16, 700)]
    damages += [(entry, -1), (entry, 1 << 62), (entry, 761), (entry + 8, 0), (entry + 8, -5)]
    damages += [(entry + 8, 1 << 62), (entry + 8, ring.numel + 1), (entry + 16, -1)]
    damages += [(entry + 16, ring.numel), (entry + 16, 1 << 62)]
    if state.exponents is not None:
        damages.append((entry, 255))
    bits, sound = state.bits(), log.memory.copy()
    for at, value in damages:
        log.memory[:] = sound
        log.memory[at : at + 8].view(np.int64)[:] = value
        with pytest.raises(ValueError, match=f"launch {LAUNCH} is damaged at piece 0"):
            log.restore(LAUNCH, *state_of(state))
        assert state.bits() == bits
    log.memory[:] = sound
    log.restore(LAUNCH, *state_of(state))
    assert header(log, 0)[COUNT] == 0


def test_the_memory_of_a_log_is_checked() -> None:
    assert UndoLog.nbytes(2) == 2 * AREA_NBYTES
    for num_pieces in (0, -1, MAX_PIECES + 1):
        with pytest.raises(ValueError, match="num_pieces"):
            UndoLog.nbytes(num_pieces)
    memory = new_log().memory
    for wrong in (memory[64:], memory[1 : 1 + AREA_NBYTES], memory.view(np.int8), memory[::2]):
        with pytest.raises(ValueError, match="undo log"):
            UndoLog(wrong)


def test_a_log_with_too_few_areas_is_rejected() -> None:
    case = CASES["fp32"]
    segments = case.segments()
    state = case.state(segments)
    with pytest.raises(ValueError, match="3 pieces need 12288"):
        run_update(
            state, segments, SCALARS, case.source, num_pieces=3, undo=new_log(2).memory, launch=1
        )


def test_a_machine_without_the_ir_kernel_rejects_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    case = CASES["fp32"]
    segments = case.segments()
    with pytest.raises(ValueError, match="Pass undo=None"):
        run(case.state(segments), segments, case, new_log())
