"""Shared by the kernel tests: hyperparameters of every mode, tables of segments, error bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_adam.kernels import adam, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.random_keys import NUM_COLUMNS
from offload_adam.kernels.scalars import Hyperparameters, scalar_row
from tests.support.kernel_reference import Float64Array, ReferenceState, carry

CarriedArray = npt.NDArray[np.generic]
KEY = -0x123456789ABCDEF1
"""Key of the random bits where a test needs only one; its sign bit is set."""

UNIT = 2.0**-24
"""Half an ulp of a float32 relative to the value: the largest error of one rounding."""


def hyperparameters(**changes: Any) -> Hyperparameters:
    """Return plain Adam's hyperparameters with `changes`."""
    plain: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "nesterov": False,
        "maximize": False,
    }
    return Hyperparameters(**{**plain, **changes})


MODES = {
    "adam": hyperparameters(),
    "l2": hyperparameters(weight_decay=0.1),
    "decoupled": hyperparameters(weight_decay=0.1, decoupled_weight_decay=True),
    "nesterov": hyperparameters(nesterov=True),
    "maximize": hyperparameters(maximize=True, weight_decay=0.1),
    "epsilon_hat": hyperparameters(epsilon_hat=True, eps=1e-3),
    "no_momentum": hyperparameters(beta1=0.0, beta2=0.5, lr=0.1),
    "together": hyperparameters(
        nesterov=True,
        maximize=True,
        weight_decay=0.05,
        decoupled_weight_decay=True,
        epsilon_hat=True,
        lr=0.02,
    ),
}


@dataclass
class HostState:
    """The flat arrays that the kernel updates in place, over all parameters of a shard.

    They are float32; or the moments are bfloat16 (uint16) or codes (uint8), and the master may be
    split. With codes there are exponents.
    """

    master: npt.NDArray[Any]
    exp_avg: npt.NDArray[Any]
    exp_avg_sq: npt.NDArray[Any]
    max_exp_avg_sq: npt.NDArray[np.float32] | None = None
    param_out: CarriedArray | None = None
    remainder: npt.NDArray[Any] | None = None
    exponents: npt.NDArray[np.uint8] | None = None

    def copied(self, offset: int = 0) -> HostState:
        """Return a copy whose arrays begin `offset` elements into their buffers."""
        largest, param_out, remainder = self.max_exp_avg_sq, self.param_out, self.remainder
        return HostState(
            displaced(self.master, offset),
            displaced(self.exp_avg, offset),
            displaced(self.exp_avg_sq, offset),
            None if largest is None else displaced(largest, offset),
            None if param_out is None else displaced(param_out, offset),
            None if remainder is None else displaced(remainder, offset),
            None if self.exponents is None else self.exponents.copy(),
        )

    def bits(self) -> bytes:
        """Return every bit of the state."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        return b"".join(array.tobytes() for array in arrays if array is not None)

    def reference(self, start: int, end: int) -> ReferenceState:
        """Return elements [start, end) for the float64 reference."""
        largest = self.max_exp_avg_sq
        return ReferenceState(
            self.master[start:end].astype(np.float64),
            self.exp_avg[start:end].astype(np.float64),
            self.exp_avg_sq[start:end].astype(np.float64),
            None if largest is None else largest[start:end].astype(np.float64),
        )


def displaced(array: npt.NDArray[Any], offset: int) -> npt.NDArray[Any]:
    """Return a copy that lies `offset` elements behind a 64-byte boundary."""
    lanes = 64 // array.itemsize
    buffer = np.empty(array.size + offset + lanes, dtype=array.dtype)
    first = -(buffer.ctypes.data // array.itemsize) % lanes + offset
    view = buffer[first : first + array.size]
    view[:] = array
    return view


def random_state(
    rng: np.random.Generator, numel: int, param_format: FloatFormat | None, *, amsgrad: bool = False
) -> HostState:
    """Return the state of parameters in mid-training; some moments are exactly 0."""
    second = np.square(rng.normal(0, 0.3, numel)) * (rng.random(numel) > 0.1)
    largest = np.square(rng.normal(0, 0.3, numel))
    return HostState(
        rng.normal(0, 1, numel).astype(np.float32),
        (rng.normal(0, 0.3, numel) * (rng.random(numel) > 0.1)).astype(np.float32),
        second.astype(np.float32),
        largest.astype(np.float32) if amsgrad else None,
        None if param_format is None else carry(np.zeros(numel), param_format),
    )


def low_precision_state(
    rng: np.random.Generator, numel: int, *, split: bool, param_format: FloatFormat | None = None
) -> HostState:
    """Return state as `random_state` does, with bfloat16 moments and maybe a split master."""
    state = random_state(rng, numel, param_format)
    state.exp_avg = carry(state.exp_avg, FloatFormat.BFLOAT16)
    state.exp_avg_sq = carry(state.exp_avg_sq, FloatFormat.BFLOAT16)
    if split:
        state.master = carry(state.master, FloatFormat.BFLOAT16)
        state.remainder = rng.integers(-(2**15), 2**15, numel).astype(np.int16)
    return state


@dataclass
class Segment:
    """A run of gradient elements, where it lies in the shard, and its row of scalars.

    place: its row of `places` for low-precision moments, without the columns at its end that are 0.
        By default the whole shard is one parameter.
    """

    gradient: CarriedArray
    start: int
    row: int = 0
    place: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Return the offset behind the last element."""
        return self.start + self.gradient.size

    def place_in_parameter(self) -> tuple[int, ...]:
        """Return `place`, or its default, with all columns."""
        place = self.place or (KEY, 0, 1 << 40, 1 << 40, self.start)
        return place + (0,) * (NUM_COLUMNS - len(place))


