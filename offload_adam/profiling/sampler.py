"""A thread that notes at a set rate how much memory the process, the node and the device use."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

Ledger = Callable[[], Mapping[str, int]]

_USS_SHARE = 0.002
"""Of the time, spent on reading the USS."""
_CGROUP_FILES = (
    Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class MemorySampler:
    """Writes `memory.jsonl` while it runs: one JSON object a sample, bytes and seconds.

    Each has `time_ns` (`perf_counter_ns`), `rss` (with shared memory), `available` (the node's),
    `cgroup` (what the container is charged with), `device_allocated` and `device_reserved` on all
    GPUs of this process where there is CUDA, and the ledger's bytes by category under `ledger`.
    Some have `uss`, this process's own: reading it walks all pages, so it is read as rarely as it
    is slow.

    Owns: a thread and an open file, until it is left as a context.
    """

    def __init__(self, path: Path, ledger: Ledger, *, interval_s: float) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._ledger = ledger
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._process = psutil.Process()
        self._cgroup = next((path for path in _CGROUP_FILES if path.is_file()), None)
        self._next_uss_s = 0.0
        self.busy_s = 0.0

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        """Sample until told to stop, and once more at the end; a failure ends the samples only."""
        try:
            while not self._over.wait(self._interval_s):
                self._write()
            self._next_uss_s = 0.0
            self._write()
        except Exception:
            logger.exception("memory is no longer sampled; training goes on")

    def _write(self) -> None:
        start_s = time.thread_time()
        self._file.write(json.dumps(self._sample()) + "\n")
        self._file.flush()
        self.busy_s += time.thread_time() - start_s

    def _sample(self) -> dict[str, Any]:
        sample: dict[str, Any] = {
            "time_ns": time.perf_counter_ns(),
            "rss": self._process.memory_info().rss,
            "available": psutil.virtual_memory().available,
        }
        start_s = time.monotonic()
        if start_s >= self._next_uss_s:
            sample["uss"] = self._process.memory_full_info().uss
            end_s = time.monotonic()
            self._next_uss_s = end_s + (end_s - start_s) / _USS_SHARE
        if self._cgroup is not None:
            sample["cgroup"] = int(self._cgroup.read_text())
        if torch.cuda.is_initialized():
            # By index, because the current device of this thread is GPU 0: perhaps another rank's.
            gpus = range(torch.cuda.device_count())
            sample["device_allocated"] = sum(map(torch.cuda.memory_allocated, gpus))
            sample["device_reserved"] = sum(map(torch.cuda.memory_reserved, gpus))
        sample["ledger"] = dict(self._ledger())
        return sample
