"""`offload-adam checkpoint`: look at one, check every byte, turn it into torch's forms."""

from __future__ import annotations

from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Annotated

import typer

EXIT_DAMAGED = 1

checkpoint_app = typer.Typer(
    help="Look at checkpoints, export and import them.", no_args_is_help=True
)


class ExportForm(StrEnum):
    """What a checkpoint can be exported to."""

    TORCH = "torch"
    DCP = "dcp"


class ImportForm(StrEnum):
    """What a checkpoint can be imported from: pickled files only by this name."""

    TORCH_PICKLE = "torch-pickle"


Folder = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint's folder.")]


@checkpoint_app.command("verify")
def verify(path: Folder) -> None:
    """Read a checkpoint to its last byte.

    Exit codes: 0 it is whole, 1 it is not, and the message says where.
    """
    from offload_adam.checkpoint.load import verify_checkpoint
    from offload_adam.errors import CheckpointError

    try:
        manifest = verify_checkpoint(path)
    except CheckpointError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DAMAGED) from None
    nbytes = sum(file.nbytes for file in manifest.files.values())
    typer.echo(f"{path} is whole: step {manifest.step}, {nbytes:,} bytes verified")


@checkpoint_app.command("inspect")
def inspect(path: Folder) -> None:
    """Show what a checkpoint holds, from its manifest alone.

    Exit codes: 0 done, 1 the manifest cannot be read.
    """
    from rich.console import Console
    from rich.table import Table

    from offload_adam.checkpoint.format import DTYPES, read_manifest
    from offload_adam.errors import CheckpointError
    from offload_adam.units import format_nbytes

    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DAMAGED) from None
    title = f"step {manifest.step}, saved by {manifest.world_size} rank(s)"
    table = Table("tensor", "dtype", "shape", "pieces", "size", title=title)
    for name, entry in sorted(manifest.tensors.items()):
        nbytes = prod(entry.shape) * DTYPES[entry.dtype].itemsize
        shape = " x ".join(map(str, entry.shape)) or "1"
        table.add_row(name, entry.dtype, shape, str(len(entry.pieces)), format_nbytes(nbytes))
    for name, value in sorted(manifest.decoded_values().items()):
        table.add_row(name, f"({type(value).__name__})", "", "", "")
    console = Console()
    console.print(table)
    if extra := manifest.decoded_extra():
        console.print(f"extra: {', '.join(map(str, extra))}", markup=False)


@checkpoint_app.command("export")
def export(
    path: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file, or folder for dcp.")],
    form: Annotated[
        ExportForm,
        typer.Option("--format", help="torch: one plain file; dcp: torch's distributed folder."),
    ],
) -> None:
    """Write a checkpoint in one of torch's own forms.

    Exit codes: 0 done, 1 it cannot be read or written, and nothing is left of OUT.
    """
    from offload_adam.checkpoint.convert import export_dcp, export_torch
    from offload_adam.errors import CheckpointError

    try:
        taken_by = (export_torch if form is ExportForm.TORCH else export_dcp)(path, out)
    except (CheckpointError, OSError) as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DAMAGED) from None
    typer.echo(f"{out} is written, for {taken_by}")


@checkpoint_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What torch.save has written.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    form: Annotated[
        ImportForm,
        typer.Option(
            "--format", help="torch-pickle: unpickle FILE, tensors and plain values of it alone."
        ),
    ],
    model_key: Annotated[str, typer.Option(help="Where in it the model's state dict is.")] = (
        "model"
    ),
    optimizer_key: Annotated[str, typer.Option(help="Where the optimizer's is.")] = "optimizer",
    names: Annotated[
        Path | None,
        typer.Option(help="The optimizer's parameters by name, one a line, in its order."),
    ] = None,
) -> None:
    """Make a checkpoint of a pickled torch.optim.AdamW and its model.

    Exit codes: 0 done, 1 it cannot be read, and nothing is left of OUT.
    """
    from offload_adam.checkpoint.convert import import_torch_pickle
    from offload_adam.errors import CheckpointError
    from offload_adam.units import format_nbytes

    try:
        nbytes = import_torch_pickle(
            source,
            out,
            model_key=model_key,
            optimizer_key=optimizer_key,
            names=None if names is None else names.read_text(encoding="utf-8").split(),
        )
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        typer.echo(f"offload-adam: {error}", err=True)
        raise typer.Exit(EXIT_DAMAGED) from None
    typer.echo(f"{out} is written, {format_nbytes(nbytes)}, for load_checkpoint")
