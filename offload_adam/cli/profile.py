"""`offload-adam profile`: a training run that records where its time and memory go."""

from __future__ import annotations

from offload_adam.cli.logs import LogFormat
from offload_adam.cli.train import (
    ConfigArgument,
    LogFormatOption,
    OverridesArgument,
    run_to_exit_code,
)


def profile(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Train as configured in CONFIG, alone or under torchrun, and write a profile.

    The run's folder gets report.html, which begins with what bounds a step and which setting to
    change; trace.json for Perfetto; and memory.jsonl with samples of the memory in use.

    This is `train` with profile.enabled. A few dozen steps are enough: --train.num_steps=50.
    Exit codes: as for `train`.
    """
    run_to_exit_code([config, "--profile.enabled=true", *(overrides or [])], log_format)
