"""A simulated device for tests: parameters are in host memory, and threads run the lanes.

    lane                    runs
    COMPUTE                 at once, on the calling thread, as autograd does on a CPU
    D2H                     on its own thread, in the order of issue
    H2D                     on its own thread, in the order of issue
    REDUCE and GATHER       on one thread: all ranks must start collectives in the same order

So copies and collectives are asynchronous, as on a GPU. A backward never waits for a collective,
which may depend on a rank that runs no backward. Only COMPUTE blocks if it waits for another lane.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable

import torch

from offload_adam.layout.schedule import Lane
from offload_adam.step.build import Backend
from offload_adam.transfer.streams import Event
from tests.support.cuda_runtime import StandInRuntime

_THREADS = {Lane.D2H: "down", Lane.H2D: "up", Lane.REDUCE: "ranks", Lane.GATHER: "ranks"}

Job = Callable[[], object]


class NamedStream:
    """A stream that compares like torch.cuda.Stream: both `== None` and `!= None` are False."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedStream) and self.name == other.name

    def __ne__(self, other: object) -> bool:
        return isinstance(other, NamedStream) and self.name != other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


class ThreadEvent:
    """A point in the work of a lane's thread; re-raises an error of the work before it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self.error: BaseException | None = None

    def reach(self, error: BaseException | None) -> None:
        self.error = error
        self._reached.set()

    def query(self) -> bool:
        return self._reached.is_set()

    def synchronize(self) -> None:
        self._reached.wait()
        if self.error is not None:
            raise self.error


Jobs = queue.SimpleQueue[Job | ThreadEvent | None]


def _work(jobs: Jobs) -> None:
    error: BaseException | None = None
    while (job := jobs.get()) is not None:
        if isinstance(job, ThreadEvent):
            job.reach(error)
        elif error is None:
            try:
                with torch.no_grad():
                    job()
            except BaseException as raised:
                error = raised
        del job
    _LANES.running.pop(threading.current_thread(), None)


class _Lanes:
    """All lanes' threads, which must have ended before the interpreter is torn down.

    A thread that is in torch at that moment ends the process with an abort.
    """

    def __init__(self) -> None:
        self.running: dict[threading.Thread, Jobs] = {}
        # Finalizers run in reverse order at exit: those of optimizers, which are made later, still
        # need the lanes.
        weakref.finalize(self, _end_lanes, self.running)


def _end_lanes(running: dict[threading.Thread, Jobs]) -> None:
    for thread, jobs in list(running.items()):
        jobs.put(None)
        thread.join(10.0)


class ThreadStreams:
    """The lanes of a device, each a thread.

    Owns: the threads, until it is collected.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Jobs] = {}
        for name in dict.fromkeys(_THREADS.values()):
            jobs = self._jobs[name] = queue.SimpleQueue()
            lane = threading.Thread(target=_work, args=(jobs,), name=f"lane {name}", daemon=True)
            lane.start()
            _LANES.running[lane] = jobs
            # Not at exit: the update thread may still have copies to issue.
            weakref.finalize(self, jobs.put, None).atexit = False

    def current(self) -> Hashable:
        return NamedStream("compute")

    def is_capturing(self) -> bool:
        return False

    def reject_capture(self) -> None:
        pass

    def launch(
        self,
        lane: Lane,
        action: Job,
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        held = (*reads, *writes)

        def run(_: object = held) -> None:
            action()

        if lane is Lane.COMPUTE:
            action()
        else:
            self._jobs[_THREADS[lane]].put(run)

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        event = ThreadEvent()
        if lane in _THREADS:
            self._jobs[_THREADS[lane]].put(event)
        else:
            event.reach(None)
        return event

    def wait(self, lane: Lane, event: Event) -> None:
        if lane in _THREADS:
            self._jobs[_THREADS[lane]].put(event.synchronize)
        else:
            event.synchronize()


_LANES = _Lanes()

HOST_AS_DEVICE = Backend(
    is_device=lambda _: True,
    make_runtime=StandInRuntime,
    make_streams=lambda _: ThreadStreams(),
)
"""All paths of parameters on a GPU."""
