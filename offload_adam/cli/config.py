"""`offload-adam config`: every key of a configuration, with its value and what it means."""

from __future__ import annotations

from typing import Annotated

import typer

from offload_adam.cli.train import EXIT_BAD_CONFIGURATION


def config(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; the defaults without.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--section.key=value]", help="What to change of it."),
    ] = None,
) -> None:
    """Print a whole configuration as YAML, defaults included, with comments.

    Exit codes: 0 done, 2 bad configuration.
    """
    from offload_adam.config import ConfigError, RunConfig, explain_config, load_config

    try:
        loaded = RunConfig() if config is None else load_config(config, overrides or [])
    except ConfigError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_BAD_CONFIGURATION) from None
    typer.echo(explain_config(loaded), nl=False)
