"""What an optimizer's work runs on: streams, collectives, the update thread, slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.budget import NUM_REDUCE_SLOTS, NUM_STAGING_SLOTS
from offload_adam.step.overlapped import Worker
from offload_adam.step.update_thread import UpdateThread
from offload_adam.transfer.collectives import Collectives, GroupCollectives
from offload_adam.transfer.streams import Streams, streams_for


@dataclass(frozen=True, slots=True)
class Backend:
    """How, and how many, each of them is made; tests put a simulated machine in its place."""

    make_streams: Callable[[torch.device], Streams] = streams_for
    make_collectives: Callable[[RankGroup], Collectives] = GroupCollectives
    make_worker: Callable[[], Worker] = UpdateThread
    num_reduce_slots: int = NUM_REDUCE_SLOTS
    num_staging_slots: int = NUM_STAGING_SLOTS
