"""The folder that a run writes to, which never mixes the records of two runs."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

from offload_adam.config import ConfigError, RunConfig, dump_config

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"


def run_folder(config: RunConfig) -> Path:
    """Return `<run.dir>/<run.name>`."""
    return Path(config.run.dir) / config.run.name


def require_writable(config: RunConfig) -> None:
    """Try to make the run's folder, and leave nothing behind.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    folder = run_folder(config)
    present = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        # A rehearsal beside the real place: whether one may is for the file system to say.
        with tempfile.TemporaryDirectory(prefix=".offload-adam-", dir=present) as place:
            (place / folder.relative_to(present)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError.at(
            "run.dir",
            f"{folder} cannot be written to ({error}): name a folder in which files may be made",
        ) from error


def prepare_run_folder(config: RunConfig) -> list[str]:
    """Create the folder, write the resolved configuration, and return what should be said about it.

    Files of an earlier run move aside as `metrics-<n>.jsonl` and `config-<n>.yaml`.
    """
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    notes = _move_aside(folder)
    (folder / CONFIG_NAME).write_text(dump_config(config), encoding="utf-8")
    return notes


def continue_run_folder(config: RunConfig, step: int) -> list[str]:
    """Keep the records up to `step`, drop what came after it, and return what should be said.

    A run that goes on writes those steps again, with the same values.
    """
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(dump_config(config), encoding="utf-8")
    path = folder / METRICS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if _step_of(line) <= step]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return [f"resuming after step {step}"]


def _step_of(line: str) -> float:
    """Return the step of a record; one that was cut short counts as later than all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _move_aside(folder: Path) -> list[str]:
    present = [path for name in (METRICS_NAME, CONFIG_NAME) if (path := folder / name).exists()]
    if not present:
        return []
    number = 1
    while any(_numbered(folder / name, number).exists() for name in (METRICS_NAME, CONFIG_NAME)):
        number += 1
    moved = [path.rename(_numbered(path, number)).name for path in present]
    return [f"{folder} holds an earlier run: its files are now {' and '.join(moved)}"]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
