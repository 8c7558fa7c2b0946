"""Check before allocation that the state of all ranks of a node fits into its memory."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from offload_adam.coordinator.progress import Process
from offload_adam.coordinator.rank_checks import gather_texts
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import HostMemoryError
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)

CGROUP_ROOT = Path("/sys/fs/cgroup")
# Version 1 of control groups reports "no limit" as about 2**63. No machine has 2**60 bytes.
_UNLIMITED_NBYTES = 1 << 60
_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class NodeNeed:
    """Memory that the ranks of one node need, and memory that is available there.

    nbytes: bytes by purpose, summed over the ranks of the node.
    limit: whose limit `available_nbytes` is, such as "of the machine".
    """

    host: str
    ranks: tuple[int, ...]
    nbytes: Mapping[str, int]
    available_nbytes: int
    limit: str

    @property
    def total_nbytes(self) -> int:
        """Sum of `nbytes`."""
        return sum(self.nbytes.values())

    def table(self) -> str:
        """Return a table: one line for each purpose, their sum, and the available memory."""
        rows = [*self.nbytes.items(), ("total", self.total_nbytes)]
        rows.append((f"available ({self.limit})", self.available_nbytes))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {format_nbytes(size):>10}" for name, size in rows)


def check_node_memory(
    ranks: RankGroup, nbytes: Mapping[str, int], *, allow_overcommit: bool
) -> None:
    """Raise an error on every rank if the state does not fit into some node's memory. Collective.

    Args:
        nbytes: bytes that this rank is about to allocate, by purpose.
        allow_overcommit: log a warning instead of raising.

    Raises:
        HostMemoryError: with the table of the first node that lacks memory.
    """
    needs = _needs(ranks, nbytes)
    lacking = [need for need in needs if need.total_nbytes > need.available_nbytes]
    if not lacking:
        return
    need = lacking[0]
    message = (
        f"The optimizer state of rank(s) {list(need.ranks)} does not fit into the memory of "
        f"{need.host}:\n{need.table()}\nUse more nodes, which share the state, or a smaller model. "
        "To allocate it nevertheless, set allow_overcommit=True (memory.allow_overcommit)."
    )
    if not allow_overcommit:
        raise HostMemoryError(message)
    if ranks.rank == 0:  # the needs were gathered, so all ranks name the same node
        logger.warning("%s", message)


@contextmanager
def reserved_memory(nbytes: int, what: str, *, allow_overcommit: bool) -> Iterator[None]:
    """Check that this rank's memory fits into the node, and allocate it in the body.

    For memory that is allocated where a collective is impossible. Ranks of one node check one after
    another, so that each sees what the ranks before it have allocated. If they cannot lock a file
    in the folder for temporary files, they check without a lock.

    Args:
        nbytes: bytes that the body maps and commits.
        what: what the memory is for, for the error message.
        allow_overcommit: log a warning instead of raising.

    Raises:
        HostMemoryError: less than `nbytes` are available.
    """
    name = f"offload_adam-{os.getuid()}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name, timeout=_LOCK_TIMEOUT_S)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except (OSError, NotImplementedError, Timeout) as error:
            logger.warning("Checking the memory of this node without a lock: %s", error)
        available_nbytes, limit = available_memory()
        if nbytes > available_nbytes:
            message = (
                f"The {what} need {format_nbytes(nbytes)} of host memory on this rank, but only "
                f"{format_nbytes(available_nbytes)} are available ({limit}). Run all but the last "
                "backward of a step inside no_sync(), or use more nodes. To allocate it "
                "nevertheless, set allow_overcommit=True (memory.allow_overcommit)."
            )
            if not allow_overcommit:
                raise HostMemoryError(message)
            logger.warning("%s", message)
        yield


def _needs(ranks: RankGroup, nbytes: Mapping[str, int]) -> list[NodeNeed]:
    """Gather every rank's needs and sum them by node, in the order of the nodes' first ranks.

    Collective.
    """
    process = Process.own()
    available_nbytes, limit = available_memory()
    own = json.dumps([process.machine, process.host, dict(nbytes), available_nbytes, limit])
    texts = gather_texts(ranks, own) if ranks.world_size > 1 else [own]
    nodes: dict[str, list[tuple[int, list[object]]]] = {}
    for rank, text in enumerate(texts):
        machine, *rest = json.loads(text)
        # By machine, not by host name: two containers may share a name and not their memory limit.
        nodes.setdefault(machine, []).append((ranks.global_ranks[rank], rest))
    return [_sum_of(members) for members in nodes.values()]


def _sum_of(members: Sequence[tuple[int, list[object]]]) -> NodeNeed:
    """Sum the needs of a node's ranks.

    Args:
        members: for each rank: the rank, and [host, bytes by purpose, available bytes, limit].
    """
    total: dict[str, int] = {}
    available: list[tuple[int, str]] = []
    for _, (_, nbytes, available_nbytes, limit) in members:
        assert isinstance(nbytes, dict)
        for name, size in nbytes.items():
            total[name] = total.get(name, 0) + size
        assert isinstance(available_nbytes, int)
        available.append((available_nbytes, str(limit)))
    # The minimum, because the ranks measure at different times and may be in different groups.
    smallest, limit = min(available)
    ranks = tuple(rank for rank, _ in members)
    return NodeNeed(str(members[0][1][0]), ranks, total, smallest, limit)


def available_memory() -> tuple[int, str]:
    """Return the bytes that this process can still allocate, and what sets that limit.

    The result is the minimum over the machine and this process's control groups, version 1 or 2.
    Page cache that the kernel can drop counts as available.
    """
    found = [(int(psutil.virtual_memory().available), "of the machine")]
    found += control_group_memory(CGROUP_ROOT, _own_groups())
    return min(found)


def control_group_memory(root: Path, groups: Mapping[str, str]) -> list[tuple[int, str]]:
    """Return (available bytes, limit) of this process's memory control group and its parents.

    Args:
        root: where the control groups are mounted.
        groups: path of this process's group by controller; the key "" is version 2.
    """
    found = []
    if "memory" in groups:
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        found += _available_in_parents(root / "memory", groups["memory"], files)
    if "" in groups:
        files = ("memory.max", "memory.current", "inactive_file")
        found += _available_in_parents(root, groups[""], files)
    return found


def _available_in_parents(
    root: Path, group: str, files: tuple[str, str, str]
) -> list[tuple[int, str]]:
    """Return (available bytes, limit) of a group and its parents, skipping those without a limit.

    Args:
        files: name of the limit's file, of the usage's file, and of the page cache's statistic.
    """
    limit_name, usage_name, cache_name = files
    folder = root / group.strip("/")
    if not folder.is_dir():
        folder = root  # a container sees its own group as the root
    found = []
    for level in [folder, *folder.parents]:
        limit, usage = _number(level / limit_name), _number(level / usage_name)
        if limit is not None and usage is not None and limit < _UNLIMITED_NBYTES:
            cache = _statistic(level / "memory.stat", cache_name)
            found.append((max(0, limit - usage + cache), f"control group, {limit_name}"))
        if level == root:
            break
    return found


def _own_groups() -> dict[str, str]:
    """Return the path of this process's control group by controller, "" for version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    groups: dict[str, str] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _number(path: Path) -> int | None:
    """Return the number in a file, None if it holds none (`max`) or cannot be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    """Return a value of a file with lines "name value", 0 if it is missing."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
