"""`offload-adam checkpoint`: look at a checkpoint, and check every byte of it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated

import typer

EXIT_DAMAGED = 1

checkpoint_app = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)

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

    from offload_adam.checkpoint.manifest import ITEMSIZES, read_manifest
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
        nbytes = prod(entry.shape) * ITEMSIZES[entry.dtype]
        shape = " x ".join(map(str, entry.shape)) or "1"
        table.add_row(name, entry.dtype, shape, str(len(entry.pieces)), format_nbytes(nbytes))
    Console().print(table)