def random_segments(
    rng: np.random.Generator,
    numels: Sequence[int],
    gradient_format: FloatFormat,
    *,
    num_rows: int = 1,
    offset: int = 0,
) -> list[Segment]:
    """Return segments at multiples of 128, as the layout places parameters; rows take turns."""
    segments, start = [], 0
    for index, numel in enumerate(numels):
        gradient = displaced(carry(rng.normal(0, 1, numel), gradient_format), offset)
        segments.append(Segment(gradient, start, index % num_rows))
        start += -(-numel // 128) * 128
    return segments


def shard_numel(segments: Sequence[Segment]) -> int:
    """Return a length that holds every segment, padded to whole blocks."""
    return -(-max((segment.end for segment in segments), default=0) // 128) * 128


def run_update(
    state: HostState,
    segments: Sequence[Segment],
    scalars: npt.NDArray[np.float32],
    gradient_format: FloatFormat,
    *,
    num_pieces: int = 2,
    num_threads: int = 2,
    undo: npt.NDArray[np.uint8] | None = None,
    launch: int = 0,
) -> None:
    """Run the kernel over the segments as one table."""
    threads.use_threads(num_threads)
    numels = [segment.gradient.size for segment in segments]
    adam.update(
        gradient_format,
        np.array([segment.gradient.ctypes.data for segment in segments], dtype=np.int64),
        np.array([segment.start for segment in segments], dtype=np.int64),
        np.concatenate(([0], np.cumsum(numels))).astype(np.int64),
        np.array([segment.row for segment in segments], dtype=np.int64),
        scalars,
        state.master,
        state.remainder,
        state.exp_avg,
        state.exp_avg_sq,
        state.max_exp_avg_sq,
        state.param_out,
        state.exponents,
        places_of(state, segments),
        num_pieces,
        undo,
        launch,
    )


def places_of(state: HostState, segments: Sequence[Segment]) -> npt.NDArray[np.int64] | None:
    """Return the segments' `places`, or None for float32 moments."""
    if state.exp_avg.dtype == np.float32:
        return None
    places = [segment.place_in_parameter() for segment in segments]
    return np.array(places, dtype=np.int64).reshape(-1, NUM_COLUMNS)


def rows(*updates: tuple[Hyperparameters, int, float]) -> npt.NDArray[np.float32]:
    """Return the table of scalars for (hyperparameters, step, gradient scale)."""
    return np.stack([scalar_row(*one) for one in updates])


@dataclass(frozen=True)
class Bounds:
    """How far the kernel may be from the reference, absolutely, for each element."""

    master: Float64Array
    exp_avg: Float64Array
    exp_avg_sq: Float64Array


def error_bounds(
    before: ReferenceState,
    after: ReferenceState,
    gradient: Float64Array,
    hyper: Hyperparameters,
    step: int,
    scale: float,
) -> Bounds:
    """Count the roundings on the way to each result, each of at most u = 2**-24 of what it rounds.

    - the scaled gradient: scalar, product with the weight, its scalar, sum: 3u of |s g| + |l2 w|;
    - exp_avg: the gradient's 3, scalar, product, two sums: 7u of its terms' magnitudes;
    - exp_avg_sq: twice the gradient's 3, scalar, product, two sums: 10u likewise;
    - the denominator: half of exp_avg_sq's, and root, scalar, eps, sum: 5u + 4u;
    - the change: direction (7 + scalar, product, sum), denominator, quotient, scalar, product: 22u;
    - the weight: its decay's scalar and sum, and the last rounding.

    First-order terms only, hence one unit more for each.
    """
    l2 = 0.0 if hyper.decoupled_weight_decay else hyper.weight_decay
    decay = hyper.lr * hyper.weight_decay if hyper.decoupled_weight_decay else 0.0
    g = np.abs(scale * gradient) + np.abs(l2 * before.master_weight)
    m = hyper.beta1 * np.abs(before.exp_avg) + (1 - hyper.beta1) * g
    v = hyper.beta2 * before.exp_avg_sq + (1 - hyper.beta2) * g * g
    second = after.exp_avg_sq if after.max_exp_avg_sq is None else after.max_exp_avg_sq
    # Where decay and gradient cancel, the gradient's error is large beside what is left of it.
    cancelled = np.divide(v, second, out=np.ones_like(v), where=second > 0)
    direction = hyper.beta1 * m + (1 - hyper.beta1) * g if hyper.nesterov else m
    correction2 = np.sqrt(1 - hyper.beta2**step)
    root = np.sqrt(second) if hyper.epsilon_hat else np.sqrt(second) / correction2
    step_size = hyper.lr * (correction2 if hyper.epsilon_hat else 1) / (1 - hyper.beta1**step)
    change = step_size * direction / (root + hyper.eps)
    weight = np.abs(after.master_weight) + 3 * np.abs(decay * before.master_weight)
    smallest = 2.0**-149
    return Bounds(
        UNIT * (weight + (18 + 6 * cancelled) * change) + smallest,
        UNIT * 8 * m + smallest,
        UNIT * 11 * v + smallest,
    )
