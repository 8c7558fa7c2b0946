"""Opens the sinks that a configuration asks for, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.sinks.server import StatusServer
from offload_adam.sinks.sink import EXTRAS, GuardedSinks, MetricSink, missing_extra
from offload_adam.sinks.tensorboard import TensorBoardSink
from offload_adam.sinks.wandb import WandbSink
from offload_adam.train.loop import Job
from offload_adam.train.observation import Observation
from offload_adam.train.records import RunTotals
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
def watched(job: Job, totals: RunTotals) -> Iterator[GuardedSinks]:
    """Open the sinks, and close them after the body.

    Args:
        totals: the caller adds each step, also while the server reads them.

    Raises:
        OSError: the port `observe.http_port` is taken.
    """
    section, folder = job.config.observe, run_folder(job.config)
    observation = Observation(job, totals)
    sinks: list[MetricSink] = []
    with ExitStack() as opened:
        if section.tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard"))
            opened.callback(sinks[-1].close)
        if section.wandb_project is not None:
            values = job.config.model_dump(mode="json")
            sinks.append(WandbSink(section.wandb_project, job.config.run.name, folder, values))
            opened.callback(sinks[-1].close)
        if section.http_port is not None:
            # Closed last, so that /healthz reports an error of the run until then.
            sinks.append(
                StatusServer(
                    section.http_port,
                    section.http_host,
                    observation.status,
                    observation.problem,
                    observation,
                )
            )
            opened.callback(sinks[-1].close)
        # All are open. From here on GuardedSinks closes each, even if closing another one fails.
        opened.pop_all()
    guarded = GuardedSinks(sinks)
    try:
        yield guarded
    except BaseException as error:
        observation.error = error
        raise
    finally:
        guarded.close()
