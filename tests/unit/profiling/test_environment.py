"""What a report says of where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_adam.profiling.environment import commit_of, describe_environment
from offload_adam.version import __version__


def test_it_names_versions_command_device_and_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "offload_adam", "profile", "a b.yaml"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe_environment(torch.device("cpu"), ["a", "a", "b"], tmp_path)
    assert found["Command"] == "python -m offload_adam profile 'a b.yaml'"
    for name, version in {
        "offload_adam": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }.items():
        assert f"{name} {version}" in found["Versions"]
    assert "numba " in found["Versions"]
    assert (found["Device"], found["Ranks"]) == ("cpu", "3 on 2 host(s)")
    assert found["CPU"]
    assert found["Date"].endswith(" UTC")
    assert "Git commit" not in found


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


def make_repository(folder: Path) -> str:
    """Commit one file, and return the commit."""
    git(folder, "init", "-q")
    (folder / "file").write_text("1")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")[:12]


def test_it_names_the_commit_of_the_folder_and_marks_changes(tmp_path: Path) -> None:
    commit = make_repository(tmp_path)
    device = torch.device("cpu")
    assert describe_environment(device, ["a"], tmp_path)["Git commit"] == commit
    (tmp_path / "file").write_text("2")
    assert describe_environment(device, ["a"], tmp_path)["Git commit"] == f"{commit}+"


def test_hooks_and_the_file_monitor_of_the_repository_do_not_run(tmp_path: Path) -> None:
    commit = make_repository(tmp_path)
    script = tmp_path / ".git" / "script"
    script.write_text(f"#!/bin/sh\necho run >> '{tmp_path / 'found'}'\n")
    script.chmod(0o755)
    (tmp_path / ".git" / "hooks").mkdir(exist_ok=True)
    for name in ("fsmonitor-watchman", "post-index-change"):
        (tmp_path / ".git" / "hooks" / name).symlink_to(script)
    git(tmp_path, "config", "core.fsmonitor", str(script))
    # Git writes its index, and calls a hook, if the time of a file is not that of its entry.
    os.utime(tmp_path / "file", (1e9, 1e9))
    assert commit_of(tmp_path) == commit
    assert not (tmp_path / "found").exists()
