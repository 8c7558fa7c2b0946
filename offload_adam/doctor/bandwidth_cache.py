"""The measured bandwidths of this machine, in a JSON file in the user's cache folder."""

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


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that a network speed was measured with. It is valid for no other ranks.

    backend: of the collectives. device: type of the device that holds the buckets.
    """

    world_size: int
    local_world_size: int
    backend: str
    device: str

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.world_size // self.local_world_size

    def __str__(self) -> str:
        return (
            f"{self.world_size} ranks on {self.num_nodes} node(s), {self.backend} on {self.device}"
        )


def ranks_like(world_size: int, local_world_size: int, device: str) -> Ranks:
    """Return ranks with the backend that training uses on this type of device."""
    return Ranks(world_size, local_world_size, "nccl" if device == "cuda" else "gloo", device)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Measured bandwidths in 1e9 bytes a second; empty or None where nothing was measured.

    memory: by number of threads.
    step: of an optimizer step with the threads of all ranks of a node.
    network: by the ranks that it was measured with.
    bus: of the slowest GPU's copies, in their slower direction.
    """

    memory: Mapping[int, float] = field(default_factory=dict)
    step: float | None = None
    network: Mapping[Ranks, RingSpeed] = field(default_factory=dict)
    bus: float | None = None

    def updated(self, newer: Bandwidth) -> Bandwidth:
        """Return a copy with the values that `newer` has."""
        return Bandwidth(
            newer.memory or self.memory,
            self.step if newer.step is None else newer.step,
            {**self.network, **newer.network},
            self.bus if newer.bus is None else newer.bus,
        )


def _path() -> Path:
    """Return the file's path, below XDG_CACHE_HOME or else below ~/.cache.

    Raises:
        RuntimeError: the user has neither a home folder nor HOME.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return base / "offload_adam" / "bandwidth.json"


def keep(bandwidth: Bandwidth) -> Path | None:
    """Update the file with what was measured, and leave its other values as they are.

    Returns:
        The file, or None, with a warning in the log, if it cannot be written.
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
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes may write at the same time: each renames its own file, and the last one wins.
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        logger.warning("Cannot save the measured bandwidth: %s", error)
        return None
    return path


def recall() -> Bandwidth:
    """Return the bandwidths in the file; none if it is missing, damaged or of another machine."""
    try:
        values: Any = json.loads(_path().read_text(encoding="utf-8"))
        if values["machine"] != _machine():
            return Bandwidth()
        memory = {int(count): float(value) for count, value in values["memory_gb_per_s"].items()}
        # Files of earlier versions have neither bus nor network.
        network = dict(map(_network_entry, values.get("network_gb_per_s", ())))
        return Bandwidth(
            {count: value for count, value in memory.items() if count > 0 and _is_possible(value)},
            _possible_or_none(values["step_gb_per_s"]),
            {
                ranks: speed
                for ranks, speed in network.items()
                if all(map(_is_possible, asdict(speed).values()))
            },
            _possible_or_none(values.get("bus_gb_per_s")),
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.debug("No measured bandwidth is known: %s", error)
        return Bandwidth()


def _network_entry(entry: Mapping[str, Any]) -> tuple[Ranks, RingSpeed]:
    sizes = int(entry["world_size"]), int(entry["local_world_size"])
    speeds = (float(entry[name]) for name in ("mean_16bit", "mean_32bit", "gather"))
    return Ranks(*sizes, str(entry["backend"]), str(entry["device"])), RingSpeed(*speeds)


def _possible_or_none(value: Any) -> float | None:
    return float(value) if value is not None and _is_possible(float(value)) else None


def _is_possible(gb_per_s: float) -> bool:
    return 0 < gb_per_s < 1e9  # rejects NaN, too


def _machine() -> dict[str, Any]:
    """Return what must be equal for a measurement to be valid."""
    return {
        "host": platform.node(),
        "architecture": platform.machine(),
        "allowed_cores": allowed_cores(),
    }
