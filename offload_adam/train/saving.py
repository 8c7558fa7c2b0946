"""The job's checkpoints: written during training, pruned, and loaded when a run resumes."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from offload_adam.checkpoint.background import PendingCheckpoint, begin_checkpoint
from offload_adam.checkpoint.commit import PARTIAL_SUFFIX, discard, flush
from offload_adam.checkpoint.load import load_checkpoint, verify_checkpoint
from offload_adam.checkpoint.save import require_shared, save_checkpoint
from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.config.sections import COMPLETE
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.ranks import attempt
from offload_adam.errors import CheckpointError, PeerError, PeerFailedError
from offload_adam.options import MAX_STEP_COUNT
from offload_adam.train.loop import Job
from offload_adam.train.optimizer import keep_path
from offload_adam.train.records import CheckpointTotals
from offload_adam.train.run_folder import run_folder
from offload_adam.train.run_state import describe_state, read_state, restore_state
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)

FOLDER_NAME = "checkpoints"
_STEP = r"step-([1-9][0-9]{0,7})"  # at most MAX_STEP_COUNT
_UNFINISHED = re.compile(_STEP + r"(\.[0-9a-f-]+)?" + re.escape(PARTIAL_SUFFIX))

MAY_CHANGE = (
    "run.dir",
    "run.name",
    "train.num_steps",
    "train.eval_every",
    "train.eval_sequences",
    "optimizer.num_threads",
    "optimizer.bucket_nbytes",
    "optimizer.overlap",
    "parallel.shard",
    "parallel.replicate",
    "parallel.offload_weights",
    "parallel.reshard_after_forward",
    "memory.",
    "coordinator.",
    "profile.",
    "observe.",
    "checkpoint.",
)
"""Prefixes of the keys that a resumed run may change. One that ends with a dot is a section."""

# A key that a resumed run may change from this saved value: `load_checkpoint` rounds fp32 state.
_MAY_CHANGE_FROM = ("optimizer.state_format", "fp32")


class CheckpointSaver:
    """Writes the checkpoints of one job to `<run folder>/checkpoints/step-<n>`.

    With `checkpoint.mode: async`, training continues while a checkpoint is written, except for the
    last one. If the next checkpoint is due before that, the training thread waits. A checkpoint
    that cannot be written is logged and counted. With `checkpoint.required`, the CheckpointError,
    PeerError or OSError is raised instead.

    Args:
        require_held: raises an error if another job has taken over the run's folder.
    """

    def __init__(self, job: Job, require_held: Callable[[], None]) -> None:
        self._job = job
        self._require_held = require_held
        self.totals = CheckpointTotals()
        # The checkpoint that was started last: its step, when, and if it is still being written.
        self._step, self._start_s = 0, 0.0
        self._pending: PendingCheckpoint | None = None
        # Checkpoints that this process has written, or has read completely without an error. The
        # lock of the run's folder keeps other runs from changing them.
        self._intact: set[Path] = set()
        if job.resumed_from is not None:
            self._intact.add(job.resumed_from)
            self.totals.last_step = job.first_step - 1
            with suppress(OSError):
                age_s = time.time() - job.resumed_from.stat().st_mtime
                self.totals.last_commit_s = time.monotonic() - age_s

    def save(self, step: int, *, last: bool) -> None:
        """Write a checkpoint of the state after this step, or begin to in async mode. Collective.

        Args:
            last: no step follows, so commit the checkpoint before returning.
        """
        self._require_held()
        if self._pending is not None:
            logger.info("Waiting for checkpoint %s to be written", self._path)
            with self._tolerating():
                self._pending.wait()
                self._committed()
        job = self._job
        self._step, self._start_s = step, time.monotonic()
        with self._tolerating():
            extra = describe_state(job, step)
            if job.config.checkpoint.mode == "async" and not last:
                self._pending = begin_checkpoint(
                    self._path, model=job.model, optimizer=job.optimizer, extra=extra
                )
            else:
                save_checkpoint(self._path, model=job.model, optimizer=job.optimizer, extra=extra)
                self._committed()

    def is_saved(self, step: int) -> bool:
        """Return whether there is a checkpoint of a step. Collective."""
        # Rank 0 decides: a network file system may show the folder to the other ranks later.
        own = checkpoint_path(self._job.config, step).is_dir()
        return gather_texts(self._job.optimizer.ranks, str(own))[0] == str(True)

    def commit_written(self) -> None:
        """Commit the pending checkpoint if the last step reported that all ranks have written it.

        Collective only when it commits, so call it on all ranks after the same step.
        """
        if self._pending is not None:
            with self._tolerating():
                if self._pending.commit_if_written():
                    self._committed()

    @property
    def _path(self) -> Path:
        return checkpoint_path(self._job.config, self._step)

    def _committed(self) -> None:
        """On rank 0: count and log the checkpoint just committed, and remove old ones."""
        path, pending, self._pending = self._path, self._pending, None
        if self._job.world.rank != 0:
            return
        self._require_held()
        self._intact.add(path)
        totals, size = self.totals, "unknown size"
        totals.num_written += 1
        totals.last_step, totals.last_commit_s = self._step, time.monotonic()
        totals.last_duration_s = time.monotonic() - self._start_s
        with suppress(OSError):  # a disk that fails after the commit must not end the run
            nbytes = sum(file.stat().st_size for file in path.iterdir())
            totals.nbytes += nbytes
            size = format_nbytes(nbytes)
        logger.info("Wrote checkpoint %s (%s in %.1f s)", path, size, totals.last_duration_s)
        if pending is not None and pending.num_waits > 0:
            logger.info(
                "Updates waited %d times, %.2f s in total, for checkpoint %s. A larger "
                "checkpoint.snapshot_buffer_nbytes shortens these waits.",
                pending.num_waits,
                pending.waited_s,
                path,
            )
        self._prune(path.parent)

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """Continue without the checkpoint if the body raises an error, unless it is required.

        All ranks raise an error or none does: the functions called in the body ensure that.
        """
        try:
            yield
        except PeerFailedError:
            raise
        except (OSError, CheckpointError, PeerError) as error:
            self._pending = None
            self.totals.num_failed += 1
            text = (
                "Cannot write checkpoint %s (%d failed so far): %s. Training continues without it"
            )
            _tolerate(error, self._job, text, self._path, self.totals.num_failed)

    def _prune(self, folder: Path) -> None:
        """Remove old checkpoints, and unfinished ones of killed runs.

        Only checkpoints known to be intact count for `keep_last`: a damaged one must not cause the
        removal of an older, intact one.
        """
        section = self._job.config.checkpoint
        steps = steps_in(folder)
        intact = [step for step in steps if folder / f"step-{step}" in self._intact]
        for step in steps:
            is_old = len(intact) >= section.keep_last and step < intact[-section.keep_last]
            if is_old and (section.keep_every is None or step % section.keep_every):
                shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
        for unfinished in folder.glob(f"step-*{PARTIAL_SUFFIX}"):
            # This run holds the lock of the folder and has no save in progress here, so these are
            # from killed runs. Other names are kept: the user may be exporting a checkpoint to this
            # folder right now.
            if _UNFINISHED.fullmatch(unfinished.name):
                discard(unfinished)


def require_shared_folder(job: Job) -> None:
    """Check before the first step that all ranks write to one shared folder. Collective.

    If the folder cannot be written to, that is only logged, unless checkpoints are required: the
    user may fix it before the first checkpoint is due.

    Raises:
        CheckpointError: the ranks do not share the folder.
        PeerError, OSError: the folder cannot be written to, and `checkpoint.required` is set.
    """
    if job.config.checkpoint.every == 0 or job.world.world_size == 1:
        return
    folder = run_folder(job.config) / FOLDER_NAME
    try:
        with PROGRESS.at("checkpoint", long_running=True):
            require_shared(folder, job.optimizer.ranks)
    except PeerFailedError:
        raise
    except (OSError, PeerError) as error:
        text = (
            "Cannot write checkpoints to %s: %s. Training starts nevertheless. Make the folder "
            "writable before the first checkpoint"
        )
        _tolerate(error, job, text, folder)


def _tolerate(error: Exception, job: Job, text: str, *values: object) -> None:
    """Log an error, or raise it if checkpoints are required.

    Args:
        text, values: the log message and its arguments, to which the error's text is added.
    """
    if job.config.checkpoint.required:
        raise error
    # Log each error once: an OSError is this rank's own, but other errors are raised on all ranks.
    if isinstance(error, OSError) or job.world.rank == 0:
        logger.error(text, *values, str(error).removesuffix("."), exc_info=error)


def checkpoint_path(config: RunConfig, step: int) -> Path:
    """Return the path of the checkpoint that is written after a step."""
    return run_folder(config) / FOLDER_NAME / f"step-{step}"


def steps_in(folder: Path) -> list[int]:
    """Return the sorted steps of the checkpoints in a folder, by the names that a run gives."""
    matches = (re.fullmatch(_STEP, path.name) for path in folder.glob("step-*") if path.is_dir())
    steps = (int(match[1]) for match in matches if match is not None)
    return sorted(step for step in steps if step <= MAX_STEP_COUNT)


def describe_lost_steps(config: RunConfig) -> str:
    """Return a sentence that says which steps are lost if the run ends now."""
    if config.memory.keep != "none":
        kept = f"the last step is kept in {keep_path(config)}: start again on this node to resume"
        is_freed = config.memory.keep == "keeper"
        return kept + (f", within {config.memory.keep_for:g} s" if is_freed else "")
    newest = max(steps_in(run_folder(config) / FOLDER_NAME), default=None)
    if newest is None:
        return "there is no checkpoint: all steps of the run are lost"
    path = checkpoint_path(config, newest)
    return f"the newest checkpoint is {path}: the steps after it are lost"


def find_checkpoint(config: RunConfig) -> Path | None:
    """Return the checkpoint to resume from, None if the run begins at its first step.

    With `checkpoint.resume: auto`, and after every restart by torchrun, it is the newest intact
    checkpoint in the run's folder. Checkpoints are read completely, from the newest on. Warnings
    name the damaged ones, which are skipped, and say if the run begins at its first step for that.

    Raises:
        ConfigError: `checkpoint.resume` is the path of a damaged or missing checkpoint.
    """
    resume = config.checkpoint.resume
    folder = run_folder(config) / FOLDER_NAME
    steps = steps_in(folder) if resume == "auto" or attempt() > 0 else []
    found = newest_intact(folder, steps)
    if found is not None:
        return found
    if resume in ("auto", "never"):
        if steps:
            logger.warning("Starting from the first step: no checkpoint in %s is intact", folder)
        return None
    try:
        verify_checkpoint(resume)
    except CheckpointError as error:
        problem = f"must be auto, never or the folder of an intact checkpoint: {error}"
        raise ConfigError.at("checkpoint.resume", problem) from error
    return Path(resume)


def newest_intact(folder: Path, steps: Sequence[int]) -> Path | None:
    """Return the newest intact one of these checkpoints; warnings name the damaged ones.

    Args:
        steps: sorted.
    """
    for step in reversed(steps):
        try:
            verify_checkpoint(folder / f"step-{step}")
        except CheckpointError as error:  # the message has the path
            logger.warning("Skipping checkpoint step-%d: %s", step, error)
        else:
            return folder / f"step-{step}"
    return None


def set_aside(config: RunConfig, first_step: int) -> None:
    """Move the checkpoints of `first_step` and later steps to a new subfolder `earlier-<n>`.

    They are damaged or from an earlier run. If they stayed, this run could not write its own
    checkpoints of these steps, and a later start would resume from them.
    """
    folder = run_folder(config) / FOLDER_NAME
    later = [step for step in steps_in(folder) if step >= first_step]
    if not later:
        return
    steps = ", ".join(map(str, later))
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    try:
        aside.mkdir()
        for step in later:
            (folder / f"step-{step}").rename(aside / f"step-{step}")
        # The next save makes the removal from `folder` durable. The new names must be so before.
        flush(aside)
    except OSError:
        logger.exception(
            "Cannot move checkpoints of an earlier run (step %s) out of %s. Move or delete them: "
            "this run cannot replace them, and a later start would resume from them.",
            steps,
            folder,
        )
        return
    logger.warning(
        "Moved the checkpoints of step(s) %s, from which this run does not resume, to %s",
        steps,
        aside,
    )


def resume(job: Job) -> Job:
    """Load the checkpoint to resume from, if there is one; return the job to continue. Collective.

    Rank 0 chooses the checkpoint. Random states are restored if the world size is that of the
    checkpoint. Otherwise each rank keeps the random state of its seed, so dropout differs from that
    of an uninterrupted run.

    Raises:
        ConfigError: a key differs that may not change, or the path in `checkpoint.resume` has no
            intact checkpoint of a training run.
        CheckpointError: the checkpoint is of another model, or its state of the run is invalid. The
            latter is found before anything is modified.
    """
    ranks = job.optimizer.ranks
    with PROGRESS.at("checkpoint", long_running=True):
        with raise_on_all_ranks(ranks, "looking for a checkpoint"):
            own = find_checkpoint(job.config) if job.world.rank == 0 else None
        found = gather_texts(ranks, "" if own is None else str(own))[0]
    if not found:
        if job.world.rank == 0:
            set_aside(job.config, job.first_step)
        return job
    path = Path(found)
    state = read_state(job, path)
    reject_changes(job.config, state.config)
    load_checkpoint(path, model=job.model, optimizer=job.optimizer)
    restore_state(job, state)
    first_step = state.step + 1
    if job.world.rank == 0:
        logger.info("Resuming from %s at step %d", path, state.step)
        set_aside(job.config, first_step)
    return replace(job, first_step=first_step, first_sample=state.samples, resumed_from=path)


def reject_changes(
    config: RunConfig, saved: Mapping[str, Mapping[str, Any] | None], place: str = "the checkpoint"
) -> None:
    """Reject a configuration that differs from the saved one in keys that may not change.

    Args:
        place: what `saved` is from, for the error message.

    Raises:
        ConfigError: names the keys and both values.
    """
    mistakes = []
    now = config.model_dump(mode="json")
    for section in sorted({*now, *saved}):
        values, before = now.get(section) or {}, saved.get(section) or {}
        # null means the default, and so does a key that the checkpoint's version did not have. A
        # section may be absent.
        defaults: dict[str, Any] = {}
        if section in now:
            kind = type(getattr(config, section) or getattr(COMPLETE, section))
            defaults = kind.model_construct().model_dump(mode="json")
        for key in sorted({*values, *before}):
            name = f"{section}.{key}"
            was, becomes = (
                defaults.get(key) if found.get(key) is None else found[key]
                for found in (before, values)
            )
            may_change = name.startswith(MAY_CHANGE) or (name, was) == _MAY_CHANGE_FROM
            if becomes != was and not may_change:
                problem = (
                    f"was {json.dumps(was)} in {place} and is {json.dumps(becomes)} now: "
                    "set it back, or begin a new run with checkpoint.resume=never and another "
                    "run.name"
                )
                mistakes.append(Mistake(name, problem))
    if mistakes:
        raise ConfigError("configuration", mistakes)
