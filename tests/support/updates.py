"""Updates that fail or take long, in the place of those of a bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.step.messages import Launches


def run_on_worker(job: Callable[[], object]) -> None:
    """Run a job on the calling thread as `UpdateThread` runs it on its own."""
    with torch.no_grad(), PROGRESS.untracked():
        job()


def running_first(prepare: Callable[..., Launches], action: Callable[[], None]) -> Any:
    """Return a `prepare` whose update runs `action` first, on the thread that launches kernels."""

    def changed(*arguments: Any, **keywords: Any) -> Launches:
        launches = prepare(*arguments, **keywords)
        first, *rest = launches.parts

        def run() -> None:
            action()
            first.run()

        return launches._replace(parts=[first._replace(run=run), *rest])

    return changed
