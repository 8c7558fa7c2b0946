"""The sinks that the configuration asks for, fed on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.sinks.server import StatusServer
from offload_adam.sinks.sink import GuardedSinks, MetricSink
from offload_adam.sinks.tensorboard import TensorBoardSink
from offload_adam.sinks.wandb import WandbSink
from offload_adam.step.ledger import by_category
from offload_adam.train.loop import Job
from offload_adam.train.run_folder import run_folder
from offload_adam.train.saving import FOLDER_NAME, steps_in

_PACKAGES = {
    "http_port": ("prometheus_client", "watch"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb_project": ("wandb", "wandb"),
}


def reject_missing_extras(config: RunConfig) -> None:
    """Reject sinks whose package is not installed, before the ranks join.

    Raises:
        ConfigError: naming each key and its extra.
    """
    missing = []
    for key, (package, extra) in _PACKAGES.items():
        wanted = getattr(config.observe, key)
        # Port 0 is a wish as well, and equals False.
        if wanted is not None and wanted is not False and find_spec(package) is None:
            advice = f"needs {package}: pip install 'offload-adam[{extra}]'"
            missing.append(Mistake(f"observe.{key}", advice))
    if missing:
        raise ConfigError("configuration", missing)


@contextmanager
def watched(job: Job) -> Iterator[GuardedSinks]:
    """Open the sinks, and close them after the block.

    Raises:
        OSError: `observe.http_port` is taken.
    """
    section, folder = job.config.observe, run_folder(job.config)
    sinks: list[MetricSink] = []
    with ExitStack() as stack:
        if section.http_port is not None:
            sinks.append(StatusServer(section.http_port, section.http_host, lambda: _status(job)))
            stack.callback(sinks[-1].close)
        if section.tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard"))
            stack.callback(sinks[-1].close)
        if section.wandb_project is not None:
            values = job.config.model_dump(mode="json")
            sinks.append(WandbSink(section.wandb_project, job.config.run.name, folder, values))
        # From here on each is closed by the guard, also where closing fails.
        stack.pop_all()
    guarded = GuardedSinks(sinks)
    try:
        yield guarded
    finally:
        guarded.close()


def _status(job: Job) -> Mapping[str, Any]:
    """Return what `/status` shows beside the last record."""
    return {
        "run": job.config.run.name,
        "of_steps": job.config.train.num_steps,
        "world_size": job.world.world_size,
        "last_checkpoint": max(steps_in(run_folder(job.config) / FOLDER_NAME), default=None),
        "memory_bytes": _memory(job),
        "ranks": _ranks(job),
    }


def _memory(job: Job) -> dict[str, int]:
    """Return bytes of rank 0: by category, of its process and its device, and what its node has."""
    memory = by_category(job.optimizer.memory_ledger())
    memory["resident"] = psutil.Process().memory_info().rss
    memory["available on the node"] = psutil.virtual_memory().available
    if torch.cuda.is_initialized():
        memory["allocated on the device"] = torch.cuda.memory_allocated(job.world.device)
    return {name: nbytes for name, nbytes in memory.items() if nbytes}


def _ranks(job: Job) -> list[dict[str, Any]]:
    """Return where each rank is, as it said itself a moment ago."""
    watch = job.world.ranks.watch
    if watch is None:
        return [
            {"rank": 0, "step": PROGRESS.step, "phase": PROGRESS.phase, "bucket": PROGRESS.bucket}
        ]
    return [
        {
            "rank": record.rank,
            "host": record.process.host,
            "step": record.progress.step,
            "phase": record.progress.phase,
            "bucket": record.progress.bucket,
            "waiting": record.progress.waiting,
            "still_s": round(record.still_s, 1),
        }
        for record in watch.places()
    ]
