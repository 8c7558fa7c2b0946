"""Shared by the tests of the undo log: state of every format, and updates that were killed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_adam.kernels import adam
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.undo import AREA_NBYTES, UndoLog
from offload_adam.options import StateFormat
from tests.unit.kernel_cases import (
    KEY,
    MODES,
    HostState,
    Segment,
    low_precision_state,
    random_segments,
    random_state,
    rows,
    run_update,
    shard_numel,
)

UInt8Array = npt.NDArray[np.uint8]

LAUNCH = 7
SCALARS = rows((MODES["together"], 7, 0.6), (MODES["decoupled"], 7, 0.6))
NUMELS = (1, 129, 300, 0, 64, 515)
NUM_PIECES = 3
_LONG = 1 << 40
_ONE = int(np.float32(1).view(np.int32))


@dataclass(frozen=True)
class Case:
    """A specialisation of the kernel; the fields are arguments of `adam.compile_kernel`."""

    source: FloatFormat
    param_format: FloatFormat | None
    amsgrad: bool = False
    state_format: StateFormat = "fp32"
    split_master: bool = False

    def compile_kernel(self) -> None:
        """Compile the specialisation that keeps a log."""
        adam.compile_kernel(
            self.source,
            self.param_format,
            self.amsgrad,
            self.state_format,
            self.split_master,
            keeps=True,
        )

    def segments(self, numels: Sequence[int] = NUMELS) -> list[Segment]:
        """Return segments of one parameter, which have two rows of scalars."""
        rng = np.random.default_rng(1)
        segments = random_segments(rng, numels, self.source, num_rows=2)
        return [replace(one, place=(KEY, 0, _LONG, _LONG, one.start, _ONE, 0)) for one in segments]

    def state(self, segments: Sequence[Segment]) -> HostState:
        """Return the state before the update."""
        rng, numel = np.random.default_rng(2), shard_numel(segments)
        if self.state_format == "fp32":
            return random_state(rng, numel, self.param_format, amsgrad=self.amsgrad)
        state = low_precision_state(
            rng, numel, split=self.split_master, param_format=self.param_format
        )
        if self.state_format != "bf16":
            state.exp_avg_sq = rng.integers(0, 256, numel).astype(np.uint8)
            state.exponents = rng.integers(120, 128, (numel // 128, 2)).astype(np.uint8)
            if self.split_master:
                state.remainder = rng.integers(-128, 128, numel).astype(np.int8)
        if self.state_format == "int8":
            state.exp_avg = rng.integers(0, 256, numel).astype(np.uint8)
        return state


CASES = {
    "fp32": Case(FloatFormat.FLOAT32, None),
    "fp32 amsgrad": Case(FloatFormat.FLOAT32, FloatFormat.FLOAT16, amsgrad=True),
    "fp32 bf16": Case(FloatFormat.BFLOAT16, FloatFormat.BFLOAT16),
    "bf16 split": Case(FloatFormat.BFLOAT16, None, False, "bf16", True),
    "bf16": Case(FloatFormat.FLOAT32, FloatFormat.FLOAT16, False, "bf16"),
    "mixed split": Case(FloatFormat.BFLOAT16, None, False, "mixed", True),
    "mixed": Case(FloatFormat.FLOAT32, FloatFormat.FLOAT16, False, "mixed"),
    "int8 split": Case(FloatFormat.BFLOAT16, None, False, "int8", True),
    "int8": Case(FloatFormat.FLOAT32, None, False, "int8"),
}


def new_log(num_pieces: int = NUM_PIECES) -> UndoLog:
    """Return an empty log in private memory."""
    nbytes = UndoLog.nbytes(num_pieces)
    memory = np.zeros(nbytes + 64, dtype=np.uint8)
    first = -memory.ctypes.data % 64
    return UndoLog(memory[first : first + nbytes])


def shared_nbytes(state: HostState, num_pieces: int) -> int:
    """Return the bytes that `shared` needs."""
    nbytes = UndoLog.nbytes(num_pieces)
    for array in vars(state).values():
        if array is not None:
            nbytes += -(-int(array.nbytes) // 64) * 64
    return nbytes


def shared(state: HostState, num_pieces: int, memory: mmap.mmap) -> tuple[HostState, UndoLog]:
    """Return state and log whose arrays are in the memory, without writing to it.

    Args:
        state: has the dtypes and shapes of the arrays.
    """
    everything = np.frombuffer(memory, dtype=np.uint8)
    start = UndoLog.nbytes(num_pieces)
    log, arrays = UndoLog(everything[:start]), {}
    for name, array in vars(state).items():
        if array is not None:
            part = everything[start : start + array.nbytes]
            arrays[name] = part.view(array.dtype).reshape(array.shape)
            start += -(-array.nbytes // 64) * 64
    return HostState(**arrays), log


def area(log: UndoLog, piece: int) -> UInt8Array:
    """Return the bytes of a piece's area."""
    return log.memory[piece * AREA_NBYTES : (piece + 1) * AREA_NBYTES]


def header(log: UndoLog, piece: int) -> npt.NDArray[np.int64]:
    """Return tag, count and resume of a piece's area."""
    return area(log, piece)[:24].view(np.int64)


def state_of(state: HostState) -> tuple[Any, ...]:
    """Return the arrays that `UndoLog.restore` takes, in its order."""
    return (
        state.master,
        state.remainder,
        state.exp_avg,
        state.exp_avg_sq,
        state.max_exp_avg_sq,
        state.exponents,
    )


def updated(before: HostState, segments: Sequence[Segment], case: Case) -> HostState:
    """Return the state after an update without a log."""
    after = before.copied()
    run_update(after, segments, SCALARS, case.source)
    return after


def run(
    state: HostState,
    segments: Sequence[Segment],
    case: Case,
    log: UndoLog,
    *,
    launch: int = LAUNCH,
    num_threads: int = 2,
) -> None:
    """Run the launch, or the rest of it, with a log that has an area for each piece."""
    run_update(
        state,
        segments,
        SCALARS,
        case.source,
        num_pieces=log.memory.size // AREA_NBYTES,
        num_threads=num_threads,
        undo=log.memory,
        launch=launch,
    )


def cuts(segments: Sequence[Segment], num_pieces: int = NUM_PIECES) -> list[int]:
    """Return the positions at which pieces start, and the end of the last one."""
    total = sum(one.gradient.size for one in segments)
    positions = []
    for piece in range(num_pieces):
        position, start = total * piece // num_pieces, 0
        for one in segments:
            if start <= position < start + one.gradient.size:
                position = start + (position - start) // 128 * 128
                break
            start += one.gradient.size
        positions.append(position)
    return [*positions, total]


def between(segments: Sequence[Segment], low: int, high: int) -> list[Segment]:
    """Return positions [low, high) of a table as a table."""
    parts, start = [], 0
    for one in segments:
        first, last = max(low - start, 0), min(high - start, one.gradient.size)
        if first < last:
            key, offset, run, pitch, local, *rest = one.place_in_parameter()
            place = (key, offset, run, pitch, local + first, *rest)
            parts.append(Segment(one.gradient[first:last], one.start + first, one.row, place))
        start += one.gradient.size
    return parts


def planes(state: HostState) -> list[npt.NDArray[Any]]:
    """Return the planes that entries hold, with rows of 128 elements."""
    names = [one.name for one in fields(state) if one.name not in ("param_out", "exponents")]
    arrays = [getattr(state, name) for name in names]
    return [array for array in arrays if array is not None]
