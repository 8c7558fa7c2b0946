"""Where this step's gradients of one bucket are, as a table that the kernels read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels.formats import FloatFormat
from offload_adam.parameters.families import float_format
from offload_adam.step.bucket_state import BucketState, SegmentArrays

_dtype = attrgetter("dtype")


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Segments of one gradient format: where each gradient lies and which state belongs to it.

    addresses, starts, numels: int64, one entry a segment, see `kernels.update.update`.
    positions: int64, each segment's parameter in the bucket.
    """

    gradient_format: FloatFormat
    addresses: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    numels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]

    def work_starts(self) -> npt.NDArray[np.int64]:
        """Return the running sum of the segments' lengths, from 0."""
        sums = np.zeros(self.numels.size + 1, dtype=np.int64)
        np.cumsum(self.numels, out=sums[1:])
        return sums


class BucketGradients:
    """One step's gradients of one bucket on this rank.

    Either held where autograd left them, whole and one tensor a parameter, or landed: this rank's
    shard in one flat host tensor. `present` says which parameters had one on this rank.
    """

    def __init__(self, state: BucketState) -> None:
        self.present = np.zeros(len(state.parameters), dtype=np.bool_)
        self._held: list[torch.Tensor | None] = []
        self._dtypes: list[torch.dtype] = []
        self._pointers = np.zeros(len(state.parameters), dtype=np.int64)
        self._landed: torch.Tensor | None = None
        self._complete = False

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """Which parameters can be read here: a reduced shard has zeros for absent ones."""
        return np.ones_like(self.present) if self._complete else self.present

    def hold(self, gradients: list[torch.Tensor | None]) -> None:
        """Keep these tensors, in their parameters' memory order, beside any that are held."""
        if self._held:
            gradients = [
                new if old is None else old for old, new in zip(self._held, gradients, strict=True)
            ]
        self._held = gradients
        tensors = [gradient for gradient in gradients if gradient is not None]
        self._dtypes = sorted(set(map(_dtype, tensors)), key=str)
        if len(tensors) == len(gradients):
            self.present[:] = True
            self._pointers = np.array(list(map(torch.Tensor.data_ptr, tensors)), dtype=np.int64)
        else:
            self.present[:] = [gradient is not None for gradient in gradients]
            self._pointers = np.zeros(len(gradients), dtype=np.int64)
            self._pointers[self.present] = list(map(torch.Tensor.data_ptr, tensors))

    def land(self, shard: torch.Tensor, present: npt.NDArray[np.bool_], *, complete: bool) -> None:
        """Take this rank's shard of the bucket, on the host, with the parameters `present` here.

        complete: the shard has zeros where this rank had no gradient.
        """
        self._landed = shard
        self._complete = complete
        self.present |= present

    def tables(self, state: BucketState, active: npt.NDArray[np.bool_]) -> Iterator[SegmentTable]:
        """Yield the segments of `active` parameters, one table for each gradient format."""
        segments = state.segments
        if segments.numels.size == 0:
            return
        chosen = active[segments.positions]
        if self._landed is not None:
            itemsize = self._landed.element_size()
            addresses = self._landed.data_ptr() + segments.shard_starts * itemsize
            yield from _table(state, self._landed.dtype, addresses, chosen)
            return
        for dtype in self._dtypes:
            offsets = segments.parameter_starts * dtype.itemsize
            addresses = self._pointers[segments.positions] + offsets
            alone = len(self._dtypes) == 1
            of_dtype = chosen if alone else chosen & self._has_dtype(dtype, segments)
            yield from _table(state, dtype, addresses, of_dtype)

    def _has_dtype(self, dtype: torch.dtype, segments: SegmentArrays) -> npt.NDArray[np.bool_]:
        matches = [gradient is not None and gradient.dtype == dtype for gradient in self._held]
        return np.array(matches, dtype=np.bool_)[segments.positions]


def _table(
    state: BucketState,
    dtype: torch.dtype,
    addresses: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
) -> Iterator[SegmentTable]:
    """Yield the table of the chosen segments, if there are any."""
    segments = state.segments
    columns = [addresses, segments.shard_starts, segments.numels, segments.positions]
    if not chosen.all():
        columns = [column[chosen] for column in columns]
    if columns[0].size > 0:
        yield SegmentTable(float_format(dtype), *columns)
