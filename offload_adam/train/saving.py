"""Checkpoints of the job: written as it trains, kept as many as wanted, found at the next start."""

from __future__ import annotations

import base64
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offload_adam.checkpoint.background import PendingCheckpoint, begin_checkpoint
from offload_adam.checkpoint.commit import PARTIAL_SUFFIX, discard
from offload_adam.checkpoint.format import read_manifest
from offload_adam.checkpoint.load import load_checkpoint, verify_checkpoint
from offload_adam.checkpoint.save import require_shared, save_checkpoint
from offload_adam.config import ConfigError, RunConfig
from offload_adam.coordinator.admission import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import attempt
from offload_adam.errors import CheckpointError, PeerError, PeerFailedError
from offload_adam.train.loop import Job
from offload_adam.train.run_folder import run_folder

logger = logging.getLogger(__name__)

FOLDER_NAME = "checkpoints"
_STEP_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"step-\d+(\.[0-9a-f-]+)?" + re.escape(PARTIAL_SUFFIX))

MAY_CHANGE = (
    "run.dir",
    "run.name",
    "train.num_steps",
    "train.eval_every",
    "train.eval_sequences",
    "optimizer.num_threads",
    "optimizer.bucket_nbytes",
    "optimizer.overlap",
    "memory.",
    "coordinator.",
    "profile.",
    "observe.",
    "checkpoint.",
)
"""Keys (a dot at the end stands for a section) that a resumed run may have otherwise."""


class CheckpointSaver:
    """Writes checkpoints of one job under `<run folder>/checkpoints/step-<n>`.

    With `checkpoint.mode: async` training goes on meanwhile, but for the last one of a run. One is
    written at a time: where the next is due before it has ended, the training thread waits for it.

    Args:
        require_held: raises where another job has taken the run's folder over.

    num_failed counts what could not be written: a run goes on without, unless
    `checkpoint.required`.
    """

    def __init__(self, job: Job, require_held: Callable[[], None] = lambda: None) -> None:
        self._job = job
        self._require_held = require_held
        self._pending: tuple[Path, PendingCheckpoint] | None = None
        # What this process has written or read to the last byte; the run's lock keeps others out.
        self._whole = set() if job.resumed_from is None else {job.resumed_from}
        self.num_failed = 0

    def save(self, step: int, *, last: bool) -> None:
        """Write a checkpoint of the state after this step, or begin to. Collective.

        Args:
            last: nothing follows it; it is committed when this returns.

        Raises:
            CheckpointError, PeerError, OSError: where `checkpoint.required`.
        """
        self._require_held()
        self._finish_pending()
        path = checkpoint_path(self._job.config, step)
        job = self._job
        with self._tolerating(path):
            if self._stands(path):
                return
            extra = {
                "step": step,
                "samples": job.samples_before(step + 1),
                "config": job.config.model_dump(mode="json"),
                "train": _state(job),
            }
            if job.config.checkpoint.mode == "async" and not last:
                self._pending = (
                    path,
                    begin_checkpoint(path, model=job.model, optimizer=job.optimizer, extra=extra),
                )
            else:
                save_checkpoint(path, model=job.model, optimizer=job.optimizer, extra=extra)
                self._keep(path)

    def commit_written(self) -> None:
        """Commit what all ranks have written meanwhile, as the last step has told. Collective then.

        Raises:
            CheckpointError, PeerError, OSError: where `checkpoint.required`.
        """
        if self._pending is None:
            return
        path, pending = self._pending
        with self._tolerating(path):
            if not pending.commit_if_written():
                return
            self._committed(path, pending)
        self._pending = None

    def _finish_pending(self) -> None:
        """Wait for the checkpoint that is being written in the background. Collective."""
        if self._pending is None:
            return
        path, pending = self._pending
        self._pending = None
        logger.info("waiting for checkpoint %s to be written", path)
        with self._tolerating(path):
            pending.wait()
            self._committed(path, pending)

    def _committed(self, path: Path, pending: PendingCheckpoint) -> None:
        """Say what it has cost, and remove what is too old."""
        if pending.num_waits > 0 and self._job.world.rank == 0:
            logger.info(
                "updates waited for checkpoint %s %d times, %.2f s together: with a larger "
                "checkpoint.snapshot_buffer_nbytes they wait less",
                path,
                pending.num_waits,
                pending.waited_s,
            )
        self._keep(path)

    def _stands(self, path: Path) -> bool:
        """Tell whether this run has written the checkpoint already; set another one aside.

        Collective: rank 0 looks, since ranks may see a shared folder change at different times.
        """

        ranks = self._job.optimizer.ranks
        stands = False
        with raise_on_all_ranks(ranks, "looking for a checkpoint"):
            if ranks.rank == 0 and path.exists():
                stands = path in self._whole
                if not stands:  # whole or not, it is none of this run's steps
                    aside = _move_aside(path.parent, [path.name])
                    logger.warning(
                        "%s was not written by this run: moved into %s", path, aside.name
                    )
        return gather_texts(ranks, "written" if stands else "")[0] == "written"

    @contextmanager
    def _tolerating(self, path: Path) -> Iterator[None]:
        """Let a checkpoint fail inside, unless it is required; the ranks' verdicts are the same."""
        try:
            yield
        except PeerFailedError:
            raise
        except (OSError, CheckpointError, PeerError):
            self._pending = None
            self.num_failed += 1
            if self._job.config.checkpoint.required:
                raise
            logger.exception(
                "checkpoint %s cannot be written (%d so far); training goes on without it",
                path,
                self.num_failed,
            )

    def _keep(self, path: Path) -> None:
        """Count a committed checkpoint, and remove those that are not to be kept.

        Only checkpoints that are known to be whole count for `keep_last`: a damaged one must not
        make an older, whole one go. What killed runs have left unfinished is removed, too.
        """
        if self._job.world.rank != 0:
            return
        self._require_held()
        self._whole.add(path)
        section, folder = self._job.config.checkpoint, path.parent
        steps = sorted(steps_in(folder))
        whole = [step for step in steps if folder / f"step-{step}" in self._whole]
        for step in steps:
            is_old = len(whole) >= section.keep_last and step < whole[-section.keep_last]
            if is_old and (section.keep_every is None or step % section.keep_every):
                shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
        for unfinished in folder.glob(f"step-*{PARTIAL_SUFFIX}"):
            # The run's lock says that no other save writes these; an export may be beside them.
            if _UNFINISHED.fullmatch(unfinished.name):
                discard(unfinished)


