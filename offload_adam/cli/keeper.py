"""`offload-adam keeper`: list and stop the processes that hold kept state on this node."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offload_adam.cli.output import fail

if TYPE_CHECKING:
    from offload_adam.kept.keeper_client import RunningKeeper

_STOP_S = 10.0

keeper_app = typer.Typer(
    help="List and stop the processes that hold kept state on this node (memory.keep: keeper).",
    no_args_is_help=True,
)


@keeper_app.command("list")
def list_keepers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the keepers of this user on this node, and the state that they hold.

    Exit codes: 0 done.
    """
    import json

    keepers = _running()
    if as_json:
        typer.echo(json.dumps([_values_of(keeper) for keeper in keepers], indent=2))
    elif not keepers:
        typer.echo("No keeper is running on this node.")
    else:
        _print(keepers)


@keeper_app.command("stop")
def stop(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="Folders of runs, as `list` shows them."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Stop all keepers.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also if the state is in use. The run continues, but is not kept."
        ),
    ] = False,
) -> None:
    """Stop keepers, which frees the state that they hold.

    Exit codes: 0 done, 1 if state is in use, a keeper does not end, or a run has no keeper.
    """
    keepers = _running()
    if everything == bool(folders):
        fail("Name the runs to stop, or pass --all.")
    # Two keepers have the same folder if somebody has deleted it in the meantime.
    found = [os.path.realpath(keeper.folder) for keeper in keepers]
    wanted = [os.path.realpath(folder) for folder in folders or []]
    for folder in wanted:
        if folder not in found:
            fail(f"{folder} has no keeper on this node. `offload-adam keeper list` lists them.")
    pairs = zip(keepers, found, strict=True)
    chosen = [keeper for keeper, folder in pairs if everything or folder in wanted]
    for keeper in chosen:
        if keeper.files is None and not force:
            fail(
                f"The keeper of {keeper.folder}, process {keeper.pid}, does not answer, so a run "
                "may be using its state. Pass --force to end it nevertheless."
            )
        users = sorted({file.pid for file in (keeper.files or {}).values() if file.pid})
        if users and not force:
            fail(
                f"Process(es) {users} use the state in {keeper.folder}. End them first, or pass "
                "--force: the run continues, but a kill then loses its state."
            )
    for keeper in chosen:
        _end(keeper.pid, keeper.folder)
        typer.echo(f"stopped the keeper of {keeper.folder}")


def _running() -> list[RunningKeeper]:
    from offload_adam.kept.keeper_client import running_keepers

    return running_keepers()


def _end(pid: int, folder: Path) -> None:
    import psutil

    try:
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGTERM)
        process.wait(_STOP_S)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass
    except psutil.TimeoutExpired:
        fail(f"The keeper of {folder}, process {pid}, has not ended. Kill it: kill -9 {pid}")


def _values_of(keeper: RunningKeeper) -> dict[str, object]:
    held = keeper.files
    files = None if held is None else {name: held[name]._asdict() for name in held}
    return keeper._asdict() | {"folder": str(keeper.folder), "files": files}


def _print(keepers: Sequence[RunningKeeper]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from offload_adam.printable import MAX_MESSAGE_LENGTH, printable
    from offload_adam.units import format_nbytes

    table = Table(Column("run", overflow="fold"), "rank", "size", "step", "age", "state")
    for keeper in keepers:
        # As Text, since rich would read [bold] in a string as markup.
        run = Text(printable(str(keeper.folder), MAX_MESSAGE_LENGTH))
        if not keeper.files:
            what = "does not answer" if keeper.files is None else "has no state"
            table.add_row(run, "", "", "", "", f"keeper (process {keeper.pid}) {what}")
        for name, file in sorted((keeper.files or {}).items()):
            if file.pid is not None:
                state = f"in use by process {file.pid}"
            else:
                state = "unused"
                if keeper.left_s is not None:
                    state += f", freed in {_duration(keeper.left_s)}"
            table.add_row(
                run,
                name.removeprefix("rank-").lstrip("0") or "0",
                format_nbytes(file.nbytes),
                "none" if file.step is None else str(file.step),
                _duration(file.age_s),
                state,
            )
    Console().print(table)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
