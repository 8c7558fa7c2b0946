"""What a save or an export returns from survives a power failure: files, and all names above them.

`Disk` models a disk on which only flushed data survive. The content of a file survives once fsync
has returned for it; a name in a folder, once fsync has returned for the folder.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam, begin_checkpoint, save_checkpoint
from offload_adam.checkpoint.export import export_dcp, export_torch
from offload_adam.checkpoint.torch_import import import_torch_pickle
from offload_adam.config import RunConfig
from offload_adam.train.saving import set_aside
from tests.unit.test_train_alone import run


class Disk:
    """Records what has been flushed below a folder.

    A partial file or folder must be complete on the disk before a rename publishes it.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._flushed: dict[int, object] = {}  # by inode: a file's size, or a folder's names
        fsync = os.fsync

        def recorded(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._flushed[path.stat().st_ino] = content_of(path)

        monkeypatch.setattr(os, "fsync", recorded)
        for name in ("rename", "link"):
            monkeypatch.setattr(os, name, self._checked(getattr(os, name)))

    def _checked(self, publish: Callable[..., None]) -> Callable[..., None]:
        def checked(source: Path, target: Path) -> None:
            if Path(source).suffix == ".partial":
                assert self.lost([Path(source), *Path(source).glob("**/*")]) == []
            publish(source, target)

        return checked

    def lost(self, paths: list[Path]) -> list[Path]:
        """Return the paths whose content, or some name in them, would not survive."""
        return [path for path in paths if self._differs(path)]

    def assert_durable(self, path: Path) -> None:
        """Check that `path`, what it contains and all names above it survive."""
        assert path.exists()
        assert self.lost([path, *path.glob("**/*")]) == []
        while path != self._root:
            names: Any = self._flushed.get(path.parent.stat().st_ino, {})
            assert names.get(path.name) == path.stat().st_ino, f"{path} is lost"
            path = path.parent

    def _differs(self, path: Path) -> bool:
        return self._flushed.get(path.stat().st_ino) != content_of(path)


def content_of(path: Path) -> object:
    if path.is_dir():
        return {entry.name: entry.stat().st_ino for entry in path.iterdir()}
    return path.stat().st_size


def save(path: Path, *, in_background: bool = False) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = OffloadAdam(model.parameters())
    if in_background:
        begin_checkpoint(path, model=model, optimizer=optimizer).wait()
    else:
        save_checkpoint(path, model=model, optimizer=optimizer)
    optimizer.close()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_in_new_folders_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    path = tmp_path / "run" / "checkpoints" / "step-1"
    save(path, in_background=in_background)
    disk.assert_durable(path)


@pytest.mark.parametrize("export", [export_torch, export_dcp])
def test_an_export_to_new_folders_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Callable[[Path, Path], str]
) -> None:
    save(tmp_path / "saved")
    disk = Disk(tmp_path, monkeypatch)
    out = tmp_path / "new" / "exports" / "out"
    export(tmp_path / "saved", out)
    disk.assert_durable(out)


def test_an_import_to_new_folders_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states, tmp_path / "pickled.pt")
    disk = Disk(tmp_path, monkeypatch)
    out = tmp_path / "new" / "imports" / "out"
    import_torch_pickle(tmp_path / "pickled.pt", out)
    disk.assert_durable(out)


@pytest.mark.parametrize(("number", "is_saved"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_only_a_failing_disk_ends_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_saved: bool
) -> None:
    """Some file systems cannot flush folders at all, and say EINVAL."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "of the test")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with nullcontext() if is_saved else pytest.raises(OSError, match="of the test"):
        save(tmp_path / "new" / "step-1")
    assert (tmp_path / "new" / "step-1").exists() == is_saved


def test_checkpoints_of_a_new_run_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    run(tmp_path / "runs", train={"num_steps": 2}, checkpoint={"every": 1, "mode": "async"})
    for step in (1, 2):
        disk.assert_durable(tmp_path / "runs" / "case" / "checkpoints" / f"step-{step}")


def test_checkpoints_that_are_set_aside_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next save, in either folder; after it, in the new one."""
    folder = tmp_path / "runs" / "case" / "checkpoints"
    disk = Disk(tmp_path, monkeypatch)
    save(folder / "step-3")
    config = RunConfig.model_validate({"run": {"name": "case", "dir": str(tmp_path / "runs")}})
    set_aside(config, first_step=1)
    save(folder / "step-1")
    disk.assert_durable(folder / "earlier-1" / "step-3")
