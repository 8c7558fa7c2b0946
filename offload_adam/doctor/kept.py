"""The bandwidth that was measured on this machine, kept in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
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


def keep(gb_per_s: Mapping[int, float]) -> Path | None:
    """Write what was measured for later runs; return the file, None where it cannot be written."""
    values = {
        "machine": _machine(),
        "gb_per_s": {str(threads): value for threads, value in gb_per_s.items()},
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


def recall() -> dict[int, float]:
    """Return what was kept, GB/s by number of threads; empty where it is of another machine."""
    try:
        text = (cache_folder() / FILE_NAME).read_text(encoding="utf-8")
        values: Any = json.loads(text)
        if values["machine"] != _machine():
            return {}
        found = {int(count): float(value) for count, value in values["gb_per_s"].items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.debug("no bandwidth was kept: %s", error)
        return {}
    return {count: value for count, value in found.items() if count > 0 and 0 < value < 1e9}


def _machine() -> dict[str, Any]:
    """Return what must be the same for a measurement to hold."""
    return {
        "host": platform.node(),
        "architecture": platform.machine(),
        "allowed_cores": allowed_cores(),
    }
