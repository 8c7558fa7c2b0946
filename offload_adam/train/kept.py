"""Resumes a run from the state that its last process has kept in memory, if nothing is newer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offload_adam.config import ConfigError, RunConfig
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup, attempt
from offload_adam.sharded_optimizer.kept_values import extra_of
from offload_adam.step.kept_steps import find_kept_step
from offload_adam.train.loop import Job
from offload_adam.train.optimizer import keep_path, offload_policy
from offload_adam.train.run_folder import run_folder
from offload_adam.train.run_state import read_kept, restore_kept
from offload_adam.train.saving import (
    FOLDER_NAME,
    newest_intact,
    reject_changes,
    set_aside,
    steps_in,
)

logger = logging.getLogger(__name__)


def may_resume_kept(config: RunConfig, ranks: RankGroup) -> bool:
    """Return whether kept state comes before checkpoints. Collective.

    Kept state comes first with `checkpoint.resume: auto` and after a restart by torchrun, unless
    there is an intact checkpoint of a later step. The optimizer still checks the state itself.

    Raises:
        ConfigError: a key differs that may not change, or the state is of another run or program.
    """
    if config.memory.keep == "none":
        return False
    resumes = config.checkpoint.resume == "auto" or attempt() > 0
    with raise_on_all_ranks(ranks, "looking for kept state"):
        own = find_kept_step(offload_policy(config), ranks)
        if own is not None and own.step > 0:
            # Now, because the optimizer deletes state that it does not use.
            _reject_other(config, extra_of(own.payload), resumes=resumes)
    if not resumes:
        return False
    texts = gather_texts(ranks, "" if own is None else str(own.step))
    # Some ranks may have decided a step that others still have to complete.
    newest = max((int(text) for text in texts if text), default=None)
    if not newest:
        # If there is a file without a readable step, the optimizer logs the reason.
        return newest is not None
    with (
        PROGRESS.at("checkpoint", long_running=True),
        raise_on_all_ranks(ranks, "looking for a checkpoint"),
    ):
        folder = run_folder(config) / FOLDER_NAME
        later = [step for step in steps_in(folder) if step > newest] if ranks.rank == 0 else []
        checkpoint = newest_intact(folder, later)
    found = gather_texts(ranks, "" if checkpoint is None else str(checkpoint))[0]
    if found and ranks.rank == 0:
        logger.info("Not resuming from kept state at step %d: %s is newer", newest, found)
    return not found


def _reject_other(config: RunConfig, extra: Mapping[str, Any], *, resumes: bool) -> None:
    """Reject the kept state of another run, or of this one with keys that may not change.

    Args:
        extra: of `describe_kept`.
        resumes: this start continues from it, and does not replace it.

    Raises:
        ConfigError: names the other run, or the keys.
    """
    own, folder = str(run_folder(config).absolute()), extra.get("folder")
    if folder != own:
        whose = f"the run in {folder}" if isinstance(folder, str) else "another program"
        raise ConfigError.at(
            "memory.keep_path",
            f"{keep_path(config)} has the state of {whose}: choose another folder, or delete it",
        )
    if resumes:
        reject_changes(config, json.loads(extra["config"]), "kept state")


def resume_kept(job: Job) -> Job:
    """Return the job that continues the step that the optimizer has completed from kept state."""
    kept = job.optimizer.resumed_step
    assert kept is not None
    state, loss = read_kept(kept.extra)
    restore_kept(job, state)
    first_step = state.step + 1
    if job.world.rank == 0:
        set_aside(job.config, first_step)
    return replace(job, first_step=first_step, first_sample=state.samples, resumed_loss=loss)
