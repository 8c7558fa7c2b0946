"""The host memory that a run may take: how much, in which pages, on which NUMA nodes, pinned."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from offload_adam.coordinator.node_memory import available_memory
from offload_adam.doctor.finding import Finding, ok, warning
from offload_adam.memory.arena import HostArena
from offload_adam.units import format_nbytes

HUGE_PAGE_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NODES = Path("/sys/devices/system/node")
_LEAST_SHARE = 0.1
_PROBE_NBYTES = 64 * 1024 * 1024
_KIB = 1024


def available() -> Finding:
    """Return what is left for a run, of the machine or of a control group, version 1 or 2."""
    nbytes, limit = available_memory()
    total = int(psutil.virtual_memory().total)
    found = f"{format_nbytes(nbytes)} available ({limit}), of {format_nbytes(total)}"
    if nbytes < _LEAST_SHARE * total:
        return warning("host memory", found, "end what else takes it, or raise the group's limit")
    return ok("host memory", found)


def locked_limit(*, needed: bool) -> Finding:
    """Return the limit of locked memory; where there is no CUDA device, nothing is pinned."""
    topic = "locked memory"
    try:
        import resource
    except ImportError:  # not on every platform
        return ok(topic, "no limit is known")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok(topic, "unlimited")
    found = f"limit (ulimit -l): {format_nbytes(limit)}"
    if not needed:
        return ok(topic, f"{found}; nothing is pinned without CUDA")
    if limit < available_memory()[0]:
        return warning(
            topic,
            found,
            "ulimit -l unlimited; in Docker: --ulimit memlock=-1",
        )
    return ok(topic, found)


def huge_pages(setting: Path = HUGE_PAGE_SETTING) -> Finding:
    """Return whether state lies in huge pages: what the kernel is set to, and what it granted."""
    chosen = _chosen_word(setting)
    if chosen is None:
        return warning("huge pages", "this kernel has none", "use one with transparent huge pages")
    granted = granted_share()
    found = f"set to {chosen}"
    if granted is not None:
        found += f"; {granted:.0%} of a test allocation is in them"
    if chosen == "never":
        return warning("huge pages", found, f"as root: echo madvise > {HUGE_PAGE_SETTING}")
    if granted is not None and granted < 0.5:
        return warning(
            "huge pages",
            found,
            "as root, against fragments: echo 1 > /proc/sys/vm/compact_memory",
        )
    return ok("huge pages", found)


def _chosen_word(setting: Path) -> str | None:
    """Return the setting's word in brackets, None where there is no such file."""
    try:
        text = setting.read_text(encoding="ascii")
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or text.strip()


def granted_share() -> float | None:
    """Return the share of a fresh allocation that is in huge pages, None where it is not told."""
    arena = HostArena(_PROBE_NBYTES)
    address = arena.take(_PROBE_NBYTES, torch.uint8).data_ptr()
    try:
        text = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    nbytes = huge_nbytes(text, address)
    return None if nbytes is None else min(1.0, nbytes / _PROBE_NBYTES)


def huge_nbytes(smaps: str, address: int) -> int | None:
    """Return AnonHugePages of the mapping that holds an address, from the text of `smaps`."""
    inside = False
    for line in smaps.splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and first == "AnonHugePages:":
            return int(rest.split()[0]) * _KIB
    return None


def numa(local_world_size: int, nodes: Path = NODES) -> Finding:
    """Return the NUMA nodes, and whether one rank would reach over several."""
    folders = sorted(nodes.glob("node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    if len(folders) < 2:
        return ok("NUMA", "one node: all memory is equally near")
    cores = [_line(folder / "cpulist") for folder in folders]
    found = "; ".join(
        f"node {folder.name[4:]}: core(s) {own or 'none'}"
        for folder, own in zip(folders, cores, strict=True)
    )
    num_with_cores = sum(bool(own) for own in cores)
    if local_world_size < num_with_cores:
        return warning(
            "NUMA",
            found,
            f"start {num_with_cores} ranks or more, each bound: torchrun --numa-binding=node",
        )
    return ok("NUMA", found)


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
