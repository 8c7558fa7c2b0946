"""Error messages of the commands on stderr, and the files that a user names for their results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import typer

from offload_adam.printable import MAX_MESSAGE_LENGTH, printable

EXIT_FAILED = 1
EXIT_BAD_CONFIGURATION = 2


def fail(problem: object, code: int = EXIT_FAILED) -> NoReturn:
    """Print a problem, which may quote a file or an option, and exit."""
    typer.echo(f"offload-adam: {printable(str(problem), MAX_MESSAGE_LENGTH)}", err=True)
    raise typer.Exit(code)


def require_folder_of(path: Path | None, option: str) -> None:
    """Exit before any work if the folder of a file to be written does not exist.

    Args:
        path: None if the option is absent.
    """
    # Not `Path.is_dir`, which raises an error for a long name.
    if path is not None and not os.path.isdir(folder := path.absolute().parent):
        fail(f"{option}: there is no folder {folder}", EXIT_BAD_CONFIGURATION)


def write_text(path: Path, text: str, option: str) -> None:
    """Write the file that an option names, or exit."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"{option} {path} cannot be written: {error.strerror}. Name another file.")
