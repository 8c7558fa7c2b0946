"""Opens the sinks that a configuration asks for, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.sinks.server import StatusServer
from offload_adam.sinks.sink import EXTRAS, GuardedSinks, missing_extra
from offload_adam.sinks.trackers import TensorBoardSink, WandbSink
from offload_adam.train.loop import Job
from offload_adam.train.observation import Observation
from offload_adam.train.records import CheckpointTotals, RunTotals
from offload_adam.train.run_folder import run_folder


def reject_missing_extras(config: RunConfig) -> None:
    """Reject sinks whose packages are not installed, before the ranks join.

    Raises:
        ConfigError: naming each key and its extra.
    """
    mistakes = []
    for key in EXTRAS:
        value, problem = getattr(config.observe, key), missing_extra(key)
        # Port 0 asks for a server too, although it is falsy and equals False.
        if value is not None and value is not False and problem is not None:
            mistakes.append(Mistake(f"observe.{key}", problem))
    if mistakes:
        raise ConfigError("configuration", mistakes)


@contextmanager
def opened_sinks(
    job: Job, totals: RunTotals, checkpoints: CheckpointTotals
) -> Iterator[GuardedSinks]:
    """Open the sinks, and close them after the body.

    Args:
        totals, checkpoints: are added to while the server reads them.

    Raises:
        OSError: the port `observe.http_port` is taken.
    """
    section, name, folder = job.config.observe, job.config.run.name, run_folder(job.config)
    observation = Observation(job, totals, checkpoints)
    sinks = GuardedSinks()
    try:
        if section.tensorboard:
            sinks.add(TensorBoardSink(folder / "tensorboard"))
        if section.wandb_project is not None:
            values = job.config.model_dump(mode="json")
            sinks.add(WandbSink(section.wandb_project, name, folder, values))
        if section.http_port is not None:
            # Closed last, so that /healthz reports an error of the run until then.
            port, host, see = section.http_port, section.http_host, observation
            sinks.add(StatusServer(port, host, see.status, see.problem, see))
        yield sinks
    except BaseException as error:
        observation.error = error
        raise
    finally:
        sinks.close()
