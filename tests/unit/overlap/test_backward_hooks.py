"""Backward hooks that autograd's threads of several devices run at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch

from offload_adam.step.backward_hooks import BackwardHooks
from tests.support.devices import NamedStream

MAIN, SIDE = NamedStream("main"), NamedStream("side")


class Sink:
    """Records arrivals, and whether two threads ever called it at once."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.deliveries: list[tuple[int, Hashable]] = []
        self.inside = 0
        self.collided = False

    def gradients_ready(self, parameters: Sequence[torch.Tensor], stream: Hashable) -> None:
        self.deliveries.append((len(parameters), stream))
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
    hooks = BackwardHooks(cast(Any, sink), lambda device: None)
    hooks._last_task = torch._C._current_graph_task_id()  # so that `_enter_task` is not called
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


def test_all_gradients_of_a_delivery_were_written_on_one_stream() -> None:
    sink = Sink()
    stream = [MAIN]
    hooks = BackwardHooks(cast(Any, sink), lambda device: stream[0])
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(80)]
    hooks.attach(parameters)
    # Every 16th hook delivers, and the last one. The stream changes after every ten parameters.
    ended = []
    sink.backward_ended = lambda: ended.append(True)  # type: ignore[method-assign]

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for parameter in reversed(parameters):
            total = total + parameter.sum()
        return total

    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    for parameter in parameters:
        hook = partial(_change, stream, numbers[id(parameter)] // 10 % 2)
        parameter.register_hook(hook)
    loss().backward()
    assert ended == [True]
    assert sink.arrived == [id(parameter) for parameter in parameters]
    written = [name for number, name in sink.deliveries for _ in range(number)]
    assert written == ([MAIN] * 10 + [SIDE] * 10) * 4


def test_most_hooks_of_one_stream_deliver_nothing() -> None:
    sink = Sink()
    hooks = BackwardHooks(cast(Any, sink), lambda device: NamedStream("main"))
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(80)]
    hooks.attach(parameters)
    sum((p.sum() for p in reversed(parameters)), torch.zeros(())).backward()
    # The hooks at positions 0, 16, 32, 48 and 64 deliver, and the last one.
    assert [number for number, _ in sink.deliveries] == [1, *[16] * 4, 15]


def _change(stream: list[NamedStream], which: int, gradient: torch.Tensor) -> None:
    stream[0] = (MAIN, SIDE)[which]
