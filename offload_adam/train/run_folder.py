"""The folder that a run writes to, which never mixes the records of two runs."""

from __future__ import annotations

from pathlib import Path

from offload_adam.config import RunConfig, dump_config

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"


def run_folder(config: RunConfig) -> Path:
    """Return `<run.dir>/<run.name>`."""
    return Path(config.run.dir) / config.run.name


def prepare_run_folder(config: RunConfig) -> list[str]:
    """Create the folder, write the resolved configuration, and return what should be said about it.

    Files of an earlier run move aside as `metrics-<n>.jsonl` and `config-<n>.yaml`.
    """
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    notes = _move_aside(folder)
    (folder / CONFIG_NAME).write_text(dump_config(config), encoding="utf-8")
    return notes


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
