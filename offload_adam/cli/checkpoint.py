"""`offload-adam checkpoint`: verify, inspect, export and import checkpoints."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_adam.cli.output import fail

if TYPE_CHECKING:
    from offload_adam.checkpoint.format import Manifest

MAX_NAMES_NBYTES = 64 * 1024 * 1024
"""Largest file for --names: a million names of 64 bytes."""
_WIDTH_OF_A_FILE = 5000  # above that of a row with the longest name, which is cut in its middle

checkpoint_app = typer.Typer(
    help="Verify, inspect, export and import checkpoints.", no_args_is_help=True
)


class ExportForm(StrEnum):
    """Formats of `export`."""

    TORCH = "torch"
    DCP = "dcp"


class ImportForm(StrEnum):
    """Formats of `import`. The name is required: unpickling a file is never the default."""

    TORCH_PICKLE = "torch-pickle"


Folder = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the checkpoint.")]


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Print an error of a checkpoint or a file without a traceback, and exit with 1."""
    from offload_adam.errors import CheckpointError

    try:
        yield
    except (CheckpointError, OSError) as error:
        fail(error)


@checkpoint_app.command("verify")
def verify(path: Folder) -> None:
    """Verify every byte of a checkpoint against its checksums.

    Exit codes: 0 intact, 1 damaged or not a checkpoint.
    """
    from offload_adam.checkpoint.load import verify_checkpoint

    with _exit_on_error():
        manifest = verify_checkpoint(path)
    nbytes = sum(file.nbytes for file in manifest.files.values())
    typer.echo(f"{path} is intact: step {manifest.step}, {nbytes:,} bytes verified")


@checkpoint_app.command("inspect")
def inspect(
    path: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the contents of a checkpoint. Reads only its manifest.

    Names are never cut. A terminal and COLUMNS wrap them; else a file or a pipe gets long lines.

    Exit codes: 0 done, 1 damaged or not a checkpoint.
    """
    from offload_adam.checkpoint.format import read_manifest

    with _exit_on_error():
        values = _contents(read_manifest(path))
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        _print_contents(values)


def _contents(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says, as printed by `inspect --json`."""
    from offload_adam.dtypes import DTYPES
    from offload_adam.printable import show

    tensors = {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "pieces": len(entry.pieces),
            "nbytes": prod(entry.shape) * DTYPES[entry.dtype].itemsize,
        }
        for name, entry in sorted(manifest.tensors.items())
    }
    # The keys of a damaged checkpoint may be of any type.
    keys: list[object] = list(manifest.decoded_extra() or {})
    return {
        "step": manifest.step,
        "world_size": manifest.world_size,
        "tensors": tensors,
        "values": {
            name: type(value).__name__ for name, value in sorted(manifest.decoded_values().items())
        },
        "state_formats": dict(sorted(Counter(manifest.optimizer.formats.values()).items())),
        "extra": [key if isinstance(key, str) else show(key) for key in keys],
        "total": {
            "tensors": len(tensors),
            "elements": sum(prod(entry.shape) for entry in manifest.tensors.values()),
            "nbytes": sum(entry["nbytes"] for entry in tensors.values()),
        },
    }


def _print_contents(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from offload_adam.printable import MAX_MESSAGE_LENGTH, printable
    from offload_adam.units import format_count, format_nbytes

    total = values["total"]
    typer.echo(f"step {values['step']}, saved by {values['world_size']} rank(s)")
    for state_format, count in values["state_formats"].items():
        typer.echo(f"state_format {state_format!r}: the state of {count} parameter(s)")
    typer.echo(
        f"total: {total['tensors']} tensor(s), {format_count(total['elements'])} elements, "
        f"{format_nbytes(total['nbytes'])}"
    )
    if extra := values["extra"]:
        typer.echo(f"extra: {printable(', '.join(extra), MAX_MESSAGE_LENGTH)}")
    # Two names may differ at their ends only: wrap them, where rich would cut them.
    table = Table(Column("tensor", overflow="fold"))
    for title in ("dtype", "shape", "pieces", "size"):
        table.add_column(title, no_wrap=True)  # so that names alone are wrapped
    for name, entry in values["tensors"].items():
        table.add_row(
            # As Text, since rich would read [bold] in a string as markup.
            Text(printable(name, MAX_MESSAGE_LENGTH)),
            entry["dtype"],
            " x ".join(map(str, entry["shape"])) or "1",
            str(entry["pieces"]),
            format_nbytes(entry["nbytes"]),
        )
    for name, kind in values["values"].items():
        table.add_row(Text(printable(name, MAX_MESSAGE_LENGTH)), f"({kind})", "", "", "")
    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _WIDTH_OF_A_FILE  # each name on one line, so that grep finds it
    console.print(table)


@checkpoint_app.command("export")
def export(
    path: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New file, or new folder for dcp.")],
    form: Annotated[
        ExportForm,
        typer.Option(
            "--format",
            help="torch: a file for torch.load. dcp: a folder for torch.distributed.checkpoint.",
        ),
    ],
) -> None:
    """Write a checkpoint in a format of torch.

    Exit codes: 0 done, 1 failed, without a partial OUT.
    """
    from offload_adam.checkpoint.export import export_dcp, export_torch
    from offload_adam.printable import MAX_MESSAGE_LENGTH, printable

    with _exit_on_error():
        loaded_by = (export_torch if form is ExportForm.TORCH else export_dcp)(path, out)
    typer.echo(printable(f"Wrote {out} for {loaded_by}", MAX_MESSAGE_LENGTH))


@checkpoint_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="File that torch.save wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    form: Annotated[
        ImportForm,
        typer.Option(
            "--format",
            help="torch-pickle: load FILE with weights_only=True, so no code in it runs.",
        ),
    ],
    model_key: Annotated[str, typer.Option(help="Key of the model's state dict in FILE.")] = (
        "model"
    ),
    optimizer_key: Annotated[
        str, typer.Option(help="Key of the optimizer's state dict in FILE.")
    ] = "optimizer",
    names: Annotated[
        Path | None,
        typer.Option(
            help="File with the names of the optimizer's parameters, one per line, in its order."
        ),
    ] = None,
) -> None:
    """Make a checkpoint of a file with a model and its torch.optim.Adam or AdamW.

    Exit codes: 0 done, 1 failed, without a partial OUT.
    """
    from offload_adam.checkpoint.torch_import import import_torch_pickle
    from offload_adam.units import format_nbytes

    with _exit_on_error():
        nbytes = import_torch_pickle(
            source,
            out,
            model_key=model_key,
            optimizer_key=optimizer_key,
            names=None if names is None else _read_names(names),
        )
    typer.echo(f"Wrote {out} ({format_nbytes(nbytes)}) for load_checkpoint")


def _read_names(path: Path) -> list[str]:
    from offload_adam.errors import CheckpointError
    from offload_adam.files import read_regular_file

    try:
        return read_regular_file(path, MAX_NAMES_NBYTES).decode("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CheckpointError(
            f"{path} cannot be read: {reason}. Pass a text file with one parameter name per line."
        ) from error
