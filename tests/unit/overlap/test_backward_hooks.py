"""Hooks that autograd's threads of several devices run at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from offload_adam.step.backward_hooks import BackwardHooks


class Sink:
    """Notes what arrives, and whether two threads were ever in it at once."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.inside = 0
        self.collided = False

    def gradients_ready(self, parameters: Sequence[torch.Tensor]) -> None:
        self.inside += 1
        self.collided |= self.inside > 1
        time.sleep(1e-4)
        self.arrived += map(id, parameters)
        self.inside -= 1

    def backward_began(self) -> None:
        pass

    def backward_ended(self) -> None:
        pass


def test_deliveries_of_several_threads_take_turns_and_none_is_lost() -> None:
    sink = Sink()
    hooks = BackwardHooks(cast(Any, sink))
    hooks._last_task = torch._C._current_graph_task_id()  # no backward is under way to enter
    parameters = [torch.zeros(1) for _ in range(200)]

    def deliver(members: list[torch.Tensor]) -> None:
        for parameter in members:
            hooks._deliver(parameter)

    threads = [threading.Thread(target=deliver, args=(parameters[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not sink.collided
    assert sorted(sink.arrived) == sorted(map(id, parameters))
