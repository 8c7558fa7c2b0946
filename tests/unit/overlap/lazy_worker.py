"""An update thread as slow as possible: a job runs only when a caller waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from offload_adam import OffloadAdam
from offload_adam.step.build import Backend
from tests.support.devices import HOST_AS_DEVICE


class LazyJob:
    """A job that does not begin before a caller waits for it."""

    def __init__(self, worker: LazyWorker, what: str, run: Callable[[], None]) -> None:
        self.what = what
        self.run = run
        self.worker = worker
        self.ended = False
        self.error: BaseException | None = None

    def is_over(self) -> bool:
        return self.ended

    def wait(self, timeout_s: float) -> bool:
        while not self.ended:
            self.worker.run_next()
        if self.error is not None:
            raise self.error
        return True


class LazyWorker:
    """Runs jobs only when a caller waits for them: a read without a wait always gets old values."""

    def __init__(self) -> None:
        self.waiting: deque[LazyJob] = deque()
        self.done: list[str] = []
        self.failure: BaseException | None = None
        latest.append(self)

    def submit(self, what: str, job: Callable[[], None]) -> LazyJob:
        given = LazyJob(self, what, job)
        self.waiting.append(given)
        return given

    def run_next(self) -> None:
        job = self.waiting.popleft()
        try:
            if self.failure is None:
                job.run()
        except BaseException as error:
            self.failure = error
        job.error = self.failure
        job.ended = True
        self.done.append(job.what)

    def close(self) -> bool:
        while self.waiting:
            self.run_next()
        return True


latest: list[LazyWorker] = []
"""All workers, in the order of their construction."""


class Lazy(OffloadAdam):
    """An overlapped optimizer whose updates run only when a caller waits for them."""

    _backend = Backend(make_worker=LazyWorker)


class LazyOffloading(Lazy):
    """Treats parameters in host memory like parameters on a device."""

    _backend = replace(HOST_AS_DEVICE, make_worker=LazyWorker)
