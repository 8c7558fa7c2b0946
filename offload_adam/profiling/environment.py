"""Where and how a report was made, so that two reports can be compared."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from offload_adam.processor import cpu_model
from offload_adam.version import __version__

_WITHOUT_HOOKS = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_PACKAGES = ("torch", "numba", "numpy")


def describe_environment(
    device: torch.device, hosts: Collection[str], folder: Path
) -> dict[str, str]:
    """Return what a report says of its origin, by name.

    Args:
        hosts: of all ranks, one name for each rank.
        folder: the user's working directory, whose Git commit is looked up.
    """
    versions = {"offload_adam": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    names = {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Command": shlex.join(sys.orig_argv),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Git commit": commit_of(folder),
        "Device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "CPU": cpu_model(),
        "Ranks": f"{len(hosts)} on {len(set(hosts))} host(s)",
    }
    return {name: text for name, text in names.items() if text}


def commit_of(folder: Path) -> str:
    """Return the Git commit of a folder, "" if it has none.

    A `+` follows if tracked files differ from the commit. The repository's hooks and file monitor
    do not run.
    """
    command = ["git", "--no-optional-locks", "-C", str(folder), *_WITHOUT_HOOKS]
    command += ["describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
