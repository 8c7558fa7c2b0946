"""Norm and update of one bucket with state in host memory, by the Numba kernels.

fold              before the agreement: cast or add gradients into the gradient shard
sum_of_squares    before the agreement: one launch per gradient dtype
prepare           after the agreement: the launches of the update, with all of their arguments: one
                  per gradient dtype; then one for each parameter that needs its whole gradient (see
                  `gradients.whole`). A large bucket that is copied to a device has several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.segments import BucketGradients, SegmentTable
from offload_adam.gradients.sparse import GradientRows
from offload_adam.gradients.whole import (
    needs_preparation,
    prepare_gradient,
)
from offload_adam.kept.file import KeptFile
from offload_adam.kernels import threads
from offload_adam.kernels.codes import MOST_LOST_OCTAVES, SQ_MAX_EXPONENT, SQ_MIN_EXPONENT
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.random_keys import KEY, LOCAL_START, SCALE, SHIFT, segment_keys
from offload_adam.kernels.scalars import Hyperparameters, scalar_row
from offload_adam.layout.budget import Category
from offload_adam.layout.flat import Segment, align
from offload_adam.layout.state_plan import FLOAT32_NBYTES
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import FORMATS, bits_of
from offload_adam.step.kept_launches import (
    KeptLaunches,
    launch_number,
    reject_unkept,
)
from offload_adam.step.messages import Launches, UpdateInputs, UpdatePart, count_step

# Numba's workqueue layer aborts the process if two threads launch kernels at once, as the threads
# of two optimizers would.
_launching = threading.Lock()

MIN_PIECE_NUMEL = 32 * 1024
"""Fewest elements per thread: waking a thread for fewer costs more time than it saves. The result
has the same bits for every number of threads."""


class HostUpdate:
    """Runs the Numba kernels over one bucket at a time, on this rank's threads.

    Owns: two buffers that all buckets share: for the block sums of the largest bucket, and for the
        largest gradient that is prepared whole.
    Lifecycle: `add_buckets` compiles kernels and allocates memory when buckets are added. In each
        step, before anything is modified, `allocate_for` does so for sparse gradients.
    Threads: `_launching` lets one thread at a time launch kernels.
    """

    def __init__(self, num_threads: int | None, *, on_device: bool = False) -> None:
        # Numba's OpenMP pool changes torch's number of threads when it starts: restore it below.
        num_torch_threads = torch.get_num_threads()
        self._num_threads = threads.plan_threads(num_threads, on_device=on_device)
        threads.use_threads(self._num_threads)
        torch.set_num_threads(num_torch_threads)
        # Numba takes longer to import than the rest of the package. So `import offload_adam` does
        # not import it, the first optimizer does.
        from offload_adam.kernels import adam, first_touch, fold, norm, sparse

        self._adam, self._first_touch, self._norm, self._sparse = adam, first_touch, norm, sparse
        self._fold = fold
        self._folds: set[tuple[torch.dtype, torch.dtype]] = set()
        self._block_sums = np.zeros(0, dtype=np.float64)
        self._whole_gradient = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._kept: KeptLaunches | None = None

    def keep(self, file: KeptFile) -> None:
        """Record in a file how far each update has come, from now on."""
        self._kept = KeptLaunches(file)

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Host bytes by category."""
        return {
            Category.BLOCK_SUMS: self._block_sums.nbytes,
            Category.PREPARED: self._whole_gradient.nbytes,
        }

    def touch(self, memory: torch.Tensor) -> None:
        """Write to every page of (n,) uint8 from the thread that will update its float32 elements.

        Linux places a page in the memory of the NUMA node whose thread writes to it first.
        """
        with _launching:
            num_pieces = self._use_threads(memory.numel() // FLOAT32_NBYTES)
            self._first_touch.touch(memory.numpy(), num_pieces)

    def add_buckets(self, states: Iterable[BucketState]) -> None:
        """Compile the kernels that these buckets launch, and allocate their buffers."""
        for state in states:
            shard = state.planes.gradient_shard
            gradient_format = FORMATS[state.dtype if shard is None else shard.dtype]
            self._norm.compile_kernel(gradient_format)
            if shard is not None and not (state.plan.is_offloaded or state.plan.packs):
                self._norm.compile_kernel(gradient_format, copies=True)
            self._compile_update(state, gradient_format)
            # Gradients that the device copies straight into the shard are not folded.
            if shard is not None and state.plan.is_offloaded and not state.plan.copies_directly:
                self._compile_fold(shard.dtype, state.gradient_dtype)
            if state.plan.stages_parameters and state.dtype == torch.float32:
                self._compile_fold(torch.float32, torch.float32)
            self._allocate_whole(state, state.centralized)
            if state.layout.num_sums > self._block_sums.size:
                self._block_sums = np.zeros(state.layout.num_sums, dtype=np.float64)

    def compile_for_accumulator(self, state: BucketState) -> None:
        """Compile the kernels that write and read this bucket's accumulator, which is float32."""
        self._norm.compile_kernel(FloatFormat.FLOAT32)
        self._compile_update(state, FloatFormat.FLOAT32)
        if state.plan.is_offloaded:  # torch adds gradients that are already in host memory
            self._compile_fold(torch.float32, state.gradient_dtype)

    def allocate_for(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        """Compile kernels and allocate memory for this step's sparse gradients."""
        if self._kept is not None:
            reject_unkept(state, gradients)
        if gradients.rows and lazy:
            if state.scales is not None:
                names = [state.names[position] for position in gradients.rows]
                raise ValueError(
                    f"Parameter {names[0]!r} has a sparse gradient and "
                    f"state_format={state.state_format!r}, but with use_lazy=True single rows of "
                    "8-bit codes cannot be updated. Give its group state_format='bf16' or 'fp32', "
                    "or pass use_lazy=False."
                )
            self._sparse.compile_kernel(
                FloatFormat.FLOAT32, _param_format(state), **_kernel_formats(state)
            )
        elif gradients.rows:
            self._allocate_whole(state, needs_preparation(state, gradients))

    def _allocate_whole(self, state: BucketState, prepared: npt.NDArray[np.bool_]) -> None:
        """Compile and allocate for parameters whose gradients are prepared whole.

        Args:
            prepared: (n,) bool, by position in the bucket.
        """
        numels = state.segments.numels[prepared[state.segments.positions]]
        largest = int(numels.max(initial=0))
        if largest > 0:
            self._compile_update(state, FloatFormat.FLOAT32)
        if largest > self._whole_gradient.numel():
            self._whole_gradient = torch.zeros(largest, dtype=torch.float32, device="cpu")

    def _compile_fold(self, target: torch.dtype, source: torch.dtype) -> None:
        if (target, source) not in self._folds:
            self._fold.compile_kernel(FORMATS[target], FORMATS[source])
            self._folds.add((target, source))

    def _compile_update(self, state: BucketState, gradient_format: FloatFormat) -> None:
        amsgrad = state.planes.max_exp_avg_sq is not None
        self._adam.compile_kernel(
            gradient_format,
            _param_format(state),
            amsgrad,
            **_kernel_formats(state),
            keeps=self._kept is not None,
        )

    def fold(self, shard: torch.Tensor, source: torch.Tensor, *, adds: bool) -> None:
        """Copy gradients to a part of a gradient shard, or add them, with the same bits as torch.

        Args:
            shard: (n,) contiguous, on the host.
            source: (n,) contiguous, on the host, in any dtype.
            adds: add to `shard` instead of overwriting it.
        """
        # Gradients that the user set may have another dtype than any bucket. torch handles them:
        # compiling a kernel for them would stop the step for seconds.
        if (shard.dtype, source.dtype) not in self._folds:
            shard.add_(source) if adds else shard.copy_(source)
            return
        with _launching:
            num_pieces = self._use_threads(shard.numel())
            self._fold.fold(bits_of(shard), bits_of(source), num_pieces, adds=adds)

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of this shard's gradients, non-finite if one is.

        The same pass copies them to `gradients.target`, if there is one.
        """
        target = gradients.target
        squares = float(np.sum(self._sum_blocks(state, gradients, target)))
        if target is not None:
            gradients.move_to(target)
        return squares

    def squares_by_position(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return the float64 sum of squares of each parameter's gradient in this shard."""
        sums = self._sum_blocks(state, gradients)
        squares = np.zeros(len(state.parameters))
        if state.segments.numels.size > 0:
            np.add.at(squares, _positions_of(state, np.arange(sums.size)), sums)
        return squares

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        """Return the positions of the bucket's parameters with a non-finite gradient."""
        found = np.flatnonzero(~np.isfinite(self._sum_blocks(state, gradients)))
        return np.unique(_positions_of(state, found))

    def _sum_blocks(
        self, state: BucketState, gradients: BucketGradients, target: torch.Tensor | None = None
    ) -> npt.NDArray[np.float64]:
        """Return the sum of squares of each block of each segment, 0 for those without gradient.

        The result is valid until the next call, which overwrites it.

        Args:
            target: (shard_numel,) receives a copy of the gradients; None for no copy.
        """
        sums = self._block_sums[: state.layout.num_sums]
        sums.fill(0.0)
        for table in gradients.tables(state, gradients.readable):
            with _launching:
                self._norm.block_sums(
                    table.gradient_format,
                    table.addresses,
                    table.sum_starts,
                    table.numels,
                    sums,
                    self._use_threads(int(table.numels.sum())),
                    None
                    if target is None
                    else target.data_ptr() + table.starts * target.element_size(),
                )
        return sums

    def prepare(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        inputs: UpdateInputs,
        param_out: torch.Tensor | None,
    ) -> Launches:
        """Return the update of the shard's segments of `active` parameters, without running it.

        Args:
            active: (n,) bool, by position in the bucket.
            param_out: (shard_numel,) receives the 16-bit parameters; None for fp32 parameters.
        """
        counts = inputs.counts_after(state, active)
        prepared = active & needs_preparation(state, gradients)
        plain = active & ~prepared
        rows, scalars = inputs.scalar_rows(state, counts, plain)
        places, scales = _places_at(state, counts, active, inputs.hyperparameters)

        def launch_of(table: SegmentTable, part: int = 0) -> Callable[[], None]:
            number = launch_number(inputs.sequence, state.layout.index, part)
            used = rows[table.positions]
            return self._launch_of(state, table, used, scalars, places, param_out, number)

        def update_prepared(segment: Segment) -> None:
            step = int(counts[segment.position])
            self._update_prepared(state, gradients, segment, step, inputs, places, param_out)

        tables = list(gradients.tables(state, plain))
        whole = [partial(update_prepared, one) for one in state.segments.select(prepared)]
        numel = state.layout.shard_numel
        num_parts = state.plan.num_parts
        if num_parts == 1 or len(tables) != 1 or whole:
            parts = [UpdatePart(0, numel, partial(_run, [*map(launch_of, tables), *whole]))]
        else:
            cuts = [align(numel * part // num_parts) for part in range(num_parts + 1)]
            parts = [
                UpdatePart(start, end, launch_of(tables[0].between(start, end), part))
                for part, (start, end) in enumerate(pairwise(cuts))
            ]
        return Launches(parts, partial(count_step, state, counts, scales))

    def _launch_of(
        self,
        state: BucketState,
        table: SegmentTable,
        rows: npt.NDArray[np.int64],
        scalars: npt.NDArray[np.float32],
        places: npt.NDArray[np.int64] | None,
        param_out: torch.Tensor | None,
        number: int = 0,
    ) -> Callable[[], None]:
        """Return a function that updates the table's segments in one launch.

        Args:
            rows: (num segments,) the row of `scalars` that each segment uses.
            places: (num parameters, NUM_COLUMNS) from `_places_at`.
            number: of the launch, if the state is kept.
        """
        planes = state.planes
        largest, remainder = planes.max_exp_avg_sq, planes.master_remainder
        if places is not None:
            places = places[table.positions]
            places[:, LOCAL_START] += table.skipped
        arrays = (
            bits_of(planes.master_weight),
            None if remainder is None else remainder.numpy(),
            bits_of(planes.exp_avg),
            bits_of(planes.exp_avg_sq),
            None if largest is None else largest.numpy(),
        )
        exponents = None if planes.exponents is None else planes.exponents.numpy()
        update = partial(
            self._adam.update,
            table.gradient_format,
            table.addresses,
            table.starts,
            table.work_starts(),
            rows,
            scalars,
            *arrays,
            None if param_out is None else bits_of(param_out),
            exponents,
            places,
        )
        numel, kept = int(table.numels.sum()), self._kept

        def launch() -> None:
            with _launching:
                num_pieces = self._use_threads(numel)
                if kept is None:
                    update(num_pieces)
                else:
                    kept.run(number, num_pieces, update, (*arrays, exponents))

        return launch

    def _update_prepared(
        self,
        state: BucketState,
        gradients: BucketGradients,
        segment: Segment,
        step: int,
        inputs: UpdateInputs,
        places: npt.NDArray[np.int64] | None,
        param_out: torch.Tensor | None,
    ) -> None:
        """Update this rank's part of one parameter with a centralized or sparse gradient."""
        hyper, how = inputs.preparation_of(state, segment.position)
        out = self._whole_gradient[: segment.numel]
        gradient = prepare_gradient(state, gradients, segment, how, lazy=inputs.lazy, out=out)
        scalars = scalar_row(hyper, step, 1.0)  # the preparation has scaled the gradient
        if isinstance(gradient, GradientRows):
            self._update_rows(state, segment, gradient, scalars, places, param_out)
            return
        columns = (gradient.data_ptr(), segment.shard_start, 0, segment.numel, segment.position)
        table = SegmentTable(
            FloatFormat.FLOAT32, *(np.array([column], dtype=np.int64) for column in columns)
        )
        rows = np.zeros(1, dtype=np.int64)
        self._launch_of(state, table, rows, scalars[None], places, param_out)()

    def _update_rows(
        self,
        state: BucketState,
        segment: Segment,
        touched: GradientRows,
        scalars: npt.NDArray[np.float32],
        places: npt.NDArray[np.int64] | None,
        param_out: torch.Tensor | None,
    ) -> None:
        """Update rows of a parameter that this rank holds whole; `touched` has no duplicates."""
        planes, remainder = state.planes, state.planes.master_remainder
        with _launching:
            self._sparse.update_rows(
                FloatFormat.FLOAT32,
                touched.rows.contiguous().numpy(),
                touched.values.contiguous().numpy(),
                touched.values.shape[1],
                scalars,
                bits_of(segment.of(planes.master_weight)),
                None if remainder is None else segment.of(remainder).numpy(),
                bits_of(segment.of(planes.exp_avg)),
                bits_of(segment.of(planes.exp_avg_sq)),
                None if param_out is None else bits_of(segment.of(param_out)),
                None if places is None else places[segment.position],
                self._use_threads(touched.values.numel()),
            )

    def _use_threads(self, numel: int) -> int:
        """Set Numba's number of threads for a launch over `numel` elements, and return it."""
        useful = -(-numel // MIN_PIECE_NUMEL)
        num_pieces = max(1, min(self._num_threads, useful))
        threads.use_threads(num_pieces)
        return num_pieces


def _run(actions: Iterable[Callable[[], None]]) -> None:
    for action in actions:
        action()


def _positions_of(state: BucketState, sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the position of the parameter that each block sum belongs to, given its index."""
    segments = np.searchsorted(state.segments.sum_starts, sums, side="right")
    positions: npt.NDArray[np.int64] = state.segments.positions[segments - 1]
    return positions


def _param_format(state: BucketState) -> FloatFormat | None:
    """Return the format of `param_out`, None if the kernel does not write a separate parameter."""
    return FORMATS[state.dtype] if state.plan.writes_parameters else None


def _kernel_formats(state: BucketState) -> dict[str, Any]:
    """Return the arguments of `compile_kernel` for the format of the state."""
    return {
        "state_format": state.state_format,
        "split_master": state.planes.master_remainder is not None,
    }


def _places_at(
    state: BucketState,
    counts: npt.NDArray[np.int64],
    active: npt.NDArray[np.bool_],
    hyperparameters: Sequence[Hyperparameters],
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64] | None]:
    """Return a copy of `BucketState.places` for this step, and the scales after it.

    Both are None for fp32 state, the scales without codes.

    Args:
        counts: (num parameters,) int64 step counts, including this step.
        active: (num parameters,) bool. Only their scales advance.
        hyperparameters: indexed by `BucketState.groups`.
    """
    if state.places is None:
        return None, None
    places = state.places.copy()
    places[:, KEY] = segment_keys(places[:, KEY].view(np.uint64), counts)
    if state.scales is None:
        return places, None
    beta2 = np.array([hyper.beta2 for hyper in hyperparameters])[state.groups[active]]
    scales = state.scales.numpy().copy()
    scales[active], places[active, SHIFT] = _decayed(scales[active], beta2)
    places[:, SCALE] = scales.astype(np.float32).view(np.int32)
    return places, scales


def _decayed(
    scales: npt.NDArray[np.float64], beta2: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Return scales after one decay, in [1, 2), and by which powers of 2 they were multiplied.

    Args:
        scales: (n,) 0 before the first update.
        beta2: (n,)
    """
    # At the first update, the stored codes must count as 0. This power leaves nothing of any code.
    lowest = 2.0 ** -(SQ_MAX_EXPONENT - SQ_MIN_EXPONENT + MOST_LOST_OCTAVES)
    decayed = np.where(scales == 0, lowest, scales * np.maximum(beta2, lowest))
    mantissas, exponents = np.frexp(decayed)  # mantissas in [0.5, 1)
    return 2 * mantissas, 1 - exponents
