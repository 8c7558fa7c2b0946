"""With one rank, the memory of gradients whose D2H copy has not finished is bounded.

A test delays the thread that performs D2H copies. Backward must then wait once the slots are full.
On a GPU the stream would wait; the simulated device makes the calling thread wait instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam, OffloadPolicy
from offload_adam.layout.budget import NUM_REDUCE_SLOTS
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.schedule import Lane
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import predict
from tests.support.devices import HOST_AS_DEVICE, ThreadStreams
from tests.support.scenario import Offloading

NUM_LAYERS = 12
NUMEL = 1024
TIMEOUT_S = 30.0


class HeldUp(ThreadStreams):
    """Lanes whose D2H copies begin when the test sets `bus`."""

    def __init__(self, bus: threading.Event) -> None:
        super().__init__()
        self._bus = bus

    def launch(self, lane: Lane, action: Callable[[], object], **touched: Any) -> None:
        def late() -> None:
            assert self._bus.wait(TIMEOUT_S)
            action()

        super().launch(lane, late if lane is Lane.D2H else action, **touched)


class Layers(torch.nn.Module):
    """Layers whose parameters are a bucket each; the gradient of layer n is n + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16)) for _ in range(NUM_LAYERS)
        )

    def forward(self, seen: list[int]) -> torch.Tensor:
        total = torch.zeros(())
        for number, weight in enumerate(self.weights):
            scaled = weight.float() * (number + 1)
            scaled.register_hook(lambda _, number=number: seen.append(number))
            total = total + scaled.sum()
        return total


def make(bus: threading.Event, **options: Any) -> tuple[Layers, OffloadAdam]:
    class OnBus(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_streams=lambda device: HeldUp(bus))

    model = Layers()
    offload = OffloadPolicy(bucket_nbytes=2 * NUMEL, pin=options.pop("pin", "all"))
    return model, OnBus(model.parameters(), lr=1e-2, module=model, offload=offload, **options)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": "host"}, {"pin": "staging"}], ids=["slots", "added", "staging"]
)
def test_backward_waits_if_the_bus_is_slower(options: dict[str, Any], overlap: bool) -> None:
    bus = threading.Event()
    model, optimizer = make(bus, overlap=overlap, **options)
    seen: list[int] = []
    backward = threading.Thread(target=lambda: model(seen).backward(), daemon=True)
    backward.start()
    _wait_until_still(seen)
    assert backward.is_alive()
    # The slots are full. One more gradient waits for a slot, and the next one is being computed.
    assert NUM_REDUCE_SLOTS <= len(seen) <= NUM_REDUCE_SLOTS + 2
    bus.set()
    backward.join(TIMEOUT_S)
    assert not backward.is_alive()
    assert seen == list(range(NUM_LAYERS))[::-1]
    optimizer.step()
    optimizer.synchronize()
    for number, weight in enumerate(model.weights):
        exp_avg = optimizer.state[weight]["exp_avg"]
        expected = torch.full_like(exp_avg, 0.1 * (number + 1))
        torch.testing.assert_close(exp_avg, expected, rtol=1e-6, atol=0.0)
    optimizer.close()


def _wait_until_still(seen: list[int]) -> None:
    """Wait until no gradient has been computed for 0.3 s."""
    end_s = time.monotonic() + TIMEOUT_S
    before = -1
    while len(seen) != before or not seen:
        assert time.monotonic() < end_s
        before = len(seen)
        time.sleep(0.3)


def test_slots_are_all_the_memory_that_gradients_take() -> None:
    bus = threading.Event()
    bus.set()
    model, optimizer = make(bus)
    model([]).backward()
    optimizer.step()
    slots = [entry.nbytes for entry in optimizer.memory_ledger() if entry.category == "slots"]
    assert slots == [NUM_REDUCE_SLOTS * NUMEL * 2]
    optimizer.close()


def test_a_slot_is_as_large_as_the_largest_bucket_that_uses_it() -> None:
    sizes = [1024, 128, 256, 4096, 512, 128]  # of parameters that are a bucket each
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in sizes]
    offload = OffloadPolicy(bucket_nbytes=1)
    module = torch.nn.ParameterList(parameters)
    optimizer = Offloading(parameters, module=module, offload=offload)
    # Backward begins with the last: 128 and 256, 512 and 128, 4096 and 1024 have a slot each.
    (slots,) = [entry.nbytes for entry in optimizer.memory_ledger() if entry.category == "slots"]
    assert slots == 2 * (256 + 512 + 4096)
    # Forward begins with the first bucket and uses two slots in turn.
    assert optimizer.host_nbytes["staging"] == 2 * (1024 + 4096)
    specs = [ParameterSpec(i, size, 2, "bf16") for i, size in enumerate(sizes)]
    plan = predict(specs, Training(offload=offload))
    assert plan.device["slots"] == slots
    assert plan.host["staging"] == optimizer.host_nbytes["staging"]
    optimizer.close()
