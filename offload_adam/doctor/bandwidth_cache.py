"""The measured bandwidths of this machine, in a JSON file in the user's cache folder.

Machines may share the folder: each has a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil

from offload_adam.files import read_regular_file
from offload_adam.kernels.threads import allowed_cores
from offload_adam.layout.ring import RingSpeed
from offload_adam.options import LOW_PRECISION, StateFormat
from offload_adam.printable import show
from offload_adam.processor import cpu_model

logger = logging.getLogger(__name__)

_MAX_NBYTES = 1024 * 1024
_MAX_FILES = 256
_MUCH_LOWER = 0.5
"""Share of a saved value below which even a busy machine makes the saved value doubtful."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that a network speed was measured with. The speed is valid for no other ranks.

    backend: backend of the collectives, "nccl" or "gloo".
    device: type of the device that holds the buckets, "cuda" or "cpu".
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


@dataclass
class Bandwidth:
    """Measured bandwidths in 1e9 bytes a second; empty or None where nothing was measured.

    memory: bandwidth of host memory, by number of threads.
    step: bandwidth of an optimizer step with fp32 state and the threads of all ranks of a node.
    network: speeds of the collectives, by the ranks that they were measured with.
    bus: bandwidth of the slowest GPU's copies, in their slower direction.
    low_precision_steps: bandwidth of the same step in other formats of the state.
    busy: the values of memory and steps are in doubt. They may be too low, because other processes
        used the cores meanwhile, or too high, because a later measurement was much lower.
    """

    memory: Mapping[int, float] = field(default_factory=dict)
    step: float | None = None
    network: Mapping[Ranks, RingSpeed] = field(default_factory=dict)
    bus: float | None = None
    low_precision_steps: dict[StateFormat, float] = field(default_factory=dict)
    busy: bool = False

    def step_in(self, state_format: StateFormat) -> float | None:
        """Return the bandwidth of a step in this format."""
        return self.step if state_format == "fp32" else self.low_precision_steps.get(state_format)


