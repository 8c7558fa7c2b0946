"""Help of the commands that take a configuration: it ends with the names of all keys."""

from __future__ import annotations

import typer
from typer.core import TyperCommand


class CommandWithKeys(TyperCommand):
    """A command whose `--help` lists the keys of a configuration."""

    def format_help(self, ctx: typer.Context, formatter: object) -> None:  # type: ignore[override]
        """Print the help, and then the keys."""
        from offload_adam.config import keys_by_section  # with pydantic, which takes a while

        super().format_help(ctx, formatter)  # type: ignore[arg-type]
        typer.echo("Keys of CONFIG and of overrides (offload-adam config --explain KEY says more):")
        typer.echo(f"{keys_by_section()}\n")
