"""Which of the two updates a bucket gets: the kernels on the host, or torch on its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.memory.arena import Touch
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.device_update import DeviceUpdate
from offload_adam.step.gradients import BucketGradients
from offload_adam.step.masks import UpdateMasks
from offload_adam.step.read_gate import ReadGate
from offload_adam.step.update import HostUpdate


class BucketUpdate(Protocol):
    """What a step does with one bucket's gradients, once they are final."""

    def reserve(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        """Make room for what these gradients need, before anything is changed."""
        ...

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of this shard's gradients, not finite if one is."""
        ...

    def squares_by_position(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return `sum_of_squares` for each of the bucket's parameters."""
        ...

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        """Return the positions of the bucket's parameters with a gradient that is not finite."""
        ...

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
        rounded: torch.Tensor | None,
    ) -> None:
        """Update the shard's segments of `active` parameters and count the step for them."""
        ...


class Updates:
    """Both updates; that of the host, with Numba, is made with the first bucket that needs it.

    gate: keeps them off what a checkpoint still reads.
    """

    def __init__(self, num_threads: int | None, gate: ReadGate) -> None:
        self._num_threads = num_threads
        self.gate = gate
        self._host: HostUpdate | None = None
        self._device = DeviceUpdate(gate)

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Host bytes by what they are for."""
        return {"block_sums": 0, "prepared": 0} if self._host is None else self._host.nbytes

    def prepare(self, states: Sequence[BucketState]) -> None:
        """Compile and allocate what these buckets need."""
        hosted = [state for state in states if state.plan.location.is_host]
        if hosted:
            self._made().prepare(hosted)

    def touch_from(self, run: Callable[[str, Callable[[], None]], None]) -> Touch:
        """Return what commits a plane in host memory from the threads that will update it.

        Args:
            run: does something, of which it is told the name, on the thread that launches updates.
        """

        def touch(memory: torch.Tensor) -> None:
            host = self._made()
            run("the first touch of its memory", lambda: host.touch(memory))

        return touch

    def _made(self) -> HostUpdate:
        if self._host is None:
            self._host = HostUpdate(self._num_threads, self.gate)
        return self._host

    def of(self, state: BucketState) -> BucketUpdate:
        """Return the update of a bucket that `prepare` was given."""
        if not state.plan.location.is_host:
            return self._device
        assert self._host is not None
        return self._host
