"""A thread that samples the memory of the process, the node and the devices."""

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
"""Share of the time that may be spent on reading the USS."""
_CGROUP_FILES = (
    Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class MemorySampler:
    """Writes `memory.jsonl` while its context is entered: one JSON object a sample, in bytes.

    Keys of a sample:
        time_ns: `time.perf_counter_ns()`.
        rss: resident memory of this process, shared memory included.
        uss: the part that no other process shares. Reading it walks all pages, so few samples
            have it.
        available: of the node. cgroup: charged to the container, if there is one.
        device_allocated, device_reserved: of torch on all visible GPUs, if CUDA is initialized.
        ledger: bytes by category.

    Owns: a thread and an open file, until its context is left.
    """

    def __init__(self, path: Path, ledger: Ledger, *, interval_s: float) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._ledger = ledger
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._process = psutil.Process()
        self._cgroup = next((path for path in _CGROUP_FILES if path.is_file()), None)
        self._next_uss_s = 0.0
        self.busy_s = 0.0

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        """Sample until stopped, and once more with the USS; an error ends only the sampling."""
        try:
            while not self._stop.wait(self._interval_s):
                self._write()
            self._next_uss_s = 0.0
            self._write()
        except Exception:
            logger.exception("Sampling of the memory failed and is off from now on")

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
            # By index: the current device of this thread is GPU 0, which may be another rank's.
            gpus = range(torch.cuda.device_count())
            sample["device_allocated"] = sum(map(torch.cuda.memory_allocated, gpus))
            sample["device_reserved"] = sum(map(torch.cuda.memory_reserved, gpus))
        sample["ledger"] = dict(self._ledger())
        return sample
