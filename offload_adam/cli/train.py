"""`offload-adam train`: read the configuration, run the job, say with which code it ended."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from offload_adam.config import RunConfig

EXIT_BAD_CONFIGURATION = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 128 + signal.SIGINT
_WAIT_FOR_FIRST_RANK_S = 5.0


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="--section.key=value", help="What to change of it."),
    ] = None,
) -> None:
    """Train a language model as CONFIG says, alone or under torchrun.

    SIGTERM and SIGUSR1 ask it to end after the step that it is in; a SIGTERM more than 3 s after
    that ends it at once.

    Exit codes: 0 done, 2 bad configuration, 3 does not fit into memory, 130 interrupted, 143 ended
    at once by SIGTERM, 1 anything else.
    """
    run_to_exit_code([config, *(overrides or [])])


def run_to_exit_code(arguments: list[str]) -> None:
    """Run the job of these arguments, and end with the exit code of how it went."""
    from offload_adam.config import ConfigError
    from offload_adam.errors import (
        CheckpointError,
        HostMemoryError,
        NotRetriedError,
        PeerError,
        RankDisagreementError,
        RunFolderLostError,
    )

    try:
        _run(load_arguments(arguments))
    except ConfigError as error:
        _report(error)
        raise typer.Exit(EXIT_BAD_CONFIGURATION) from None
    except HostMemoryError as error:
        _report(error)
        raise typer.Exit(EXIT_DOES_NOT_FIT) from None
    except (CheckpointError, NotRetriedError, RankDisagreementError, RunFolderLostError) as error:
        _report(error)
        raise typer.Exit(1) from None
    except PeerError as error:
        # Each surviving rank speaks: which one is first is not known, nor who lives to be second.
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            typer.echo("interrupted; the metrics written so far are kept", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def load_arguments(arguments: list[str]) -> RunConfig:
    """Return the configuration; the file may stand before, between or after the overrides."""
    from offload_adam.config import ConfigError, Mistake, load_config

    overrides = [argument for argument in arguments if argument.startswith("-")]
    files = [argument for argument in arguments if not argument.startswith("-")]
    if len(files) != 1:
        problem = "name one configuration file" if not files else f"one file, not {files}"
        hint = f"{problem}; an override is one word, --section.key=value"
        raise ConfigError("command line", [Mistake("", hint)])
    return load_config(files[0], overrides)


def _run(config: RunConfig) -> None:
    from offload_adam.train.job import run_job  # with torch, which takes seconds

    _show_log()
    run_job(config)


def _show_log() -> None:
    """Print the package's log on stderr: on rank 0 also what it has planned, elsewhere warnings."""
    logging.basicConfig(format="%(name)s: %(message)s")
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("offload_adam").setLevel(logging.INFO if is_first else logging.WARNING)


def _report(error: Exception) -> None:
    """Print what all ranks have found, once a node.

    torchrun ends every rank as soon as one has ended, so the others wait for the first one to
    speak; one that is still there afterwards speaks for itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_WAIT_FOR_FIRST_RANK_S)
    typer.echo(f"offload-adam: {error}", err=True)
