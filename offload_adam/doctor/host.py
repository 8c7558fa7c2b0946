"""Checks of this node: cores, Numba's threads and vectors, host memory, huge pages, NUMA nodes."""

from __future__ import annotations

import os
import platform
import re
import resource
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

import numba
import psutil

from offload_adam.coordinator.node_memory import available_memory
from offload_adam.doctor.finding import Finding
from offload_adam.kernels.threads import (
    allowed_cores,
    cgroup_cores,
    select_threading_layer,
    threads_per_rank,
)
from offload_adam.memory.arena import HostArena
from offload_adam.units import format_nbytes

HUGE_PAGE_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NUMA_NODES = Path("/sys/devices/system/node")
_REGISTER_BITS = {"zmm": 512, "ymm": 256, "xmm": 128}
_LEAST_AVAILABLE_SHARE = 0.1
_PROBE_NBYTES = 64 * 1024 * 1024


def core_findings(local_world_size: int, *, on_device: bool) -> Iterator[Finding]:
    """Yield the cores that this process may use, and the threads of each local rank."""
    mask, present = sorted(os.sched_getaffinity(0)), os.cpu_count() or 1
    yield Finding("affinity", f"may use {len(mask)} of {present} core(s): {ranges(mask)}")
    quota = cgroup_cores()
    if quota is None:
        yield Finding("CPU quota", "no cgroup limits the CPU time")
    else:
        found = f"the cgroup limits the CPU time to that of {quota:g} core(s)"
        advice = "raise the quota to 1 core or more: below that the kernel pauses every thread"
        yield Finding("CPU quota", found, advice if quota < 1.0 else "")
    num_threads = threads_per_rank(local_world_size, on_device=on_device)
    num_cores = allowed_cores()
    found = f"{local_world_size} rank(s) with {num_threads} thread(s) each on {num_cores} core(s)"
    advice = f"start at most {num_cores} rank(s) on this node"
    yield Finding("local ranks", found, advice if local_world_size > num_cores else "")
    limit = int(numba.config.NUMBA_NUM_THREADS)
    found = f"Numba has {limit} thread(s), and a rank uses {num_threads}"
    advice = f"unset NUMBA_NUM_THREADS, or set it to {num_threads} or more"
    yield Finding("Numba's threads", found, advice if limit < num_threads else "")


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ranges, such as '0-3,8'."""
    # In a run of consecutive numbers, number minus position is constant.
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(members) for _, members in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def threading_layer() -> Finding:
    """Return the threading layer that Numba selects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the finding below says it with advice
        layer = select_threading_layer()
    if layer == "workqueue":
        found = "workqueue: a second thread that runs a parallel Numba function aborts the process"
        advice = "install an OpenMP runtime: apt-get install libgomp1"
        return Finding("threading layer", found, advice)
    return Finding("threading layer", layer)


def vector_width() -> Finding:
    """Return the width of the vectors that Numba compiles loops to on this processor.

    The width is read from the assembly of a compiled loop: the compiler may choose narrower vectors
    than the processor has.
    """
    bits = widest_register(_compiled_loop())
    if bits is None:
        return Finding("vector width", f"unknown for {platform.machine()}")
    advice = "unset NUMBA_CPU_NAME and NUMBA_CPU_FEATURES; if unset, the processor has no AVX2"
    return Finding("vector width", f"{bits} bits", advice if bits < 256 else "")


def widest_register(assembly: str) -> int | None:
    """Return the bits of the widest x86 register that multiplies packed floats, None if none."""
    used = re.findall(r"\bv?mulps\b[^\n]*?%?([xyz]mm)\d", assembly)
    return max((_REGISTER_BITS[name] for name in used), default=None)


def _compiled_loop() -> str:
    def scale(values, factor):  # type: ignore[no-untyped-def]
        for i in range(values.size):
            values[i] = values[i] * factor

    signature = (numba.float32[::1], numba.float32)
    dispatcher = numba.njit(signature, error_model="numpy")(scale)
    return "\n".join(dispatcher.inspect_asm().values())


def available() -> Finding:
    """Return the memory available to a run, as limited by the machine or by a cgroup."""
    nbytes, limit = available_memory()
    total = int(psutil.virtual_memory().total)
    found = f"{format_nbytes(nbytes)} available ({limit}); the machine has {format_nbytes(total)}"
    advice = "stop other processes that use memory, or raise the cgroup's memory limit"
    is_little = nbytes < _LEAST_AVAILABLE_SHARE * total
    return Finding("host memory", found, advice if is_little else "")


def locked_limit(*, needed: bool) -> Finding:
    """Return the limit of locked memory.

    Args:
        needed: there is a CUDA device; without one, nothing is pinned.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    found, advice = f"limit (ulimit -l): {format_nbytes(limit)}", ""
    memory_nbytes, _ = available_memory()
    if not needed:
        found += "; nothing is pinned without CUDA"
    elif limit < memory_nbytes:
        found += f", less than the {format_nbytes(memory_nbytes)} of available memory"
        advice = "raise the limit: ulimit -l unlimited; in Docker: --ulimit memlock=-1"
    return Finding("locked memory", found, advice)


def huge_pages(setting: Path = HUGE_PAGE_SETTING) -> Finding:
    """Return the kernel's setting of huge pages, and the share of a test allocation in them."""
    try:
        text = setting.read_text(encoding="ascii")
    except OSError:
        found = "this kernel has no transparent huge pages"
        return Finding("huge pages", found, "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    chosen = text.partition("[")[2].partition("]")[0] or text.strip()
    found, advice = f"setting: {chosen}", ""
    share = granted_share()
    if share is not None:
        found += f"; {share:.0%} of a test allocation is in huge pages"
    if chosen == "never":
        advice = f"as root: echo madvise > {HUGE_PAGE_SETTING}"
    elif share is not None and share < 0.5:
        advice = "as root, compact the memory: echo 1 > /proc/sys/vm/compact_memory"
    return Finding("huge pages", found, advice)


def granted_share(smaps: Path = Path("/proc/self/smaps_rollup")) -> float | None:
    """Return the share of a new allocation that is in huge pages, None if the kernel hides it."""

    def huge_nbytes() -> int:
        found = re.search(r"AnonHugePages:\s*(\d+) kB", smaps.read_text(encoding="ascii"))
        return 1024 * int(found[1]) if found else 0

    try:
        before_nbytes = huge_nbytes()
        with closing(HostArena(_PROBE_NBYTES)):
            return (huge_nbytes() - before_nbytes) / _PROBE_NBYTES
    except OSError:
        return None


def numa(local_world_size: int, nodes: Path = NUMA_NODES) -> Finding:
    """Return the NUMA nodes, a warning if there are fewer ranks than nodes with cores."""
    folders = sorted(nodes.glob("node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    if len(folders) < 2:
        return Finding("NUMA", "one node: all memory is equally fast for every core")
    cores = {folder.name[4:]: (folder / "cpulist").read_text("ascii").strip() for folder in folders}
    found = "; ".join(f"node {name}: core(s) {own or 'none'}" for name, own in cores.items())
    num_with_cores = sum(map(bool, cores.values()))
    advice = f"start {num_with_cores} ranks or more, each bound: torchrun --numa-binding=node"
    return Finding("NUMA", found, advice if local_world_size < num_with_cores else "")
