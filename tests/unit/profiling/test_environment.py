"""What a report says of where it was made."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_adam.profiling.environment import describe_environment
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


def test_it_names_the_commit_of_the_folder_and_marks_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")[:12]
    device = torch.device("cpu")
    assert describe_environment(device, ["a"], tmp_path)["Git commit"] == commit
    (tmp_path / "file").write_text("2")
    assert describe_environment(device, ["a"], tmp_path)["Git commit"] == f"{commit}+"
