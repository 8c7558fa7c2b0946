"""An update thread as slow as possible: a job runs only when a caller waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from offload_adam import OffloadAdam
from offload_adam.step.build import Backend
from tests.support.devices import HOST_AS_DEVICE
from tests.support.updates import run_on_worker


class LazyJob:
    """A job that does not begin before a caller waits for it."""

    def __init__(self, worker: LazyWorker, what: str, run: Callable[[], object]) -> None:
        self.what = what
        self.run = run
        self.worker = worker
        self.ended = False
        self.error: BaseException | None = None

    def is_over(self) -> bool:
        return self.ended

    def wait_until_begun(self, timeout_s: float) -> None:
        """Return at once: the job begins when a caller waits for it."""

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

    @classmethod
    def pair(cls) -> tuple[LazyWorker, LazyWorker]:
        """Return an update thread, also in `latest`, and a copy thread, also in `copying`."""
        latest.append(cls())
        copying.append(cls())
        return latest[-1], copying[-1]

    def submit(self, what: str, job: Callable[[], object]) -> LazyJob:
        given = LazyJob(self, what, job)
        self.waiting.append(given)
        return given

    def is_current(self) -> bool:
        return False

    def run_next(self) -> None:
        job = self.waiting.popleft()
        try:
            if self.failure is None:
                run_on_worker(job.run)
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
"""All update threads, in the order of their construction."""

copying: list[LazyWorker] = []
"""All copy threads, in the same order. They finish the updates."""


class Lazy(OffloadAdam):
    """An overlapped optimizer whose updates run only when a caller waits for them."""

    _backend = Backend(make_workers=LazyWorker.pair)


class LazyOffloading(Lazy):
    """Treats parameters in host memory like parameters on a device."""

    _backend = replace(HOST_AS_DEVICE, make_workers=LazyWorker.pair)
