"""What an optimizer's work runs on: streams, collectives, the update thread, slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.budget import NUM_REDUCE_SLOTS, NUM_STAGING_SLOTS
from offload_adam.memory.pinning import CudaRuntime, cuda_runtime
from offload_adam.step.overlapped import Worker
from offload_adam.step.update_thread import UpdateThread
from offload_adam.transfer.collectives import Collectives, GroupCollectives
from offload_adam.transfer.streams import Streams, streams_for


def is_device(device: torch.device) -> bool:
    """Tell whether a tensor's device is another memory than the host's."""
    return device.type != "cpu"


@dataclass(frozen=True, slots=True)
class Backend:
    """How, and how many, each of them is made; tests put a simulated machine in its place."""

    is_device: Callable[[torch.device], bool] = is_device
    make_runtime: Callable[[], CudaRuntime | None] = cuda_runtime
    make_streams: Callable[[torch.device], Streams] = streams_for
    make_collectives: Callable[[RankGroup], Collectives] = GroupCollectives
    make_worker: Callable[[], Worker] = UpdateThread
    num_reduce_slots: int = NUM_REDUCE_SLOTS
    num_staging_slots: int = NUM_STAGING_SLOTS
