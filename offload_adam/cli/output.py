"""Error messages of the commands on stderr, result files, and numbers as people say them."""

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


def format_count(count: float) -> str:
    """Return a count with three digits and a unit, such as '10.8 M'; below 1,000 as it is."""
    for unit in ("", " K", " M", " B"):
        text = f"{count:.3g}"
        if float(text) < 1000:  # 999,999 is '1 M', not '1e+03 K'
            return text + unit
        count /= 1000
    return f"{count:,.3g} T"
