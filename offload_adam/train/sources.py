"""The files that a job trains on, in an order that is the same on every machine."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from offload_adam.config import ConfigError

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}
)


class SourceFile(NamedTuple):
    """A file and its name relative to its source's root, in POSIX form on every system."""

    name: str
    path: Path


def standard_library_files(root: Path | None = None) -> list[SourceFile]:
    """Return the Python files of the running interpreter's standard library.

    Left out are installed packages and tests, which differ from one installation to the next,
    and the manual in `pydoc_data`: one file of prose that would outweigh all others of its split.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = list(_python_files(root))
    if not files:
        raise ConfigError.at(
            "data.source",
            f"the standard library in {root} has no source files; give data.path instead",
        )
    return sorted(files)


def matching_files(pattern: str) -> list[SourceFile]:
    """Return the files that match a glob; `**` spans folders, `~` is the home folder.

    Raises: ConfigError where nothing matches.
    """
    pattern = os.path.expanduser(pattern)
    root = _fixed_part(pattern)
    paths = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = sorted(
        SourceFile(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()
    )
    if not files:
        raise ConfigError.at(
            "data.path", f"no file matches {pattern!r} (from the folder {Path.cwd()})"
        )
    return files


def _python_files(root: Path) -> Iterator[SourceFile]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                yield SourceFile(path.relative_to(root).as_posix(), path)


def _fixed_part(pattern: str) -> Path:
    """Return the folder before a glob's first wildcard, so that names do not depend on it."""
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)
