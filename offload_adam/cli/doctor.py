"""`offload-adam doctor`: look at this machine, and say what to fix."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from offload_adam.doctor.network import Network

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

    Under torchrun the ranks measure their collectives together first. The measured bandwidths are
    kept in the user's cache folder: training compares itself with them, and plans are made of them.

    Exit codes: 0 nothing has failed, 1 something has, 2 a wrong option.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        _reject(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    from rich.console import Console

    from offload_adam.doctor.examination import examine
    from offload_adam.doctor.finding import Status
    from offload_adam.doctor.tables import findings_table, summary

    num_ranks = _ranks(local_world_size)
    network = _network(measure=measure)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one rank of a node speaks, and measures the rest alone
    found = examine(num_ranks, folder, measure=measure, num_parameters=params, network=network)
    console = Console()
    console.print(findings_table(found.findings))
    console.print(summary(found.findings), highlight=False)
    if json_file is not None:
        values = {
            "status": found.status.value,
            "findings": [asdict(finding) for finding in found.findings],
            "bandwidth_gb_per_s": {str(n): value for n, value in found.bandwidth.memory.items()},
            "step_gb_per_s": found.bandwidth.step,
            "network": None if network is None else asdict(network),
        }
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if found.status is Status.FAILED:
        raise typer.Exit(EXIT_FAILED)


def _network(*, measure: bool) -> Network | None:
    """Measure the network with the other ranks, and part from them; None for a process alone."""
    from offload_adam.doctor.network import launched_world, look_at_network

    world = launched_world()
    if world is None or not measure:
        return None
    network = look_at_network(world)
    os.environ["WORLD_SIZE"] = "1"  # this process is alone from here on, and may step alone
    return network


def _ranks(given: int | None) -> int:
    """Return the ranks of this node: as given, as torchrun says, or one for each GPU."""
    import torch

    if given is not None:
        return given
    told = os.environ.get("LOCAL_WORLD_SIZE")
    if told is None:
        return max(1, torch.cuda.device_count())
    if not told.isdecimal() or int(told) < 1:
        _reject(f"LOCAL_WORLD_SIZE must be an int of at least 1, not {told!r}")
    return int(told)


def _reject(message: str) -> NoReturn:
    typer.echo(f"offload-adam: {message}", err=True)
    raise typer.Exit(EXIT_WRONG_OPTION)
