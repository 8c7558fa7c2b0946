"""Which of the node's memories this process's threads may be near to."""

from __future__ import annotations

import os
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def spans_nodes(nodes: Path = NODES) -> bool:
    """Tell whether this process's threads may run on the cores of more than one NUMA node.

    Where they may not, a page is near to all of them whichever touches it first.
    """
    try:
        own = os.sched_getaffinity(0)
    except AttributeError:  # not on every platform
        return False
    cores = [_cores(folder / "cpulist") for folder in nodes.glob("node[0-9]*")]
    return sum(bool(own & of_node) for of_node in cores) > 1


def _cores(cpulist: Path) -> set[int]:
    """Return the cores of a list such as `0-3,8-11`."""
    try:
        text = cpulist.read_text(encoding="ascii").strip()
    except OSError:
        return set()
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