def require_place(job: Job) -> None:
    """Find before the first step that the ranks do not write to one disk. Collective.

    A place that cannot be written may be mended before the first is due, and is only logged.

    Raises:
        CheckpointError: the folder is not shared by all ranks.
        PeerError, OSError: it cannot be written, where `checkpoint.required`.
    """
    section = job.config.checkpoint
    if section.every == 0 or job.world.world_size == 1:
        return
    folder = run_folder(job.config) / FOLDER_NAME
    try:
        with PROGRESS.at("checkpoint", long_running=True):
            require_shared(folder, job.optimizer.ranks)
    except PeerFailedError:
        raise
    except (OSError, PeerError):
        if section.required:
            raise
        logger.exception("no checkpoint could be written into %s now; training begins", folder)


def checkpoint_path(config: RunConfig, step: int) -> Path:
    """Return where the checkpoint after a step is."""
    return run_folder(config) / FOLDER_NAME / f"step-{step}"


def steps_in(folder: Path) -> Iterator[int]:
    """Yield the steps of the committed checkpoints in a folder."""
    for path in folder.glob("step-*"):
        match = _STEP_NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            yield int(match[1])


def what_stands(config: RunConfig) -> str:
    """Return what a run that ends now has saved, and what is lost."""
    newest = max(steps_in(run_folder(config) / FOLDER_NAME), default=None)
    if newest is None:
        return "there is no checkpoint: all steps of the run are lost"
    return f"checkpoint {checkpoint_path(config, newest)} stands; the steps after it are lost"


def find_checkpoint(config: RunConfig) -> Path | None:
    """Return the checkpoint that a run goes on from, None to begin.

    With `checkpoint.resume: auto`, and whenever torchrun has restarted the run, it is the newest
    whole one of the run's folder: each is read to its last byte before it is taken, and a damaged
    one is passed over with a warning.

    Raises:
        ConfigError: `checkpoint.resume` names one that is not whole.
    """
    resume = config.checkpoint.resume
    if resume == "auto" or attempt() > 0:
        found = _newest_whole(run_folder(config) / FOLDER_NAME)
        if found is not None:
            return found
    if resume in ("auto", "never"):
        return None
    try:
        verify_checkpoint(resume)
    except CheckpointError as error:
        raise ConfigError.at("checkpoint.resume", str(error)) from error
    return Path(resume)


