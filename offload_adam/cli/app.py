"""The command line. Each command imports torch only when it runs, so `--help` is fast."""

from __future__ import annotations

from typing import Annotated

import typer

from offload_adam import __version__
from offload_adam.cli.bench import bench
from offload_adam.cli.checkpoint import checkpoint_app
from offload_adam.cli.config import config
from offload_adam.cli.doctor import doctor
from offload_adam.cli.keeper import keeper_app
from offload_adam.cli.keys import CommandWithKeys
from offload_adam.cli.output import EXIT_BAD_CONFIGURATION, fail
from offload_adam.cli.plan import plan
from offload_adam.cli.train import profile, train
from offload_adam.kernels.threads import ThreadSettingsError, require_number_of_threads

app = typer.Typer(
    name="offload-adam",
    help="Train with an Adam optimizer whose state is sharded over the ranks in host memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
# Overrides such as --train.num_steps=3 begin with -- but are arguments, not options of typer.
_with_overrides = {"ignore_unknown_options": True}
app.command(context_settings=_with_overrides, cls=CommandWithKeys)(train)
app.command(context_settings=_with_overrides, cls=CommandWithKeys)(profile)
app.command(context_settings=_with_overrides)(plan)
app.command(context_settings=_with_overrides, cls=CommandWithKeys)(config)
app.command()(doctor)
# Every argument is passed on, --help too.
app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)(bench)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(keeper_app, name="keeper")


def main() -> None:
    """Run the command line: the entry point of the console script."""
    app(prog_name="offload-adam")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"offload-adam {__version__}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train with an Adam optimizer whose state is sharded over the ranks in host memory."""
    try:
        require_number_of_threads()
    except ThreadSettingsError as error:
        fail(error, EXIT_BAD_CONFIGURATION)
