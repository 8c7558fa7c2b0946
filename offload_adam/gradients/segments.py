"""`BucketGradients`: a step's gradients of one bucket, as tables of addresses for the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.reader import LocalGradients
from offload_adam.gradients.sparse import GradientRows, sum_duplicates
from offload_adam.kernels.formats import FloatFormat
from offload_adam.layout.flat import Segment
from offload_adam.params.bucket import BucketState, ShardSegments
from offload_adam.params.elements import FORMATS, in_memory_order


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Segments of one gradient format: addresses of gradients and offsets of their state.

    addresses, starts, numels: (num segments,) int64, see `kernels.adam.update`.
    sum_starts: (num segments,) int64, see `kernels.norm.block_sums`.
    positions: (num segments,) int64, position in the bucket of each segment's parameter.
    skipped: (num segments,) int64, number of elements of the whole segment before this part of it;
        0 for whole segments.
    """

    gradient_format: FloatFormat
    addresses: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    sum_starts: npt.NDArray[np.int64]
    numels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    skipped: npt.NDArray[np.int64] | int = 0

    def between(self, start: int, end: int) -> SegmentTable:
        """Return the parts of whole segments within the shard's elements [start, end).

        The result has no `sum_starts`.
        """
        starts = np.maximum(self.starts, start)
        numels = np.minimum(self.starts + self.numels, end) - starts
        kept = numels > 0
        skipped = (starts - self.starts)[kept]
        return SegmentTable(
            self.gradient_format,
            self.addresses[kept] + skipped * self.gradient_format.bits_dtype.itemsize,
            starts[kept],
            np.zeros(0, dtype=np.int64),
            numels[kept],
            self.positions[kept],
            skipped,
        )

    def work_starts(self) -> npt.NDArray[np.int64]:
        """Return the running sum of the segments' lengths, from 0."""
        sums = np.zeros(self.numels.size + 1, dtype=np.int64)
        np.cumsum(self.numels, out=sums[1:])
        return sums


