"""The bandwidth that was measured on this machine, kept in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_adam.kernels.threads import allowed_cores

logger = logging.getLogger(__name__)

FILE_NAME = "bandwidth.json"


def cache_folder() -> Path:
    """Return this package's folder below XDG_CACHE_HOME, or below ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "offload_adam"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was measured, in 1e9 bytes a second.

    memory: by number of threads; empty where it is not known.
    step: what a whole step of the optimizer gets with all cores, None where it is not known.
    """

    memory: Mapping[int, float] = field(default_factory=dict)
    step: float | None = None


def keep(bandwidth: Bandwidth) -> Path | None:
    """Write what was measured for later runs; return the file, None where it cannot be written."""
    values = {
        "machine": _machine(),
        "memory_gb_per_s": {str(threads): value for threads, value in bandwidth.memory.items()},
        "step_gb_per_s": bandwidth.step,
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
        step = values["step_gb_per_s"]
        step = None if step is None else float(step)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.debug("no bandwidth was kept: %s", error)
        return Bandwidth()
    possible = {count: value for count, value in memory.items() if count > 0 and _possible(value)}
    return Bandwidth(possible, step if step is not None and _possible(step) else None)


def _possible(gb_per_s: float) -> bool:
    return 0 < gb_per_s < 1e9


def _machine() -> dict[str, Any]:
    """Return what must be the same for a measurement to hold."""
    return {
        "host": platform.node(),
        "architecture": platform.machine(),
        "allowed_cores": allowed_cores(),
    }
