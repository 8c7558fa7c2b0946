"""The name of the CPU, for reports and for measurements that are valid on one machine alone."""

from __future__ import annotations

import platform
from contextlib import suppress


def cpu_model() -> str:
    """Return the name of the CPU as /proc/cpuinfo has it, else the kind of machine."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
