"""Memory for the sums of several backwards of a step, taken when a step first runs several."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from offload_adam.coordinator.node_memory import reserved_memory
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.budget import accumulator_nbytes
from offload_adam.memory.arena import HostArena
from offload_adam.params.bucket import BucketState
from offload_adam.step.update_tasks import BucketUpdate
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)


class Accumulators:
    """Flat float32 tensors, one for each bucket whose gradient shard cannot hold the sums.

    See `StatePlan.accumulator_itemsize`.

    Owns: the tensors. Nothing is allocated before the first `allocate`.
    Threads: `allocate` may run in a hook during backward. So it waits for no collective, and the
        memory is not page-locked: pinning memory while a collective runs may deadlock in CUDA.

    Args:
        states, updates: one for each bucket; these lists grow with `add_param_group`.
        arenas: receives the host memory; the owner of the list closes it.
        allow_overcommit: log a warning instead of raising if the host lacks memory.
    """

    def __init__(
        self,
        ranks: RankGroup,
        states: Sequence[BucketState],
        updates: Sequence[BucketUpdate],
        arenas: list[HostArena],
        *,
        allow_overcommit: bool,
    ) -> None:
        self._ranks = ranks
        self._states = states
        self._updates = updates
        self._arenas = arenas
        self._allow_overcommit = allow_overcommit
        self._num_buckets = 0  # the first buckets, which have been allocated
        self.tensors: dict[int, torch.Tensor] = {}  # by bucket

    @property
    def are_allocated(self) -> bool:
        """Whether every bucket can add up several backwards."""
        return self._num_buckets == len(self._states)

    @property
    def host_nbytes(self) -> int:
        """Host bytes of all accumulators."""
        return sum(
            tensor.nbytes
            for bucket, tensor in self.tensors.items()
            if self._states[bucket].plan.location.is_host
        )

    def allocate(self) -> None:
        """Allocate what is missing, compile the kernels that read it, and log the bytes.

        Raises:
            HostMemoryError: host memory is short; nothing was allocated.
        """
        if self.are_allocated:
            return
        new = self._states[self._num_buckets :]
        needing = [state for state in new if accumulator_nbytes(state.plan) > 0]
        with PROGRESS.at("allocation of gradient accumulators", long_running=True):
            for state in needing:
                self._updates[state.layout.index].compile_for_accumulator(state)
            tensors = self._allocate(needing)
        self.tensors |= tensors
        self._num_buckets = len(self._states)
        if tensors and self._ranks.rank == 0:
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            logger.info(
                "A step runs several backwards outside no_sync(). Rank 0 has allocated %s (%d "
                "bytes) to add up their gradients in fp32, and keeps this memory",
                format_nbytes(nbytes),
                nbytes,
            )

    def _allocate(self, states: Sequence[BucketState]) -> dict[int, torch.Tensor]:
        """Return accumulators with undefined content, by bucket."""
        tensors = {
            state.layout.index: torch.empty(
                state.layout.shard_numel, dtype=torch.float32, device=state.device
            )
            for state in states
            if not state.plan.location.is_host
        }
        on_host = [state for state in states if state.plan.location.is_host]
        nbytes = sum(accumulator_nbytes(state.plan) for state in on_host)
        what = "gradients of several backwards of a step"
        with reserved_memory(nbytes, what, allow_overcommit=self._allow_overcommit):
            arena = HostArena(nbytes, piece_nbytes=max(nbytes, 1))
        self._arenas.append(arena)
        return tensors | {
            state.layout.index: arena.allocate(state.layout.shard_numel, torch.float32)
            for state in on_host
        }
