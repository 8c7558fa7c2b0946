"""The cores and threads that a rank may use, and the threading layer that Numba runs them on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_owner_pid: int | None = None


def allowed_cores(pid: int = 0) -> int:
    """Return the number of cores that a process may use: its affinity mask, bounded by the cgroup.

    Args:
        pid: 0 for this process. A process that has ended counts as one core.
    """
    try:
        cores = len(os.sched_getaffinity(pid))
    except ProcessLookupError:
        cores = 1
    except AttributeError:  # not on every platform
        cores = os.cpu_count() or 1
    quota = cgroup_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cores_per_rank(local_world_size: int | None = None) -> int:
    """Return the cores of this process's share of the node, at least 1.

    torchrun exports OMP_NUM_THREADS=1, and Numba would use every core for every rank. Both are
    wrong, so both are ignored. If torchrun bound each rank to a part of the node, the ranks share
    the cores of the agent, and no rank gets more than its own part.

    Args:
        local_world_size: ranks on this node; None means LOCAL_WORLD_SIZE, or 1 if it is unset.
    """
    if local_world_size is None:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = allowed_cores()
    shared = own
    if "TORCHELASTIC_RUN_ID" in os.environ:
        shared = max(own, allowed_cores(os.getppid()))
    return max(1, min(own, shared // max(1, local_world_size)))


def threads_per_rank(local_world_size: int | None = None, *, on_device: bool) -> int:
    """Return the threads of this rank's kernels where none are given, at least 1.

    There is one for each of its cores. With parameters on a device one core stays free for the
    training thread, which launches the device's work during the updates. If it shared a core with a
    kernel, launches would be late, and the kernel's other threads would wait for the slowed one.

    Args:
        local_world_size: as for `cores_per_rank`.
        on_device: some parameters are on a device.
    """
    return max(1, cores_per_rank(local_world_size) - int(on_device))


def threads_per_node(local_world_size: int, *, on_device: bool) -> int:
    """Return the threads of all local ranks' kernels, as far as this process alone may run them."""
    of_rank = threads_per_rank(local_world_size, on_device=on_device)
    return min(allowed_cores(), local_world_size * of_rank)


def cgroup_cores(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Return the CPU quota of this process's cgroup (version 1 or 2) in cores, None for no limit.

    The smallest quota on the path from the cgroup to the root applies. In a container the root is
    often the cgroup itself, and the path exists only on the host.
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


def spans_nodes(nodes: Path = Path("/sys/devices/system/node")) -> bool:
    """Return whether this process's threads may run on the cores of more than one NUMA node.

    Otherwise a page is near to all of them, whichever thread writes to it first.
    """
    try:
        own = os.sched_getaffinity(0)
    except AttributeError:  # not on every platform
        return False
    cores = [_cores(folder / "cpulist") for folder in nodes.glob("node[0-9]*")]
    return sum(bool(own & of_node) for of_node in cores) > 1


def _cores(cpulist: Path) -> set[int]:
    """Return the cores of a list such as `0-3,8-11`."""
    cores: set[int] = set()
    for part in filter(None, _read(cpulist).strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def select_threading_layer() -> str:
    """Start Numba's threads and return the name of the threading layer that they run on.

    OpenMP comes first, because it accepts launches from several threads. `workqueue` is part of
    Numba and always works, but aborts the process on a second concurrent launch: hence the warning.
    A layer or an order set by the user is kept, and so is a layer that already runs.

    Raises:
        ValueError: no layer that the user has set can be loaded.
    """
    import numba

    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    # Numba loads a layer at its first launch, or at this call.
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


def plan_threads(num_threads: int | None, *, on_device: bool = False) -> int:
    """Return the number of threads for this rank's kernels and log it with the threading layer.

    Args:
        num_threads: the user's choice; None for `threads_per_rank`.
        on_device: some parameters are on a device.

    Raises:
        RuntimeError: in a child forked from a process that has planned its own threads.
    """
    import numba

    global _owner_pid
    _reject_forked_child()
    _owner_pid = os.getpid()
    layer = select_threading_layer()
    threads = threads_per_rank(on_device=on_device) if num_threads is None else num_threads
    if threads > numba.config.NUMBA_NUM_THREADS:
        warnings.warn(
            f"num_threads={threads} is more than the {numba.config.NUMBA_NUM_THREADS} that Numba "
            "was started with, so fewer threads share the work. Raise NUMBA_NUM_THREADS",
            RuntimeWarning,
            stacklevel=2,
        )
    logger.info("kernels use %d thread(s) on the %s threading layer", threads, layer)
    return threads


def use_threads(num_threads: int) -> None:
    """Set the number of threads for the calling thread's next launches.

    Raises:
        RuntimeError: in a forked child.
    """
    import numba

    _reject_forked_child()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))


def _reject_forked_child() -> None:
    """Raise in a forked child: it lacks OpenMP's threads, and a launch would end the process."""
    if _owner_pid is not None and _owner_pid != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had an optimizer: kernels cannot run in it. "
            "Use the 'spawn' start method for processes that train"
        )
