"""`offload-adam config`: prints a configuration, explains its keys, or prints its JSON schema."""

from __future__ import annotations

import json
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
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Explain a key such as optimizer.betas, or all keys of a section such as memory.",
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of the YAML file, for editors."),
    ] = False,
) -> None:
    """Print the whole configuration as YAML with comments, defaults included.

    With --explain, print type, default, allowed values and meaning of a key instead.

    Editors with a YAML language server complete and check a file with this line and the output of
    --schema in schema.json: # yaml-language-server: $schema=schema.json

    Exit codes: 0 done, 2 invalid configuration or unknown key.
    """
    from offload_adam.config import (
        ConfigError,
        explain_config,
        explain_key,
        json_schema,
        load_config,
    )

    arguments = [one for one in (config, *(overrides or [])) if one is not None]
    if (explain is not None) + schema + bool(arguments) > 1:
        problem = "--explain, --schema and CONFIG with its overrides exclude each other"
        fail(f"{problem}: pass one of them", EXIT_BAD_CONFIGURATION)
    try:
        if schema:
            text = json.dumps(json_schema(), indent=2) + "\n"
        elif explain is not None:
            text = explain_key(explain)
        elif all(argument.startswith("-") for argument in arguments):
            text = explain_config(load_config(None, arguments))
        else:
            text = explain_config(load_arguments(arguments))
    except ConfigError as error:
        fail(error, EXIT_BAD_CONFIGURATION)
    typer.echo(text, nl=False)
