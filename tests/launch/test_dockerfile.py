"""launch/Dockerfile, without Docker: what it copies, installs and starts is there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The instructions and their arguments, with joined lines and without comments."""
    text = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    pairs = (line.split(maxsplit=1) for line in lines.replace("\\\n", " ").splitlines() if line)
    return [(name, value) for name, value in pairs]


def arguments_of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [value for kind, value in instructions if kind == name]


def copied(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """Return source -> destination of every COPY."""
    pairs = {}
    for value in arguments_of(instructions, "COPY"):
        *sources, destination = value.split()
        pairs.update(dict.fromkeys(sources, destination))
    return pairs


def test_every_copied_source_exists_and_is_in_the_build_context(
    instructions: list[tuple[str, str]],
) -> None:
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    sources = copied(instructions)
    assert {*sources} == kept
    for source, destination in sources.items():
        assert (ROOT / source).exists(), source
        # The content of a folder is copied, not the folder.
        assert destination == (source if (ROOT / source).is_dir() else "./")


def test_what_the_build_of_the_package_reads_is_copied(
    instructions: list[tuple[str, str]],
) -> None:
    sources = copied(instructions)
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= {*sources}
    assert {"offload_adam", "launch", "configs"} <= {*sources}


def test_versions_are_pinned_and_extras_exist(instructions: list[tuple[str, str]]) -> None:
    installs = [value for value in arguments_of(instructions, "RUN") if "pip install" in value]
    assert installs
    for command in re.findall(r"pip install[^&]*", " ".join(installs)):
        assert "--constraint launch/constraints.txt" in command, command
    (extras,) = (a for a in arguments_of(instructions, "ARG") if a.startswith("EXTRAS="))
    assert {*extras.removeprefix("EXTRAS=").split(",")} <= {*PROJECT["optional-dependencies"]}
    (image,) = arguments_of(instructions, "FROM")
    version = image.removeprefix("python:").removesuffix("-slim")
    names = re.findall(r"python3\.\d+", (ROOT / "launch/environment.sh").read_text("utf-8"))
    assert f"python{version}" in names


def test_the_image_runs_without_root_and_starts_a_launch_script(
    instructions: list[tuple[str, str]],
) -> None:
    kinds = [kind for kind, _ in instructions]
    (user,) = arguments_of(instructions, "USER")
    assert user != "root"
    assert kinds.index("USER") > max(i for i, kind in enumerate(kinds) if kind == "RUN")
    setup = " ".join(arguments_of(instructions, "RUN"))
    assert f'--owner={user} --mode=0700 "$NUMBA_CACHE_DIR"' in setup
    assert any(value.startswith("NUMBA_CACHE_DIR=") for value in arguments_of(instructions, "ENV"))
    (entrypoint,), (command,) = (arguments_of(instructions, k) for k in ("ENTRYPOINT", "CMD"))
    assert json.loads(entrypoint) == ["tini", "--"]
    assert {"numactl", "tini"} <= {*setup.split()}
    script, config, *_ = json.loads(command)
    sources = copied(instructions)
    for path in (script, config):
        assert (ROOT / path).is_file()
        assert Path(path).parts[0] in sources
    assert (ROOT / script).stat().st_mode & 0o111
