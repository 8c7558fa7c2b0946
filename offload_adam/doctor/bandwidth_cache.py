"""The bandwidths that were measured on this machine, kept in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offload_adam.kernels.threads import allowed_cores
from offload_adam.layout.ring import RingSpeed

logger = logging.getLogger(__name__)

FILE_NAME = "bandwidth.json"


def cache_folder() -> Path:
    """Return this package's folder below XDG_CACHE_HOME, or below ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "offload_adam"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which ranks a network was measured with; it is that of no others.

    backend: of torch's collectives. device: the type of the device that buckets lie on.
    """

    world_size: int
    local_world_size: int
    backend: str
    device: str

    @property
    def num_nodes(self) -> int:
        """How many nodes they are on."""
        return self.world_size // self.local_world_size

    def __str__(self) -> str:
        return (
            f"{self.world_size} ranks on {self.num_nodes} node(s), {self.backend} on {self.device}"
        )


def ranks_like(world_size: int, local_world_size: int, device: str) -> Ranks:
    """Return the ranks of a world with the backend that training uses there."""
    return Ranks(world_size, local_world_size, "nccl" if device == "cuda" else "gloo", device)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was measured, in 1e9 bytes a second.

    memory: by number of threads; empty where it is not known.
    step: what a whole step of the optimizer gets with the threads of all of a node's ranks, None
        where it is not known.
    network: of the ranks that it was measured with.
    bus: the slowest GPU's copies in their slower direction, None where it is not known.
    """

    memory: Mapping[int, float] = field(default_factory=dict)
    step: float | None = None
    network: Mapping[Ranks, RingSpeed] = field(default_factory=dict)
    bus: float | None = None

    def updated(self, newer: Bandwidth) -> Bandwidth:
        """Return it with all that is known of a newer one."""
        return Bandwidth(
            newer.memory or self.memory,
            self.step if newer.step is None else newer.step,
            {**self.network, **newer.network},
            self.bus if newer.bus is None else newer.bus,
        )


def keep(bandwidth: Bandwidth) -> Path | None:
    """Write what was measured for later runs, and leave what was not as it is kept.

    Returns the file, None where it cannot be written.
    """
    known = recall().updated(bandwidth)
    values = {
        "machine": _machine(),
        "memory_gb_per_s": {str(threads): value for threads, value in known.memory.items()},
        "step_gb_per_s": known.step,
        "bus_gb_per_s": known.bus,
        "network_gb_per_s": [
            {**asdict(ranks), **asdict(speed)} for ranks, speed in known.network.items()
        ],
    }
    # Path.home() has no answer for a user without an entry and without HOME.
    try:
        path = cache_folder() / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{FILE_NAME}.{os.getpid()}")
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        logger.warning("the measured bandwidth cannot be kept: %s", error)
        return None
    return path


def recall() -> Bandwidth:
    """Return what was kept; nothing is known where it is of another machine."""
    try:
        text = (cache_folder() / FILE_NAME).read_text(encoding="utf-8")
        values: Any = json.loads(text)
        if values["machine"] != _machine():
            return Bandwidth()
        memory = {int(count): float(value) for count, value in values["memory_gb_per_s"].items()}
        step = _number(values["step_gb_per_s"])
        # Files of earlier versions have neither of these.
        bus = _number(values.get("bus_gb_per_s"))
        network = dict(map(_network, values.get("network_gb_per_s", ())))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.debug("no bandwidth was kept: %s", error)
        return Bandwidth()
    return Bandwidth(
        {count: value for count, value in memory.items() if count > 0 and _possible(value)},
        step if _possible(step) else None,
        {
            ranks: speed
            for ranks, speed in network.items()
            if all(map(_possible, asdict(speed).values()))
        },
        bus if _possible(bus) else None,
    )


def _network(entry: Mapping[str, Any]) -> tuple[Ranks, RingSpeed]:
    ranks = Ranks(
        int(entry["world_size"]),
        int(entry["local_world_size"]),
        str(entry["backend"]),
        str(entry["device"]),
    )
    speeds = (float(entry[name]) for name in ("mean_16bit", "mean_32bit", "gather"))
    return ranks, RingSpeed(*speeds)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _possible(gb_per_s: float | None) -> bool:
    return gb_per_s is not None and 0 < gb_per_s < 1e9


def _machine() -> dict[str, Any]:
    """Return what must be the same for a measurement to hold."""
    return {
        "host": platform.node(),
        "architecture": platform.machine(),
        "allowed_cores": allowed_cores(),
    }
