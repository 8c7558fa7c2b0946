"""`offload-adam config`: prints every key of a configuration with its value and a comment."""

from __future__ import annotations

from typing import Annotated

import typer

from offload_adam.cli.output import EXIT_BAD_CONFIGURATION, fail
from offload_adam.cli.train import OverridesArgument, load_arguments


def config(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file. Without one, prints the defaults."),
    ] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Print the whole configuration as YAML with comments, defaults included.

    Exit codes: 0 done, 2 invalid configuration.
    """
    from offload_adam.config import ConfigError, explain_config, load_config

    arguments = [one for one in (config, *(overrides or [])) if one is not None]
    try:
        if all(argument.startswith("-") for argument in arguments):
            loaded = load_config(None, arguments)
        else:
            loaded = load_arguments(arguments)
    except ConfigError as error:
        fail(error, EXIT_BAD_CONFIGURATION)
    typer.echo(explain_config(loaded), nl=False)
