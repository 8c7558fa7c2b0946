"""`offload-adam train` and `profile`: read the configuration, run the job, and return its code."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offload_adam.cli.logs import LogFormat, configure_logging
from offload_adam.cli.output import EXIT_BAD_CONFIGURATION
from offload_adam.coordinator.launcher import launched
from offload_adam.errors import (
    CheckpointError,
    HostMemoryError,
    KeptStateError,
    NotRetriedError,
    PeerError,
    RankDisagreementError,
    RunFolderLostError,
)

if TYPE_CHECKING:
    from offload_adam.config import RunConfig

logger = logging.getLogger(__name__)

EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 128 + signal.SIGINT
# torchrun looks for ended ranks every 0.1 s, and then ends the others.
_WAIT_FOR_FIRST_RANK_S = 5.0

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="The configuration, a YAML file.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="--section.key=value", help="Keys of the configuration to override."),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(help="Format of the log on stderr. json writes one object a line."),
]


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Train a language model as configured in CONFIG, alone or under torchrun.

    After SIGTERM or SIGUSR1 the run ends after the current step, with a checkpoint, and exits with
    0. A SIGTERM more than 3 s later ends it at once.

    Exit codes: 0 done or preempted, 2 bad configuration, 3 does not fit into memory,
    130 interrupted, 143 ended at once by SIGTERM, 1 any other error. torchrun replaces each code
    but 0 by 1; the scripts in launch/ of the source repository do not.
    """
    run_to_exit_code([config, *(overrides or [])], log_format)


def profile(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Train as configured in CONFIG, alone or under torchrun, and write a profile.

    The run's folder gets report.html, which begins with what limits a step and which setting to
    change; trace.json for Perfetto; and memory.jsonl with samples of the memory in use.

    This is `train` with profile.enabled. A few dozen steps are enough: --train.num_steps=50.

    Exit codes: as for `train`.
    """
    run_to_exit_code([config, "--profile.enabled=true", *(overrides or [])], log_format)


def run_to_exit_code(arguments: list[str], log_format: LogFormat) -> None:
    """Run the job of these arguments, and report an error by a message and an exit code."""
    configure_logging(log_format)
    try:
        _run(load_arguments(arguments))
    except KeyboardInterrupt:
        if launched("RANK") == 0:
            _print_error("interrupted; the metrics written so far are kept", log_format)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    # SystemExit: rich raises it, without a message, if the reader of stdout has gone; and a user's
    # model may call sys.exit(), even with code 0.
    except (Exception, SystemExit) as error:
        raise typer.Exit(_report(error, log_format)) from None


def load_arguments(arguments: list[str]) -> RunConfig:
    """Return the configuration; the file may stand before, between or after the overrides."""
    from offload_adam.config import ConfigError, Mistake, load_config

    overrides = [argument for argument in arguments if argument.startswith("-")]
    files = [argument for argument in arguments if not argument.startswith("-")]
    if len(files) == 1:
        return load_config(files[0], overrides)
    found = f", not {' and '.join(files)}" if files else ", such as configs/tiny.yaml"
    mistakes = [Mistake("", f"name one configuration file{found}")]
    if len(files) > 1:
        mistakes += [Mistake("", "an override has the form --section.key=value, without spaces")]
    try:
        load_config(None, overrides)
    except ConfigError as error:  # mistakes in the overrides, too
        mistakes += error.mistakes
    raise ConfigError("command line", mistakes)


def _run(config: RunConfig) -> None:
    """Run the job, and write its outcome to OFFLOAD_ADAM_OUTCOME_FILE.

    launch/torchrun.py in the source repository sets this variable and reads the file.
    """
    from offload_adam.train.job import run_job  # with torch, which takes seconds

    outcome = run_job(config)
    path = os.environ.get("OFFLOAD_ADAM_OUTCOME_FILE")
    if path and launched("LOCAL_RANK") == 0:
        try:
            Path(path).write_text(json.dumps(outcome._asdict()), encoding="utf-8")
        except OSError as error:  # the run itself has succeeded
            logger.warning("Cannot write OFFLOAD_ADAM_OUTCOME_FILE: %s", error)


def _report(error: Exception | SystemExit, log_format: LogFormat) -> int:
    """Print an error, pass it to torchrun, and return the exit code."""
    from offload_adam.config import ConfigError

    on_all_ranks = (
        ConfigError,
        HostMemoryError,
        CheckpointError,
        KeptStateError,
        NotRetriedError,
        RankDisagreementError,
        RunFolderLostError,
    )
    if isinstance(error, on_all_ranks) and launched("LOCAL_RANK") != 0:
        # Local rank 0 prints the same error and exits, and torchrun then ends this rank by SIGTERM.
        # If that does not happen, this rank prints the error itself.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_WAIT_FOR_FIRST_RANK_S)
    # Every surviving rank prints a PeerError, since torchrun may end any of them before it prints.
    # A KeptStateError names the process that holds one rank's file.
    if isinstance(error, (*on_all_ranks, KeptStateError, PeerError)):
        text = str(error)
        _print_error(text, log_format)
    else:
        text = f"{type(error).__name__}: {error}"
        logger.error("%s", text, exc_info=error)
    # One line: the log has the whole text, such as the table of what does not fit.
    first, *more = [line.strip() for line in text.splitlines()] or [""]
    is_mistake = isinstance(error, ConfigError)
    _write_error_file(f"{first}: {'; '.join(more)}" if is_mistake else first)
    if is_mistake or isinstance(error, KeptStateError):
        return EXIT_BAD_CONFIGURATION
    return EXIT_DOES_NOT_FIT if isinstance(error, HostMemoryError) else 1


def _print_error(text: str, log_format: LogFormat) -> None:
    if log_format == LogFormat.JSON:
        logger.error("%s", text)
    else:
        typer.echo(f"offload-adam: {text}", err=True)


def _write_error_file(summary: str) -> None:
    """Write one line about an error to the file that torchrun quotes in its failure report.

    torch's own `record` writes a whole traceback, and writes nothing if the process exits by code.

    Source: `ErrorHandler` of torch.distributed.elastic.multiprocessing.errors, for the format.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    message = {"message": summary, "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
