"""Describe the machine, for the reports: a time means nothing without it."""

from __future__ import annotations

import logging
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import psutil
import torch

from offload_adam.kernels import threads
from offload_adam.processor import cpu_model
from offload_adam.profiling.environment import commit_of
from offload_adam.units import format_nbytes
from offload_adam.version import __version__

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "numba", "numpy", "deepspeed")
_BUSY_LOAD_PER_CORE = 0.25


def describe_machine(num_threads: int) -> dict[str, Any]:
    """Return the machine as a JSON object, and warn if other processes are using it."""
    cores = threads.allowed_cores()
    load = os.getloadavg()
    busy = load[0] > _BUSY_LOAD_PER_CORE * cores
    if busy:
        logger.warning(
            "The machine is busy (load average %.2f on %d cores). Times will be too long and "
            "ratios uncertain.",
            load[0],
            cores,
        )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(Path(__file__).parents[2]),
        "cpu": cpu_model(),
        "cores_allowed": cores,
        "num_threads": num_threads,
        "threading_layer": str(numba.threading_layer()),
        "memory": format_nbytes(psutil.virtual_memory().total),
        "transparent_hugepage": _transparent_hugepage(),
        "load_average": list(load),
        "busy": busy,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _commit(folder: Path) -> str | None:
    """Return the commit of a checkout, with a `+` if tracked files differ from the commit.

    Without `.git`, return the environment variable BENCH_COMMIT.
    """
    if not (folder / ".git").exists():
        return os.environ.get("BENCH_COMMIT")
    return commit_of(folder) or None


def _transparent_hugepage() -> str | None:
    """Return the kernel's setting, None without one. /sys shows it as `always [madvise] never`."""
    try:
        path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        text = path.read_text(encoding="ascii")
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or text.strip()


def _versions() -> dict[str, str]:
    versions = {"offload_adam": __version__}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
