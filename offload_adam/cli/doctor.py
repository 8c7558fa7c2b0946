"""`offload-adam doctor`: check this machine before a run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from offload_adam.cli.output import (
    EXIT_BAD_CONFIGURATION,
    EXIT_FAILED,
    fail,
    require_folder_of,
    write_text,
)
from offload_adam.cli.quantities import parse_count
from offload_adam.coordinator.launcher import launched


def doctor(
    local_world_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="LOCAL_WORLD_SIZE",
            help="Ranks to be started on this node. By default one for each GPU, or one.",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="Folder to which runs will be written (run.dir).")
    ] = Path("runs"),
    measure: Annotated[
        bool, typer.Option(help="Measure memory, bus and disk, which takes some seconds.")
    ] = True,
    params: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Parameters that the ranks of this node save, such as 7B. Doctor then checks "
            "the free disk, and whether a preempted run has time to save them.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all findings to this file as JSON.")
    ] = None,
) -> None:
    """Check this machine before a run.

    Each line is ok, a warning or failed, followed by what to do about it.

    Under torchrun, the ranks first measure their collectives together.

    The measured bandwidths are saved in the user's cache folder. Training
    compares its own speed with them, and `offload-adam plan` predicts the time
    of a step from them.

    Exit codes: 0 no check failed, 1 some check failed or --json cannot be written, 2 wrong option
    or environment.
    """
    require_folder_of(json_file, "--json")
    try:
        num_parameters = None if params is None else parse_count("--params", params)
    except ValueError as error:
        fail(error, EXIT_BAD_CONFIGURATION)
    import torch
    from rich.console import Console

    from offload_adam.coordinator.startup import World
    from offload_adam.doctor.examination import examine
    from offload_adam.doctor.finding import findings_table, summary, worst
    from offload_adam.doctor.network import look_at_network

    try:
        World.from_environment()
    except ValueError as error:
        fail(error, EXIT_BAD_CONFIGURATION)
    network = look_at_network() if measure else None
    if network is not None:
        os.environ["WORLD_SIZE"] = "1"  # the ranks have parted: this process may now step alone
    if launched("LOCAL_RANK") != 0:
        return  # one rank of each node runs the other checks: the ranks would disturb each other
    num_ranks = local_world_size or max(1, torch.cuda.device_count())
    findings, bandwidth = examine(
        num_ranks, folder, measure=measure, num_parameters=num_parameters, network=network
    )
    console = Console()
    console.print(summary(findings), highlight=False)
    console.print(findings_table(findings))
    status = worst(findings)
    if json_file is not None:
        values = {
            "status": status,
            "findings": [
                {"topic": one.topic, "status": one.status, "found": one.found, "advice": one.advice}
                for one in findings
            ],
            "bandwidth_gb_per_s": bandwidth.memory,
            "step_gb_per_s": bandwidth.step,
            "network": None if network is None else asdict(network),
        }
        write_text(json_file, json.dumps(values, indent=2) + "\n", "--json")
    if status == "failed":
        raise typer.Exit(EXIT_FAILED)