class BucketGradients:
    """One step's gradients of one bucket on this rank.

    Dense gradients are either the whole tensors of autograd, one per parameter, or one flat tensor
    with this rank's shard of them. Sparse gradients are rows of whole parameters.

    Attributes:
        dense: (num parameters,) bool, which parameters had a dense gradient on this rank.
        local_rows: this rank's sparse gradients before averaging, by position.
        rows: averaged sparse gradients, by position.
        squares: sum of squares of the dense gradients in this rank's shard; None until computed.
        target: the shard to which the pass that computes `squares` copies autograd's tensors; then
            None.
    """

    def __init__(self, state: BucketState) -> None:
        self.dense = np.zeros(len(state.parameters), dtype=np.bool_)
        self._held: list[LocalGradients] = []
        self._is_held = np.zeros(len(state.parameters), dtype=np.bool_)
        self._addresses = np.zeros(len(state.parameters), dtype=np.int64)
        self._shard: torch.Tensor | None = None
        self._complete = False
        self.squares: float | None = None
        self.target: torch.Tensor | None = None
        self.local_rows: dict[int, GradientRows] = {}
        self.rows: dict[int, GradientRows] = {}

    @property
    def shard(self) -> torch.Tensor | None:
        """The flat tensor that holds this rank's shard, None if autograd's tensors are held."""
        return self._shard

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which parameters had a dense or sparse gradient on this rank."""
        if not self.rows and not self.local_rows:
            return self.dense
        present = self.dense.copy()
        present[[*self.rows, *self.local_rows]] = True
        return present

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """Which parameters have a dense gradient to read, here or as zeros of a reduced shard."""
        if self._complete:
            return np.ones_like(self.dense)
        # A hook marks a gradient of a further backward as dense before its values arrive. In a
        # shard its segment exists, and the result is computed again once they have arrived.
        return self._is_held if self._shard is None else self.dense

    def add_local(self, found: LocalGradients, target: torch.Tensor | None = None) -> None:
        """Hold these dense gradients until the step ends, besides those of other parameters.

        Args:
            target: (shard_numel,) with their dtype. They are held only until they are copied to it.
        """
        addresses = np.array(found.addresses, dtype=np.int64)
        arrived = np.array([tensor is not None for tensor in found.tensors], dtype=np.bool_)
        self.squares = None  # computed from the earlier gradients
        self.target = target
        self._held.append(found)
        self._is_held |= arrived
        self._addresses[arrived] = addresses[arrived]
        self.dense |= arrived

    def add_rows(self, found: LocalGradients) -> None:
        """Append sparse gradients to those of earlier backwards."""
        for position, rows in found.rows.items():
            before = self.local_rows.get(position)
            self.local_rows[position] = rows if before is None else before.joined(rows)

    def accept_local_rows(self) -> None:
        """Use this rank's sparse gradients without averaging."""
        self.rows, self.local_rows = self.local_rows, {}

    def copy_rows_to_host(self) -> None:
        """Copy the averaged sparse gradients to host memory, where the kernels read them."""
        self.rows = {
            position: GradientRows(rows.cpu(), values.cpu())
            for position, (rows, values) in self.rows.items()
        }

    def reject_mixed(self, state: BucketState) -> None:
        """Reject a parameter with a sparse gradient from one backward and a dense one from another.

        Raises:
            ValueError: the message names the parameter.
        """
        for position in (*self.rows, *self.local_rows):
            if self.dense[position]:
                raise ValueError(
                    f"Parameter {state.names[position]!r} has a sparse gradient from one backward "
                    "of this step and a dense one from another. Use its layer in the same way in "
                    "all backwards of a step."
                )

    def rows_sum_of_squares(self) -> float:
        """Return the float64 sum of squares of all sparse gradients, with duplicate rows summed."""
        return sum(self.rows_squares().values(), 0.0)

    def rows_squares(self) -> dict[int, float]:
        """Return the float64 sum of squares of each sparse gradient, by position."""
        return {
            position: float(
                sum_duplicates(GradientRows(rows, values.double())).values.square().sum()
            )
            for position, (rows, values) in self.rows.items()
        }

    def non_finite_rows(self) -> list[int]:
        """Return the positions of sparse gradients with a non-finite value."""
        return [p for p, rows in self.rows.items() if not torch.isfinite(rows.values).all()]

    def mark_present(self, present: npt.NDArray[np.bool_]) -> None:
        """Record which parameters had a dense gradient on this rank when the bucket was sent."""
        self.dense |= present

    def held_parts(self, state: BucketState) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield this rank's dense gradients so far: (1-d tensor, its start in the shard)."""
        if self._shard is not None:
            yield self._shard, 0
        for found in self._held:
            for position, parameter_start, shard_start, numel in state.segments.each:
                gradient = found.tensors[position]
                if gradient is not None:
                    flat = in_memory_order(gradient)
                    yield flat[parameter_start : parameter_start + numel], shard_start

    def move_to(self, target: torch.Tensor) -> None:
        """Read gradients from a tensor into which all `held_parts` were copied, and drop them.

        Args:
            target: (shard_numel,) in a gradient dtype.
        """
        self._held.clear()
        self.target = None
        self.set_shard(target, complete=self._complete)

    def set_shard(self, shard: torch.Tensor, *, complete: bool) -> None:
        """Read gradients from this rank's shard from now on.

        Args:
            shard: (shard_numel,) in a gradient dtype.
            complete: the shard has zeros for parameters without a gradient on this rank.
        """
        self.squares = None  # computed from the earlier gradients
        self._shard = shard
        self._complete = complete

    def tables(self, state: BucketState, active: npt.NDArray[np.bool_]) -> Iterator[SegmentTable]:
        """Yield the segments of `active` parameters, one table for each gradient format.

        Args:
            active: (num parameters,) bool. Parameters with a sparse gradient are skipped.
        """
        segments = state.segments
        if segments.numels.size == 0:
            return
        if self.rows:
            active = active.copy()  # it belongs to the caller
            active[list(self.rows)] = False
        chosen = active[segments.positions]
        if self._shard is not None:
            itemsize = self._shard.element_size()
            addresses = self._shard.data_ptr() + segments.shard_starts * itemsize
            yield from _table(state, self._shard.dtype, addresses, chosen)
            return
        for found in self._held:
            for dtype in found.dtypes:
                offsets = segments.parameter_starts * dtype.itemsize
                addresses = self._addresses[segments.positions] + offsets
                # Usually all gradients have one dtype, and the table has all chosen segments.
                alone = len(self._held) == 1 and len(found.dtypes) == 1
                mask = chosen if alone else chosen & _has_dtype(found, dtype, segments)
                yield from _table(state, dtype, addresses, mask)

    def segment_gradient(self, state: BucketState, segment: Segment) -> torch.Tensor:
        """Return one segment's dense gradient, 1-d, without a copy."""
        if self._shard is not None:
            return segment.of(self._shard)
        start = segment.parameter_start
        for found in reversed(self._held):
            gradient = found.tensors[segment.position]
            if gradient is not None:
                return in_memory_order(gradient)[start : start + segment.numel]
        raise LookupError(f"No gradient is held for {state.names[segment.position]!r}.")


def _has_dtype(
    found: LocalGradients, dtype: torch.dtype, segments: ShardSegments
) -> npt.NDArray[np.bool_]:
    """Return which segments have a gradient of this dtype in `found`."""
    matches = [tensor is not None and tensor.dtype == dtype for tensor in found.tensors]
    return np.array(matches, dtype=np.bool_)[segments.positions]


def _table(
    state: BucketState,
    dtype: torch.dtype,
    addresses: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
) -> Iterator[SegmentTable]:
    """Yield the table of the chosen segments, if there are any."""
    segments = state.segments
    columns = [
        addresses,
        segments.shard_starts,
        segments.sum_starts,
        segments.numels,
        segments.positions,
    ]
    if not chosen.all():
        columns = [column[chosen] for column in columns]
    if columns[0].size > 0:
        yield SegmentTable(FORMATS[dtype], *columns)
