"""A model that runs its parts on several streams; `==` and `!=` behave as for torch's streams."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam, OffloadPolicy
from offload_adam.layout.schedule import Lane
from offload_adam.transfer.streams import Event
from tests.support.devices import HOST_AS_DEVICE, NamedStream, ThreadStreams
from tests.unit.overlap.lazy_worker import LazyWorker, copying

MAIN, SIDE = NamedStream("main"), NamedStream("side")


class TwoStreams(ThreadStreams):
    """The lanes of a device whose current stream a test chooses."""

    now = MAIN
    captures = False

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[Hashable] = []
        self.waits: list[NamedStream] = []

    def current(self) -> NamedStream:
        return TwoStreams.now

    def is_capturing(self) -> bool:
        return TwoStreams.captures

    def reject_capture(self) -> None:
        if TwoStreams.captures:
            raise RuntimeError("captured")

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        if on is not None:
            self.joined.append(on)
        return super().record(lane, on=on)

    def wait(self, lane: Lane, event: Event) -> None:
        if lane is Lane.COMPUTE:
            self.waits.append(TwoStreams.now)
        super().wait(lane, event)


class Part(nn.Module):
    """A layer that runs on its own stream, in forward and backward."""

    def __init__(self, stream: NamedStream) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(128))
        self.stream = stream
        self.weight.register_hook(lambda gradient: setattr(TwoStreams, "now", stream))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Model(nn.Module):
    def __init__(self, streams: list[NamedStream]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(map(Part, streams))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for part in self.parts:
            TwoStreams.now = part.stream  # type: ignore[assignment]
            total = total + part(x).sum()
        TwoStreams.now = MAIN
        return total


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoStreams, "now", MAIN)
    monkeypatch.setattr(TwoStreams, "captures", False)


def make(*streams: NamedStream, **options: Any) -> tuple[Model, OffloadAdam, TwoStreams]:
    class Offloading(OffloadAdam):
        _backend = replace(HOST_AS_DEVICE, make_streams=lambda device: TwoStreams(), **options)

    model = Model(list(streams))
    optimizer = Offloading(
        model.parameters(), module=model, overlap=True, offload=OffloadPolicy(pin="all")
    )
    lanes: Any = optimizer._alive().stream_waits.streams_of(0)
    return model, optimizer, lanes


@pytest.mark.parametrize("order", [(MAIN, SIDE), (SIDE, MAIN), (MAIN, SIDE, MAIN, SIDE)])
def test_the_sending_stream_waits_for_every_other_stream(
    order: tuple[NamedStream],
) -> None:
    model, optimizer, lanes = make(*order)
    model(torch.ones(128)).backward()
    completing = order[0]
    assert lanes.joined == [SIDE if completing is MAIN else MAIN]
    optimizer.close()


def test_one_stream_waits_for_no_other() -> None:
    model, optimizer, lanes = make(MAIN, MAIN)
    for _ in range(2):
        model(torch.ones(128)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lanes.joined == []
    optimizer.close()


def step(model: Model, optimizer: OffloadAdam) -> None:
    model(torch.ones(128)).backward()
    TwoStreams.now = MAIN
    optimizer.step()
    optimizer.zero_grad()


def test_each_stream_that_reads_a_bucket_waits_for_it_once() -> None:
    model, optimizer, lanes = make(MAIN, SIDE, MAIN, SIDE)
    step(model, optimizer)
    lanes.waits.clear()
    model(torch.ones(128))
    assert lanes.waits == [MAIN, SIDE]
    optimizer.close()


def test_after_synchronize_no_stream_waits() -> None:
    """A graph cannot capture such a wait, and the error about it says to synchronize."""
    model, optimizer, lanes = make(MAIN, SIDE)
    step(model, optimizer)
    optimizer.synchronize()
    lanes.waits.clear()
    model(torch.ones(128))
    assert lanes.waits == []
    optimizer.close()


def test_a_capture_is_rejected_before_an_update_is_waited_for() -> None:
    """The update may itself wait until the capture has ended."""
    model, optimizer, _ = make(MAIN, make_workers=LazyWorker.pair)
    step(model, optimizer)
    worker = copying[-1]
    num_done = len(worker.done)
    TwoStreams.captures = True
    with pytest.raises(RuntimeError, match="captured"):
        model(torch.ones(128))
    assert len(worker.done) == num_done
    TwoStreams.captures = False
    model(torch.ones(128))
    assert len(worker.done) > num_done
    optimizer.close()
