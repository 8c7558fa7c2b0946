"""Ranks that end during a checkpoint, under torchrun: the run resumes with the same losses."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.train.saving import steps_in
from tests.fault.runs import Ended, run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

SHORT = ("--train.num_steps=12", "--checkpoint.every=4", "--checkpoint.keep_last=9")


def bits(ended: Ended) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in ended.records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Return the records of a run without a fault."""
    ended = run(tmp_path_factory.mktemp("whole"), "", *SHORT)
    assert ended.code == 0, ended.printed
    return bits(ended)


@pytest.mark.parametrize(
    "fault",
    [f"kill@{place}" for place in ("forward", "backward", "reduce", "agree", "update", "gather")]
    + ["hang@update", "raise@forward", "raise@update"],
)
def test_the_loss_curve_is_unchanged_after_any_failure(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], fault: str
) -> None:
    """In step 7, after one of two checkpoints that are due before it; an update beside it, too."""
    overlap = ("--optimizer.overlap=true",) if fault == "raise@update" else ()
    options = ("--max-restarts=1",)
    ended = run(tmp_path, f"{fault}/7", *SHORT, *overlap, options=options)
    assert ended.code == 0, ended.printed
    assert "fault on rank 1: " in ended.printed
    assert "step-4 at step 4" in ended.printed
    assert bits(ended) == uninterrupted
    folder = tmp_path / "tiny" / "checkpoints"
    assert sorted(steps_in(folder)) == [4, 8, 12]
    for step in (4, 8, 12):
        assert verify_checkpoint(folder / f"step-{step}").step == step


@pytest.mark.parametrize(
    "parallel",
    [
        ("--parallel={}",),
        ("--parallel.offload_weights=true", "--optimizer.overlap=true", "--checkpoint.mode=async"),
    ],
)
@pytest.mark.parametrize("fault", ["kill@forward", "kill@update"])
def test_a_sharded_run_that_is_killed_resumes_with_the_same_losses(
    tmp_path: Path, fault: str, parallel: tuple[str, ...]
) -> None:
    """With FSDP2, whose collectives fail on the ranks that are left."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole = run(folders[0], "", *SHORT, *parallel)
    assert whole.code == 0, whole.printed
    options = ("--max-restarts=1",)
    ended = run(folders[1], f"{fault}/7", *SHORT, *parallel, options=options)
    assert ended.code == 0, ended.printed
    assert "fault on rank 1: " in ended.printed
    assert "step-4 at step 4" in ended.printed
    assert bits(ended) == bits(whole)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("place", "newest"),
    [("write", 4), ("written", 4), ("commit", 4), ("rename", 4), ("committed", 8)],
)
def test_a_killed_save_costs_no_more_than_that_checkpoint(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], mode: str, place: str, newest: int
) -> None:
    """A kill -9 in the write, after it, before the manifest, before the rename, and after all."""
    if mode == "async" and place == "committed":
        place, newest = "committed/11", 8  # step 8's is on the disk three steps later
    else:
        place = f"{place}/8"
    options = ("--max-restarts=1",)
    ended = run(tmp_path, f"kill@{place}", *SHORT, f"--checkpoint.mode={mode}", options=options)
    assert ended.code == 0, ended.printed
    assert "is dead: process " in ended.printed
    assert f"Resuming from {tmp_path}/tiny/checkpoints/step-{newest} at step {newest}" in (
        ended.printed.replace("\n", "")
    )
    assert bits(ended) == uninterrupted
    folder = tmp_path / "tiny" / "checkpoints"
    assert sorted(steps_in(folder)) == [4, 8, 12]
    for step in (4, 8, 12):
        assert verify_checkpoint(folder / f"step-{step}").step == step
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_that_is_full_on_one_rank(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], mode: str
) -> None:
    """RLIMIT_FSIZE lets only a part of the file be written. Training continues, with a log line."""
    ended = run(tmp_path, "fill@write/8", *SHORT, f"--checkpoint.mode={mode}")
    assert ended.code == 0, ended.printed
    assert bits(ended) == uninterrupted
    assert "(1 failed so far): " in ended.printed
    assert "Training continues without it" in ended.printed
    assert "(2 failed so far)" in ended.printed
    assert "File too large" in ended.printed
    folder = tmp_path / "tiny" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-4"]
    verify_checkpoint(folder / "step-4")


def with_mounts(*mounts: str, after: str = "true") -> tuple[str, ...]:
    """Return what runs a command where these have been mounted, seen by nobody else.

    Args:
        after: what is done there when the command has ended well.
    """
    within = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")
    commands = [f"mount {words}" for words in mounts]
    try:
        tried = [*within, "; ".join(commands)]
        subprocess.run(tried, check=True, capture_output=True, timeout=20)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"no mount namespaces here: {error}")
    return (*within, "; ".join([*commands, '"$@"', after]), "mounted")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_mount_that_vanishes_in_the_middle(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], mode: str
) -> None:
    """The folder under the mount is read-only. Training continues; the next start has the mount."""
    disk, place = tmp_path / "disk", tmp_path / "tiny" / "checkpoints"
    disk.mkdir()
    place.mkdir(parents=True)
    within = with_mounts(f"-t tmpfs -o ro none {place}", f"--bind {disk} {place}")
    saving = (*SHORT, f"--checkpoint.mode={mode}")
    ended = run(tmp_path, "unmount@write/8", *saving, within=within)
    assert ended.code == 0, ended.printed
    assert bits(ended) == uninterrupted
    assert "step-8 (1 failed so far): " in ended.printed.replace("\n", "")
    assert "step-12 (2 failed so far)" in ended.printed.replace("\n", "")
    assert "Read-only file system" in ended.printed
    assert list(steps_in(disk)) == [4]
    verify_checkpoint(disk / "step-4")
    ended = run(tmp_path, "", *saving, within=within)
    assert "step-4 at step 4" in ended.printed.replace("\n", "")
    assert ended.code == 0, ended.printed
    assert bits(ended) == uninterrupted
    assert sorted(path.name for path in disk.iterdir()) == ["step-12", "step-4", "step-8"]
    assert not list(place.iterdir())  # nothing was written beside the disk


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_of_its_own_that_is_full(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], mode: str
) -> None:
    """There is room for two checkpoints of 0.4 MiB on it, and not for a third."""
    disk, place = tmp_path / "disk", tmp_path / "tiny" / "checkpoints"
    disk.mkdir()
    place.mkdir(parents=True)
    within = with_mounts(f"-t tmpfs -o size=1m none {place}", after=f"cp -r {place} {disk}")
    ended = run(tmp_path, "", *SHORT, f"--checkpoint.mode={mode}", within=within)
    assert ended.code == 0, ended.printed
    assert bits(ended) == uninterrupted
    assert "No space left on device" in ended.printed
    assert "step-12 (1 failed so far): " in ended.printed.replace("\n", "")
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["step-4", "step-8"]
    for step in (4, 8):
        verify_checkpoint(disk / "checkpoints" / f"step-{step}")


def test_a_required_checkpoint_that_fails_ends_the_run(tmp_path: Path) -> None:
    ended = run(tmp_path, "fill@write/8", *SHORT, "--checkpoint.required=true")
    assert ended.code == 1
    assert "File too large" in ended.printed
    assert [record["step"] for record in ended.records] == list(range(1, 9))
