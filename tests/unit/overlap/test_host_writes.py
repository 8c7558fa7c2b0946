"""The host writes to state only after the last step's H2D copies have read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.layout.schedule import Lane
from offload_adam.transfer.streams import Event
from tests.support.devices import HOST_AS_DEVICE, ThreadStreams


class SlowBus(ThreadStreams):
    """H2D copies that are late, and a compute stream that waits without blocking the host."""

    def launch(self, lane: Lane, action: Callable[[], object], **touches: Any) -> None:
        def late() -> None:
            time.sleep(0.1)
            action()

        super().launch(lane, late if lane is Lane.H2D else action, **touches)

    def wait(self, lane: Lane, event: Event) -> None:
        if lane is not Lane.COMPUTE:
            super().wait(lane, event)


def load(optimizer: OffloadAdam, parameter: torch.nn.Parameter) -> None:
    zeroed = {key: torch.zeros_like(value) for key, value in optimizer.state[parameter].items()}
    optimizer.load_state_dict({**optimizer.local_state_dict(), "state": {0: zeroed}})


def replace_entry(optimizer: OffloadAdam, parameter: torch.nn.Parameter) -> None:
    optimizer.state[parameter]["master_weight"] = torch.zeros_like(parameter)
    optimizer.synchronize()


def replace_entry_before_a_step(optimizer: OffloadAdam, parameter: torch.nn.Parameter) -> None:
    optimizer.state[parameter]["master_weight"] = torch.zeros_like(parameter)
    parameter.grad = None
    optimizer.step()


def write_in_place(optimizer: OffloadAdam, parameter: torch.nn.Parameter) -> None:
    optimizer.synchronize()
    optimizer.state[parameter]["master_weight"].zero_()


@pytest.mark.parametrize(
    "write", [load, replace_entry, replace_entry_before_a_step, write_in_place]
)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_write_to_state_waits_for_the_copy_that_reads_it(
    write: Callable[[OffloadAdam, torch.nn.Parameter], None], overlap: bool
) -> None:
    streams = SlowBus()

    class Offloading(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_streams=lambda _: streams)

    module = torch.nn.Linear(100, 1, bias=False)
    (parameter,) = module.parameters()
    before = parameter.detach().clone()
    optimizer = Offloading(module.parameters(), lr=1.0, module=module, overlap=overlap)
    module(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    write(optimizer, parameter)
    streams.record(Lane.H2D).synchronize()
    torch.testing.assert_close(parameter.detach(), before - 1.0)
    optimizer.close()
