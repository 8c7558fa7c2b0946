"""`offload-adam profile`: a training run that says where its memory and its time went."""

from __future__ import annotations

from typing import Annotated

import typer

from offload_adam.cli.train import run_to_exit_code


def profile(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="--section.key=value", help="What to change of it."),
    ] = None,
) -> None:
    """Train as CONFIG says, alone or under torchrun, and write a profile into the run's folder.

    report.html says at its top what bounds a step and which setting to change; trace.json opens in
    Perfetto; memory.jsonl has the samples of memory. It is `train` with profile.enabled, and a few
    dozen steps are enough: --train.num_steps=50.
    """
    run_to_exit_code([config, "--profile.enabled=true", *(overrides or [])])
