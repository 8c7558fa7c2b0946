"""How many threads a rank may use, and which threading layer Numba runs them on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_owner_pid: int | None = None


def allowed_cores(pid: int = 0) -> int:
    """Return how many cores a process may use: affinity mask, bounded by this cgroup's quota.

    Args:
        pid: 0 for this process; one that has ended counts as allowed a single core.
    """
    try:
        cores = len(os.sched_getaffinity(pid))
    except ProcessLookupError:
        cores = 1
    except AttributeError:  # not on every platform
        cores = os.cpu_count() or 1
    quota = cgroup_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def threads_per_rank(local_world_size: int | None = None) -> int:
    """Return the cores of this process's share of the node, at least 1.

    torchrun exports OMP_NUM_THREADS=1 and Numba would take every core for every rank; both are
    wrong, so neither is asked. Where torchrun has bound each rank to a part of the node, the ranks
    share all that the agent itself may use, and none gets more than its own part.

    Args:
        local_world_size: ranks on this node; LOCAL_WORLD_SIZE, or 1, where None.
    """
    if local_world_size is None:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = allowed_cores()
    shared = own
    if "TORCHELASTIC_RUN_ID" in os.environ:
        shared = max(own, allowed_cores(os.getppid()))
    return max(1, min(own, shared // max(1, local_world_size)))


def cgroup_cores(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Return the CPU quota of this process's cgroup (version 1 or 2) in cores, None for no limit.

    The tightest quota on the way from the cgroup up to the root holds. In a container the root is
    often the cgroup itself, under a path that only the host can see.
    """
    quotas: list[float] = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += filter(None, map(_quota_v2, _ancestry(root, path)))
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu"):
                quotas += filter(None, map(_quota_v1, _ancestry(mount, path)))
    return min(quotas, default=None)


def _ancestry(root: Path, path: str) -> Iterator[Path]:
    """Yield the folder of a cgroup and those of all its ancestors, up to the root."""
    folder = root / path.lstrip("/")
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder


def _quota_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota_us = int(_read(folder / "cpu.cfs_quota_us") or -1)
    period_us = int(_read(folder / "cpu.cfs_period_us") or 0)
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def select_threading_layer() -> str:
    """Start Numba's threads and return the name of the threading layer that they run on.

    OpenMP first: it takes launches from several threads. `workqueue`, which comes with Numba and
    always works, aborts the process on a second concurrent launch, so its use is a warning. A layer
    or an order that the user has set, or a layer that is already running, is kept.

    Raises:
        ValueError: when none of the layers that the user has set can be loaded.
    """
    import numba

    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    # Numba loads a layer with its first launch, or when it is asked this.
    numba.get_num_threads()
    layer = str(numba.threading_layer())
    if layer == "workqueue":
        warnings.warn(
            "only Numba's workqueue threading layer is available: no second thread of this process "
            "may run a parallel Numba function while the optimizer steps, or the process aborts. "
            "Install an OpenMP runtime (libgomp) to lift this",
            RuntimeWarning,
            stacklevel=2,
        )
    return layer


def plan_threads(num_threads: int | None) -> int:
    """Return the number of threads for this rank's kernels and log it with the threading layer.

    Args:
        num_threads: what the user asked for; None for this rank's share of the allowed cores.

    Raises:
        RuntimeError: in a child forked from a process that has planned its own threads.
    """
    import numba

    global _owner_pid
    _refuse_forked_child()
    _owner_pid = os.getpid()
    layer = select_threading_layer()
    threads = threads_per_rank() if num_threads is None else num_threads
    if threads > numba.config.NUMBA_NUM_THREADS:
        warnings.warn(
            f"num_threads={threads} is more than the {numba.config.NUMBA_NUM_THREADS} that Numba "
            "was started with: the work is cut for it and shared by those",
            RuntimeWarning,
            stacklevel=2,
        )
    logger.info("kernels use %d thread(s) on the %s threading layer", threads, layer)
    return threads


def use_threads(num_threads: int) -> None:
    """Set the calling thread's mask for the launches that follow.

    Raises:
        RuntimeError: in a forked child.
    """
    import numba

    _refuse_forked_child()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))


def _refuse_forked_child() -> None:
    """Raise where OpenMP's threads do not exist and a launch would end the process."""
    if _owner_pid is not None and _owner_pid != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had an optimizer: kernels cannot run in it. "
            "Use the 'spawn' start method for processes that train"
        )
