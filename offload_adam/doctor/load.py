"""The load of other processes on this process's cores, while something is measured."""

from __future__ import annotations

import os
import time

import psutil


class OtherProcesses:
    """Counts the cores that other processes use, from construction on.

    The load average would not do: it lags by a minute, and counts this process, too. Time that a
    hypervisor gives to other machines counts as used by others.
    """

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._start_s = self._read()

    def cores(self) -> float:
        """Return the mean number of this process's cores that other processes have used."""
        busy_s, own_s, now_s = self._read()
        others_s = busy_s - self._busy_s - (own_s - self._own_s)
        return max(0.0, others_s / max(now_s - self._start_s, 1e-3))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Return the busy seconds of the allowed cores, those of this process, and the time."""
        cores = psutil.cpu_times(percpu=True)
        busy_s = 0.0
        for core in os.sched_getaffinity(0):
            if core < len(cores):
                times = cores[core]
                # Linux counts guests in `user` already.
                busy_s += times.user + times.nice + times.system + times.irq + times.softirq
                busy_s += times.steal
        return busy_s, time.process_time(), time.perf_counter()