def _newest_whole(folder: Path) -> Path | None:
    for step in sorted(steps_in(folder), reverse=True):
        path = folder / f"step-{step}"
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Skipping checkpoint %s: %s", path, error)
        else:
            return path
    return None


def set_aside(config: RunConfig, first_step: int) -> None:
    """Move checkpoints of this step and later ones out of the way of those that the run will write.

    They are damaged, or another run's: were they left, this one could not write its own, and a
    later start would go on from theirs. They stay in a folder beside the others.
    """
    folder = run_folder(config) / FOLDER_NAME
    later = [step for step in sorted(steps_in(folder)) if step >= first_step]
    if not later:
        return
    try:
        aside = _move_aside(folder, [f"step-{step}" for step in later])
    except OSError:
        logger.exception("%s holds checkpoints of an earlier run, which cannot be moved", folder)
        return
    logger.warning(
        "%s holds checkpoints of step(s) %s that this run does not go on from: they are in %s now",
        folder,
        ", ".join(map(str, later)),
        aside.name,
    )


def _move_aside(folder: Path, names: Sequence[str]) -> Path:
    """Move checkpoints to a new folder `earlier-<n>` beside them, and return it."""
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for name in names:
        (folder / name).rename(aside / name)
    return aside


def resume(job: Job) -> Job:
    """Load the checkpoint to go on from, if there is one, and return the job after it. Collective.

    Rank 0 looks for it. Random states are restored where the world is as large as it was;
    otherwise each rank has drawn its own from the seed, and what depends on them differs.

    Raises:
        ConfigError: a key has changed that may not; the checkpoint named is damaged.
        CheckpointError: it is of another model.
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
    _reject_changes(job.config, _config_of(Path(found)))
    extra = load_checkpoint(found, model=job.model, optimizer=job.optimizer)
    _load_state(job, extra["train"])
    step: int = extra["step"]
    if job.world.rank == 0:
        logger.info("Resuming from %s at step %d", found, step)
        set_aside(job.config, step + 1)
    return replace(
        job,
        first_step=step + 1,
        first_sample=extra["samples"],
        resumed_from=Path(found),
    )


def _config_of(path: Path) -> dict[str, Any]:
    """Return the configuration of the run that wrote a checkpoint.

    Raises:
        ConfigError: no training run wrote it.
    """
    extra = read_manifest(path).decoded_extra()
    if not {"step", "samples", "config", "train"} <= set(extra):
        raise ConfigError.at(
            "checkpoint.resume",
            f"{path} was not written by a training run: load it with load_checkpoint in a loop "
            "of your own",
        )
    config: dict[str, Any] = extra["config"]
    return config


def _reject_changes(config: RunConfig, saved: dict[str, Any]) -> None:
    """Reject a run that is not the one that was saved.

    Raises:
        ConfigError: naming the key and both values.
    """
    now = config.model_dump(mode="json")
    for section in sorted({*now, *saved}):
        values, before = now.get(section, {}), saved.get(section, {})
        for key in sorted({*values, *before}):
            path = f"{section}.{key}"
            if values.get(key) != before.get(key) and not path.startswith(MAY_CHANGE):
                raise ConfigError.at(
                    path,
                    f"was {json.dumps(before.get(key))} in the checkpoint, and is "
                    f"{json.dumps(values.get(key))}: set it back, or begin anew with "
                    "checkpoint.resume=never and another run.name",
                )


def _state(job: Job) -> dict[str, Any]:
    """Return the schedule, and every rank's random state. Collective."""
    random = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode("ascii")
    every = gather_texts(job.optimizer.ranks, random)
    schedule = None if job.schedule is None else job.schedule.state_dict()
    return {"schedule": schedule, "random": every}


def _load_state(job: Job, state: dict[str, Any]) -> None:
    if job.schedule is not None and state["schedule"] is not None:
        job.schedule.load_state_dict(state["schedule"])
    if len(state["random"]) == job.world.world_size:
        content = bytearray(base64.b64decode(state["random"][job.world.rank]))
        torch.set_rng_state(torch.frombuffer(content, dtype=torch.uint8))
