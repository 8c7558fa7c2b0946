"""`CudaStreams` against a fake torch.cuda that records which work is issued on which stream."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Lane
from offload_adam.transfer import collectives
from offload_adam.transfer.collectives import Collectives
from offload_adam.transfer.stream_waits import StreamWaits
from offload_adam.transfer.streams import CudaEvent, CudaStreams
from tests.support.devices import NamedStream


class FakeEvent:
    """An event that happens when the test sets `happened`.

    The event's device must be the current one in each query.
    """

    current_device: ClassVar[list[torch.device | None]] = [None]

    def __init__(self, blocking: bool = False) -> None:
        self.blocking = blocking
        self.recorded_on: str | None = None
        self.happened = False

    def record(self, stream: FakeStream) -> None:
        self.recorded_on = stream.name

    def query(self) -> bool:
        assert self.current_device[-1] == DEVICE
        return self.happened

    def synchronize(self) -> None:
        assert self.current_device[-1] == DEVICE
        self.happened = True


class FakeStream(NamedStream):
    """A stream with a name, and the events that it waits for."""

    made = 0
    device = torch.device("cuda", 3)

    def __init__(self, device: Any = None, name: str | None = None) -> None:
        FakeStream.made += 1
        super().__init__(name or f"stream {FakeStream.made}")
        self.waits: list[FakeEvent] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.waits.append(event)


class FakeCuda:
    """The part of torch.cuda that `CudaStreams` uses."""

    Stream = FakeStream
    Event = FakeEvent

    def __init__(self) -> None:
        self.current = FakeStream(name="the model's")
        self.captures = False

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "device", _use_device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.captures)
    return fake


@contextmanager
def _use_device(device: torch.device) -> Iterator[None]:
    FakeEvent.current_device.append(device)
    try:
        yield
    finally:
        FakeEvent.current_device.pop()


DEVICE = torch.device("cuda", 3)


def recorded(streams: Any, lane: Lane) -> FakeEvent:
    """Record an event on a lane, and return the fake torch event inside."""
    return cast(FakeEvent, cast(CudaEvent, streams.record(lane)).event)


def test_each_lane_has_a_stream_and_the_models_lane_is_the_current_one(cuda: FakeCuda) -> None:
    streams = CudaStreams(DEVICE)
    used: dict[Lane, str] = {}

    def note(lane: Lane) -> None:
        used[lane] = cuda.current.name

    for lane in Lane:
        streams.launch(lane, partial(note, lane))
    assert used[Lane.COMPUTE] == "the model's"
    own = [used[lane] for lane in (Lane.REDUCE, Lane.D2H, Lane.H2D, Lane.GATHER)]
    assert len({*own, "the model's"}) == 5
    assert cuda.current.name == "the model's"
    for lane, name in used.items():
        assert recorded(streams, lane).recorded_on == name


def test_the_next_current_stream_waits_for_what_was_launched_on_the_last_one(
    cuda: FakeCuda,
) -> None:
    streams = CudaStreams(DEVICE)
    side = FakeStream(name="side")
    streams.launch(Lane.COMPUTE, lambda: None)
    streams.launch(Lane.COMPUTE, lambda: None)
    assert cuda.current.waits == []
    with cuda.stream(side):
        streams.launch(Lane.COMPUTE, lambda: None)
        streams.launch(Lane.COMPUTE, lambda: None)
    assert [event.recorded_on for event in side.waits] == ["the model's"]


def test_what_the_model_reads_is_held_once_it_runs_on_two_streams(cuda: FakeCuda) -> None:
    streams = CudaStreams(DEVICE)

    def is_held() -> tuple[bool, FakeEvent]:
        tensor = torch.ones(3)
        alive = weakref.ref(tensor)
        streams.launch(Lane.COMPUTE, lambda: None, reads=[tensor])
        del tensor
        event = recorded(streams, Lane.COMPUTE)
        gc.collect()
        return alive() is not None, event

    assert is_held()[0] is False
    with cuda.stream(FakeStream(name="side")):
        streams.launch(Lane.COMPUTE, lambda: None)
    held, event = is_held()
    assert held
    event.happened = True
    streams.record(Lane.H2D)
    assert not any(streams._held.values())


def test_gradients_of_other_streams_are_waited_for_and_held(cuda: FakeCuda) -> None:
    waits = StreamWaits(RankGroup(), CudaStreams)
    waits.use_schedule(waits.schedule, {0: DEVICE, 1: DEVICE})
    side, gradient = FakeStream(name="side"), torch.ones(3)
    waits.gradients_written(0, waits.current_stream(DEVICE))
    waits.gradients_written(1, waits.current_stream(DEVICE))
    with cuda.stream(side):
        waits.gradients_written(0, waits.current_stream(DEVICE))
    waits.wait_for_gradients(1, [gradient])
    assert cuda.current.waits == []
    waits.wait_for_gradients(0, [gradient, None])
    assert [event.recorded_on for event in cuda.current.waits] == ["side"]
    alive = weakref.ref(gradient)
    del gradient
    event = recorded(waits.streams_of(0), Lane.COMPUTE)
    gc.collect()
    assert alive() is not None
    event.happened = True
    waits.streams_of(0).record(Lane.COMPUTE)
    gc.collect()
    assert alive() is None
    waits.wait_for_gradients(0, [])  # once is enough
    assert len(cuda.current.waits) == 1


def test_a_wait_is_stream_on_stream_and_a_synchronize_blocks_without_spinning(
    cuda: FakeCuda,
) -> None:
    streams = CudaStreams(DEVICE)
    event = streams.record(Lane.D2H)
    fake = cast(FakeEvent, cast(CudaEvent, event).event)
    streams.wait(Lane.COMPUTE, event)
    assert cuda.current.waits == [fake]
    assert not fake.happened
    assert fake.blocking
    event.synchronize()
    assert fake.happened


def test_tensors_that_another_stream_reads_are_held_until_its_event(cuda: FakeCuda) -> None:
    streams = CudaStreams(DEVICE)
    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    streams.launch(Lane.D2H, lambda: None, reads=[tensor])
    del tensor
    event = recorded(streams, Lane.D2H)
    streams.record(Lane.H2D)
    gc.collect()
    assert alive() is not None
    event.happened = True
    streams.record(Lane.H2D)
    gc.collect()
    assert alive() is None


def test_what_is_issued_between_two_events_is_held_by_the_second(cuda: FakeCuda) -> None:
    """Another thread issues a copy while the first event is being recorded."""
    streams = CudaStreams(DEVICE)
    waiting = [torch.ones(3)]
    alive = weakref.ref(waiting[0])

    class Overtaken(FakeEvent):
        def record(self, stream: FakeStream) -> None:
            super().record(stream)
            streams.launch(Lane.D2H, lambda: None, reads=waiting)
            waiting.clear()

    cast(Any, torch.cuda).Event = Overtaken
    first = recorded(streams, Lane.D2H)
    cast(Any, torch.cuda).Event = FakeEvent
    second = recorded(streams, Lane.D2H)
    first.happened = True
    streams.record(Lane.H2D)
    gc.collect()
    assert alive() is not None
    second.happened = True
    streams.record(Lane.H2D)
    gc.collect()
    assert alive() is None


def test_a_capture_is_refused_before_it_is_spoiled(cuda: FakeCuda) -> None:
    streams = CudaStreams(DEVICE)
    event = streams.record(Lane.D2H)
    cuda.captures = True
    with cuda.stream(FakeStream(name="captured")):
        for use in (streams.record, lambda lane: streams.launch(lane, lambda: None)):
            with pytest.raises(RuntimeError, match="CUDA graph is being captured"):
                use(Lane.COMPUTE)
        assert cuda.current.waits == []
    with pytest.raises(RuntimeError, match="CUDA graph is being captured"):
        streams.wait(Lane.COMPUTE, event)


class DuringCapture(FakeEvent):
    """An event of which CUDA rejects the first two queries with the error `reason`."""

    reason = "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors ..."

    def __init__(self, blocking: bool = False) -> None:
        super().__init__(blocking)
        self.num_refused = 2

    def _refuse(self) -> None:
        if self.num_refused > 0:
            self.num_refused -= 1
            raise torch.AcceleratorError(self.reason)

    def query(self) -> bool:
        self._refuse()
        return True

    def synchronize(self) -> None:
        self._refuse()
        super().synchronize()


def test_updates_outlast_a_capture_and_their_user_is_told(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DuringCapture)
    monkeypatch.setattr(CudaEvent, "_has_warned", False)
    streams = CudaStreams(DEVICE)
    event = streams.record(Lane.D2H)
    assert [event.query(), event.query(), event.query()] == [False, False, True]
    event = streams.record(Lane.H2D)
    event.synchronize()
    assert cast(Any, event).event.happened
    (record,) = caplog.records
    assert "Call synchronize() on the optimizer before the capture" in record.getMessage()


def test_who_captures_does_not_wait_for_its_own_capture(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DuringCapture)
    event = CudaStreams(DEVICE).record(Lane.D2H)
    cuda.captures = True
    for use in (event.query, event.synchronize):
        with pytest.raises(RuntimeError, match=r"Call synchronize\(\) on the optimizer before"):
            use()


def test_other_errors_of_events_are_raised(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DuringCapture)
    monkeypatch.setattr(DuringCapture, "reason", "CUDA error: an illegal memory access")
    event = CudaStreams(DEVICE).record(Lane.D2H)
    for use in (event.query, event.synchronize):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            use()


def test_nccl_is_never_waited_for_with_a_timeout() -> None:
    """NCCL would abort its communicator when the timeout ends."""
    asked: list[tuple[object, ...]] = []
    polls = iter([False, False, True])

    class Work:
        def is_completed(self) -> bool:
            return next(polls)

        def wait(self, *timeout: object) -> bool:
            asked.append(timeout)
            return True

    RankGroup(world_size=2).wait(cast(Any, Work()), on_device=True)
    assert asked == [()]


def test_a_collective_on_a_device_is_waited_for_by_its_lane_and_not_by_the_host(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []

    def issue(name: str) -> Any:
        def start(*_: Any, **__: Any) -> Any:
            done.append((name, cuda.current.name))
            return SimpleNamespace(wait=lambda: done.append((f"{name} waits", cuda.current.name)))

        return start

    monkeypatch.setattr(collectives, "reduce_scatter", issue("reduce-scatter"))
    monkeypatch.setattr(collectives, "all_gather", issue("all-gather"))
    monkeypatch.setattr(dist, "all_reduce", issue("all-reduce"))
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    members = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    monkeypatch.setattr(RankGroup, "data_group", lambda self, device: members)

    class OnDevice(torch.Tensor):
        """A host tensor whose `is_cuda` is True."""

        is_cuda = True

    ranks = RankGroup(rank=1, world_size=2)
    group = Collectives(ranks)
    streams = CudaStreams(DEVICE)
    buffer = torch.ones(8).as_subclass(OnDevice)
    reduced = group.mean(streams, buffer, (4, 8))
    gathered = group.gather(streams, buffer)
    whole = group.mean(streams, buffer, (0, 8))
    for pending in (reduced, gathered, whole):
        assert pending.is_completed()
        pending.wait(ranks)
    assert [name for name, _ in done] == [
        "reduce-scatter",
        "reduce-scatter waits",
        "all-gather",
        "all-gather waits",
        "all-reduce",
        "all-reduce waits",
    ]
    lanes = [stream for _, stream in done]
    assert lanes[0] == lanes[1] == lanes[4] == lanes[5] != lanes[2] == lanes[3]
    assert "the model's" not in lanes
    assert reduced.shard.numel() == 4