def _path() -> Path:
    """Return the path of this machine's file, below XDG_CACHE_HOME or else below ~/.cache.

    Raises:
        RuntimeError: the user has neither a home folder nor HOME.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    identity = json.dumps(_machine(), sort_keys=True).encode()
    name = f"bandwidth-{hashlib.sha256(identity).hexdigest()[:12]}.json"
    return base / "offload_adam" / name


def keep(measured: Bandwidth) -> Path | None:
    """Write the measured values into the file, whose other values stay as they are.

    Of a busy machine, the greater of the measured and the saved values stay: other processes only
    ever make a bandwidth lower. Values that are known from a busy machine alone are marked, and so
    are saved values of which it measured less than half.

    Returns:
        The file, or None, with a warning in the log, if it cannot be written.
    """
    known = recall()
    busy = known.busy
    if measured.memory:
        is_doubtful = known.busy or not known.memory or _is_much_lower(measured, known)
        busy = measured.busy and is_doubtful
    if measured.busy:
        measured = _greater_of(measured, known)
    networks = {**known.network, **measured.network}
    low_precision = {**known.low_precision_steps, **measured.low_precision_steps}
    values = {
        "machine": _machine(),
        "busy": busy,
        "memory_gb_per_s": measured.memory or known.memory,
        "step_gb_per_s": measured.step or known.step,
        "low_precision_step_gb_per_s": low_precision,
        "bus_gb_per_s": measured.bus or known.bus,
        "network_gb_per_s": [{**asdict(ranks), **asdict(networks[ranks])} for ranks in networks],
    }
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes may write at the same time: each renames its own file, and the last one wins.
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        _delete_oldest(path.parent)
    except (OSError, RuntimeError) as error:
        logger.warning("Cannot save the measured bandwidth: %s", error)
        return None
    return path


def _delete_oldest(folder: Path) -> None:
    """Delete the oldest files if there are too many, as of machines that no longer exist."""
    with suppress(OSError):  # another process deletes them, too
        paths = sorted(folder.glob("bandwidth-*.json"), key=lambda path: path.stat().st_mtime)
        for path in paths[:-_MAX_FILES]:
            path.unlink()


def _is_much_lower(measured: Bandwidth, known: Bandwidth) -> bool:
    """Return whether a bandwidth of memory or steps is much lower than the known one."""
    pairs: list[tuple[float | None, float | None]] = [(measured.step, known.step)]
    pairs += [(value, known.memory.get(count)) for count, value in measured.memory.items()]
    for state_format, step in measured.low_precision_steps.items():
        pairs.append((step, known.low_precision_steps.get(state_format)))
    return any(new is not None and old and new < _MUCH_LOWER * old for new, old in pairs)


def _greater_of(measured: Bandwidth, known: Bandwidth) -> Bandwidth:
    """Return measured values, but greater known ones in place of those of memory and steps."""
    memory = {
        count: max(value, known.memory.get(count, 0.0)) for count, value in measured.memory.items()
    }
    low_precision = {
        state_format: max(step, known.low_precision_steps.get(state_format, 0.0))
        for state_format, step in measured.low_precision_steps.items()
    }
    step = max(measured.step or 0.0, known.step or 0.0) or None
    return replace(measured, memory=memory, step=step, low_precision_steps=low_precision)


def recall() -> Bandwidth:
    """Return the bandwidths in the file, empty if it is missing, damaged or of another machine."""
    try:
        path = _path()
        if not path.exists():
            path = path.with_name("bandwidth.json")  # as earlier versions called it
        values: Any = json.loads(read_regular_file(path, _MAX_NBYTES))
        # Earlier versions wrote the first three keys of `_machine()` only.
        machine = _machine()
        found = values["machine"]
        if not {"host", "architecture", "allowed_cores"} <= found.keys() <= machine.keys():
            return Bandwidth()
        if any(found[key] != machine[key] for key in found):
            return Bandwidth()
        memory, step = values["memory_gb_per_s"], values["step_gb_per_s"]
        # Files of earlier versions lack some values. Some have only the step with bf16 state, under
        # a key of its own.
        low_precision = values.get("low_precision_step_gb_per_s")
        if low_precision is None:
            low_precision = {"bf16": values.get("step_bf16_gb_per_s")}
        bus, entries = values.get("bus_gb_per_s"), values.get("network_gb_per_s", [])
        network = {}
        for entry in entries:
            network[_ranks(entry)] = RingSpeed(
                **{key.name: _speed(entry[key.name]) for key in fields(RingSpeed)}
            )
        return Bandwidth(
            memory={_count(int(count)): _speed(value) for count, value in memory.items()},
            step=None if step is None else _speed(step),
            low_precision_steps={
                state_format: _speed(speed)
                for state_format in LOW_PRECISION
                if (speed := low_precision.get(state_format)) is not None
            },
            network=network,
            bus=None if bus is None else _speed(bus),
            busy=values.get("busy") is True,
        )
    # RuntimeError includes RecursionError, of deeply nested lists.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.debug("Found no measured bandwidths: %s: %s", type(error).__name__, show(error))
        return Bandwidth()


def _speed(value: Any) -> float:
    """Return a speed in GB/s.

    Raises:
        ValueError: the speed is impossible: zero, negative, huge or NaN.
    """
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise ValueError(f"{show(value)} GB/s is impossible")
    return float(value)


def _count(value: Any) -> int:
    """Return a number of threads or ranks.

    Raises:
        ValueError: the number is impossible.
    """
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{show(value)} is not a number of threads or ranks")
    return value


def _ranks(entry: Any) -> Ranks:
    """Return the ranks of an entry.

    Raises:
        ValueError: the entry describes no ranks.
    """
    backend, device = entry["backend"], entry["device"]
    if not (isinstance(backend, str) and isinstance(device, str)):
        raise ValueError(f"{show(entry)} describes no ranks")
    return Ranks(_count(entry["world_size"]), _count(entry["local_world_size"]), backend, device)


def _machine() -> dict[str, Any]:
    """Return what identifies this machine. Measurements of a machine that differs are ignored."""
    return {
        "host": platform.node(),
        "architecture": platform.machine(),
        "allowed_cores": allowed_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "cpu": cpu_model(),
    }
