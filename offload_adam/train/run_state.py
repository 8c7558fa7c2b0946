"""The state of a run besides model and optimizer: in checkpoints, and with each step in memory."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from offload_adam.checkpoint.format import LOAD_ANOTHER, read_manifest
from offload_adam.config import ConfigError
from offload_adam.coordinator.rank_checks import gather_texts
from offload_adam.errors import CheckpointError
from offload_adam.options import MAX_STEP_COUNT
from offload_adam.train.run_folder import run_folder

if TYPE_CHECKING:
    from offload_adam.train.loop import Job


class _Entry(BaseModel):
    """Base of the entries of `extra`. Later versions may add fields; no type is converted."""

    model_config = ConfigDict(strict=True)


class _Train(_Entry):
    schedule: dict[str, Any] | None
    random: list[str]


class _Extra(_Entry):
    step: Annotated[int, Field(ge=1, le=MAX_STEP_COUNT)]
    samples: Annotated[int, Field(ge=0, lt=2**63)]
    config: dict[str, dict[str, JsonValue] | None]
    train: _Train


@dataclass(frozen=True)
class RunState:
    """The state of a run after `step`.

    samples: number of samples that all ranks together have seen.
    config: section -> key -> value, None for an absent section.
    schedule: state of the schedule, None if the optimizer has its own.
    random: torch's random state of each rank, uint8.
    """

    step: int
    samples: int
    config: dict[str, dict[str, JsonValue] | None]
    schedule: dict[str, Any] | None
    random: list[torch.Tensor]


def describe_state(job: Job, step: int) -> dict[str, Any]:
    """Return the `extra` of a checkpoint after a step. Collective."""
    every = gather_texts(job.optimizer.ranks, _text_of(torch.get_rng_state()))
    return {
        "step": step,
        "samples": job.samples_before(step + 1),
        "config": job.config.model_dump(mode="json"),
        "train": {"schedule": _schedule_state(job), "random": every},
    }


def describe_kept(job: Job, step: int, loss: torch.Tensor) -> dict[str, Any]:
    """Return the `kept_extra` of a step, before the update and the schedule's step.

    In contrast to `describe_state`, it has this rank's random states alone, with that of a GPU.

    Args:
        loss: 0-d, this rank's mean loss. The host waits for it.
    """
    device = job.world.device
    random = [torch.get_rng_state()]
    if device.type == "cuda":
        random.append(torch.cuda.get_rng_state(device))
    return {
        "folder": str(run_folder(job.config).absolute()),
        "step": step,
        "samples": job.samples_before(step + 1),
        "config": job.config_text,
        "train": {"schedule": _schedule_state(job), "random": list(map(_text_of, random))},
        "loss": float(loss),
    }


def _schedule_state(job: Job) -> dict[str, Any] | None:
    return None if job.schedule is None else job.schedule.state_dict()


def _text_of(random: torch.Tensor) -> str:
    return base64.b64encode(random.numpy().tobytes()).decode("ascii")


def read_state(job: Job, checkpoint: Path) -> RunState:
    """Read and check the state that `describe_state` returned. Modifies nothing.

    Raises:
        ConfigError: no training run has written the checkpoint.
        CheckpointError: the state is invalid.
    """
    manifest = read_manifest(checkpoint)
    values = manifest.decoded_extra()
    if not set(_Extra.model_fields) <= set(values):
        raise ConfigError.at(
            "checkpoint.resume",
            f"{checkpoint} was not written by offload-adam train: load it with load_checkpoint in "
            "your own training loop",
        )
    where = "extra"
    try:
        extra = _Extra.model_validate(values)
        where = "extra.train.schedule"
        schedule = _like(_schedule_state(job), extra.train.schedule)
        where = "extra.train.random"
        if len(extra.train.random) != manifest.world_size:
            raise ValueError(f"must have {manifest.world_size} states, one for each rank")
        random = [_random_state(text) for text in extra.train.random]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (where, *first["loc"])))
        raise CheckpointError(f"{checkpoint}: {place}: {first['msg']}. {LOAD_ANOTHER}") from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint}: {where}: {error}. {LOAD_ANOTHER}") from error
    return RunState(extra.step, extra.samples, extra.config, schedule, random)


def restore_state(job: Job, state: RunState) -> None:
    """Restore the schedule, and the random state if the world size is that of the checkpoint."""
    if job.schedule is not None and state.schedule is not None:
        job.schedule.load_state_dict(state.schedule)
    if len(state.random) == job.world.world_size:
        torch.set_rng_state(state.random[job.world.rank])


def read_kept(extra: Mapping[str, Any]) -> tuple[RunState, torch.Tensor]:
    """Return what `describe_kept` has described: the state of the run, and this rank's loss.

    `RunState.random` has this rank's random states: that of the CPU, and that of its GPU.
    """
    state = RunState(
        extra["step"],
        extra["samples"],
        json.loads(extra["config"]),
        extra["train"]["schedule"],
        list(map(_bytes_of, extra["train"]["random"])),
    )
    return state, torch.tensor(extra["loss"], dtype=torch.float32, device="cpu")


def restore_kept(job: Job, state: RunState) -> None:
    """Restore the schedule, and this rank's random states, to those before an update."""
    if job.schedule is not None and state.schedule is not None:
        job.schedule.load_state_dict(state.schedule)
        # The construction of the schedule has set the rates to those of the first step.
        rates = zip(job.optimizer.param_groups, job.schedule.get_last_lr(), strict=True)
        for group, rate in rates:
            group["lr"] = rate
    torch.set_rng_state(state.random[0])
    for of_gpu in state.random[1:]:
        torch.cuda.set_rng_state(of_gpu, job.world.device)


def _bytes_of(text: str) -> torch.Tensor:
    """Return the bytes in a base64 text, (n,) uint8."""
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8, device="cpu")


def _random_state(text: str) -> torch.Tensor:
    """Return the random state in a base64 text.

    Raises:
        ValueError, RuntimeError: the text has no state that torch accepts.
    """
    state = _bytes_of(text)
    torch.Generator().set_state(state)  # checks it
    return state


def _like(own: Any, saved: Any) -> Any:
    """Return the saved state of a schedule, with the entries that the new schedule's state has.

    `load_state_dict` checks nothing: an unknown entry could replace a method. Other versions of
    torch save other entries, so unknown ones are skipped, and missing ones stay as they are.

    Raises:
        ValueError: a type or a number cannot be that of this schedule.
    """
    if type(saved) is not type(own):
        raise ValueError(f"must be of type {type(own).__name__}, not {type(saved).__name__}")
    if isinstance(own, dict):
        if "last_epoch" in own and "last_epoch" not in saved:
            raise ValueError("last_epoch is missing")
        return {key: _like(own[key], saved.get(key, own[key])) for key in own}
    if isinstance(own, list):
        return [_like(*pair) for pair in zip(own, saved, strict=True)]
    # last_epoch is -1 before the first step of a schedule. Other counts may be divisors.
    if type(own) is int and not min(own, 1) <= saved <= MAX_STEP_COUNT:
        raise ValueError("a count is out of range")
    if type(own) is float and not math.isfinite(saved):
        raise ValueError("a number is not finite")
    return saved
