"""`offload-adam doctor`: look at this machine, and say what to fix."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

EXIT_FAILED = 1
EXIT_WRONG_OPTION = 2


def doctor(
    local_world_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks to be started on this node; one a GPU by default, or one."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where runs are to be written (run.dir).")
    ] = Path("runs"),
    measure: Annotated[
        bool, typer.Option(help="Measure memory, bus and disk, which takes some seconds.")
    ] = True,
    params: Annotated[
        float | None,
        typer.Option(min=1, help="Parameters that this node's ranks save, for the last save."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything found to this file.")
    ] = None,
) -> None:
    """Say what this machine gives a run, line by line: ok, warning or failed, and what to do.

    The measured bandwidth is kept in the user's cache folder, and training compares itself with it.

    Exit codes: 0 nothing has failed, 1 something has, 2 a wrong option.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        _refuse(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one rank of a node speaks, and measures alone
    from rich.console import Console

    from offload_adam.doctor.examination import examine
    from offload_adam.doctor.finding import Status
    from offload_adam.doctor.tables import findings_table, summary

    found = examine(_ranks(local_world_size), folder, measure=measure, num_parameters=params)
    console = Console()
    console.print(findings_table(found.findings))
    console.print(summary(found.findings), highlight=False)
    if json_file is not None:
        values = {
            "status": found.status.value,
            "findings": [asdict(finding) for finding in found.findings],
            "bandwidth_gb_per_s": {str(n): value for n, value in found.bandwidth.memory.items()},
            "step_gb_per_s": found.bandwidth.step,
        }
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if found.status is Status.FAILED:
        raise typer.Exit(EXIT_FAILED)


def _ranks(given: int | None) -> int:
    """Return the ranks of this node: as given, as torchrun says, or one for each GPU."""
    import torch

    if given is not None:
        return given
    told = os.environ.get("LOCAL_WORLD_SIZE")
    if told is None:
        return max(1, torch.cuda.device_count())
    if not told.isdecimal() or int(told) < 1:
        _refuse(f"LOCAL_WORLD_SIZE must be an int of at least 1, not {told!r}")
    return int(told)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"offload-adam: {message}", err=True)
    raise typer.Exit(EXIT_WRONG_OPTION)
