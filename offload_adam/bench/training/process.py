"""Measure one contender in its own process, so that its memory and threads end with it."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import queue
import time
from dataclasses import replace
from typing import Any

from offload_adam.bench.training.contenders import PACKAGES
from offload_adam.bench.training.measure import Measured, Task, measure

logger = logging.getLogger(__name__)

START_METHOD = "spawn"  # a forked process cannot use CUDA
_POLL_S = 1.0
_EXIT_S = 10.0
_DONE = None


def in_own_process(task: Task) -> Measured:
    """Carry out a task in a spawned process, within its time limit.

    If the process fails or hangs, return the batches measured so far, and the reason for each batch
    that is missing.
    """
    package = PACKAGES.get(task.contender)
    if package is not None and importlib.util.find_spec(package) is None:
        # Without this check, a process would take seconds to find the same.
        return Measured(unavailable=f"{package} is not installed")
    context: Any = multiprocessing.get_context(START_METHOD)
    answers: Any = context.Queue()
    process = context.Process(target=_answer, args=(task, answers), daemon=True)
    process.start()
    try:
        found, failure = _collect(answers, process, task.time_limit_s)
        if failure is None:
            process.join(timeout=_EXIT_S)
            return found
    finally:
        process.kill()
        process.join()
    logger.warning("Failed to measure %s: %s", task.contender, failure)
    missing = [batch for batch in task.batches if batch not in found.steps]
    return replace(found, reasons={**dict.fromkeys(missing, failure), **found.reasons})


def _collect(answers: Any, process: Any, time_limit_s: float) -> tuple[Measured, str | None]:
    """Return the last results of the process, and the reason if it did not finish."""
    found = Measured()
    end_s = time.monotonic() + time_limit_s
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            answer = answers.get(timeout=min(_POLL_S, left_s))
        except queue.Empty:
            if not process.is_alive() and answers.empty():
                return found, f"its process ended with {process.exitcode}"
            continue
        if answer is _DONE:
            return found, None
        if isinstance(answer, str):
            return found, answer
        found = answer
    return found, f"it did not end within {time_limit_s:.0f} s"


def _answer(task: Task, answers: Any) -> None:
    """Put the results into the queue after each batch, then _DONE or the text of an error."""
    try:
        answers.put(measure(task, answers.put))
        answers.put(_DONE)
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        answers.put(f"{type(error).__name__}: {first}")
