"""The cores and threads that a rank may use, and the threading layer that Numba runs them on."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from offload_adam.coordinator.launcher import launched, whole_number
from offload_adam.errors import warn_user
from offload_adam.printable import show

logger = logging.getLogger(__name__)

# Pid of the process that called `plan_threads`. A forked child inherits this value, but has another
# pid.
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

    torchrun exports OMP_NUM_THREADS=1, and Numba's default is all cores for every rank. Both are
    wrong for several ranks, so both are ignored.

    Args:
        local_world_size: ranks on this node; None means that of the launcher.
    """
    if local_world_size is None:
        local_world_size = launched("LOCAL_WORLD_SIZE")
    own = allowed_cores()
    shared = own
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # If torchrun bound each rank to a part of the node, the agent's mask covers all ranks.
        shared = max(own, allowed_cores(os.getppid()))
    return max(1, min(own, shared // max(1, local_world_size)))


def threads_per_rank(local_world_size: int | None = None, *, on_device: bool) -> int:
    """Return the default number of threads for this rank's kernels, at least 1.

    The default is one for each of the rank's cores. With parameters on a device, one core stays
    free for the training thread, which launches the device's work during the updates. On a shared
    core, launches would be late, and the kernel's other threads would wait for the thread on this
    core.

    Args:
        local_world_size: as for `cores_per_rank`.
        on_device: some parameters are on a device.
    """
    return max(1, cores_per_rank(local_world_size) - int(on_device))


def threads_per_node(local_world_size: int, *, on_device: bool) -> int:
    """Return the threads of all local ranks' kernels, at most this process's cores."""
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
    quota_us = int(_read(folder / "cpu.cfs_quota_us") or -1)  # -1: no limit
    period_us = int(_read(folder / "cpu.cfs_period_us") or 0)
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def spans_nodes(nodes: Path = Path("/sys/devices/system/node")) -> bool:
    """Return whether this process may run on the cores of more than one NUMA node.

    If not, it does not matter which thread writes to a page first.
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


class ThreadSettingsError(ValueError):
    """Numba cannot start its threads as set in the environment; the message names the variables."""


def require_number_of_threads() -> None:
    """Check NUMBA_NUM_THREADS, without an import of Numba, which only warns about some mistakes.

    Raises:
        ThreadSettingsError: it is not a number of at least 1.
    """
    text = os.environ.get("NUMBA_NUM_THREADS", "1")
    if not whole_number(text):
        raise ThreadSettingsError(
            f"NUMBA_NUM_THREADS={show(text)} must be a whole number of at least 1. Correct or "
            "unset this variable."
        )


def select_threading_layer() -> str:
    """Start Numba's threads and return the name of the threading layer that they run on.

    The user's NUMBA_THREADING_LAYER or NUMBA_THREADING_LAYER_PRIORITY takes precedence, as does a
    layer that already runs. Warns if only `workqueue` is available.

    Raises:
        ThreadSettingsError: no layer that the user has set can be loaded.
    """
    import numba

    require_number_of_threads()

    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        # OpenMP first, because it accepts launches from several threads. `workqueue` is part of
        # Numba, but aborts the process if two threads launch kernels at the same time.
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    try:
        numba.get_num_threads()  # loads the layer, as the first launch would
    except ValueError as error:
        names = ("NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY")
        given = [f"{name}={show(os.environ[name])}" for name in names if name in os.environ]
        raise ThreadSettingsError(
            f"Numba cannot start its threads with {' and '.join(given) or 'the default layer'}: "
            f"{' '.join(str(error).split())} Unset the variable, or install the layer."
        ) from error
    layer = str(numba.threading_layer())
    if layer == "workqueue":
        warn_user(
            "Only Numba's workqueue threading layer is available. The process aborts if another "
            "thread runs a parallel Numba function while the optimizer steps. Install an OpenMP "
            "runtime (libgomp) to prevent this.",
            RuntimeWarning,
        )
    return layer


def plan_threads(num_threads: int | None, *, on_device: bool = False) -> int:
    """Return the number of threads for this rank's kernels and log it with the threading layer.

    Args:
        num_threads: as set by the user; None for `threads_per_rank`.
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
        warn_user(
            f"num_threads={threads} is more than the {numba.config.NUMBA_NUM_THREADS} threads of "
            "Numba, so fewer threads share the work. Increase NUMBA_NUM_THREADS.",
            RuntimeWarning,
        )
    logger.info("Running kernels with %d thread(s) on the %s threading layer", threads, layer)
    return threads


class _Launching(threading.local):
    """What this package knows of the calling thread.

    is_ours: no other code runs on it.
    num_threads: set by the last `use_threads`.
    """

    is_ours = False
    num_threads = 0


_this_thread = _Launching()


def claim_thread() -> None:
    """Declare that no other code sets the number of threads of the calling thread."""
    _this_thread.is_ours = True


def use_threads(num_threads: int) -> None:
    """Set the number of threads for later launches by the calling thread.

    Raises:
        RuntimeError: in a forked child.
    """
    if _this_thread.is_ours and _this_thread.num_threads == num_threads:
        # Numba would release the interpreter lock. Another thread may then keep it for 5 ms, as
        # long as a kernel takes.
        return
    import numba

    _reject_forked_child()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    _this_thread.num_threads = num_threads


def _reject_forked_child() -> None:
    """Raise an error in a forked child."""
    # fork copies only the calling thread. A launch on OpenMP's missing threads ends the process.
    if _owner_pid is not None and _owner_pid != os.getpid():
        raise RuntimeError(
            "This process was forked from a process with an optimizer, so kernels cannot run in "
            "it. Use the 'spawn' start method for processes that train."
        )
