"""Reads the configuration of a run from a file and the command line, and writes it as YAML."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from offload_adam.config.mistakes import ConfigError, Mistake
from offload_adam.config.run_config import RunConfig
from offload_adam.config.validation import validate
from offload_adam.config.yaml_text import read_yaml, write_yaml

_OVERRIDE = re.compile(r"--(?P<path>[\w-]+(?:\.[\w-]+)*)=(?P<value>.*)", re.DOTALL)
# Each key excludes the other one. An override of one removes the file's value of the other.
_ALTERNATIVES = (("model", "sizes", "factory"), ("data", "source", "path"))


class Override(NamedTuple):
    """One `--section.key=value` of the command line."""

    path: tuple[str, ...]
    value: Any


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in a YAML file, changed by overrides of the command line.

    If `run.name` is missing, the run gets the name of the file.

    Args:
        overrides: `--section.key=value` each, with a value in YAML. The last one of a key counts.

    Raises:
        ConfigError: with every mistake of the file and of the overrides.
    """
    path = Path(path)
    parsed, mistakes = parse_overrides(overrides)
    try:
        values, in_file = _read_mapping(path)
    except ConfigError as error:
        raise ConfigError(error.origin, [*error.mistakes, *mistakes]) from error.__cause__
    mistakes = [*in_file, *mistakes, *_apply(values, parsed)]
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
    config, invalid = validate(values)
    if config is None or mistakes:
        raise ConfigError(str(path), [*mistakes, *invalid])
    return config


def _read_mapping(path: Path) -> tuple[dict[str, Any], list[Mistake]]:
    """Return the mapping in a file, and the mistakes that were found while it was parsed.

    An empty file counts as {}, so that the overrides are checked too.

    Raises:
        ConfigError: the file cannot be read or is not YAML.
    """
    try:
        values, mistakes = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), [Mistake("", "file not found")]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Mistake("", f"cannot be read: {error}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [Mistake("", f"is not YAML: {error}")]) from error
    if isinstance(values, dict):
        return values, mistakes
    problem = f"must be a mapping of sections, got {type(values).__name__}"
    if values is None:
        problem = "is empty: write {} to run with the defaults"
    return {}, [Mistake("", problem), *mistakes]


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Mistake]]:
    """Return the overrides in the order given, and a mistake for each that cannot be parsed."""
    overrides: list[Override] = []
    mistakes: list[Mistake] = []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            problem = f"cannot parse {argument!r}: write --section.key=value without spaces"
            mistakes.append(Mistake("", problem))
            continue
        try:
            value, in_value = read_yaml(match["value"])
        except yaml.YAMLError:  # text such as **/*.txt
            value, in_value = match["value"], []
        overrides.append(Override(tuple(match["path"].split(".")), value))
        mistakes.extend(Mistake(match["path"], str(mistake)) for mistake in in_value)
    return overrides, mistakes


def _apply(values: dict[str, Any], overrides: Sequence[Override]) -> list[Mistake]:
    """Set the value of each override in `values`; return the mistakes."""
    named = {override.path[:2] for override in overrides if override.value is not None}
    for section, *keys in _ALTERNATIVES:
        mapping = values.get(section)
        for wanted, other in (keys, keys[::-1]):
            if isinstance(mapping, dict) and (section, wanted) in named:
                mapping.pop(other, None)
    return [mistake for override in overrides if (mistake := _set(values, override))]


def _set(values: dict[str, Any], override: Override) -> Mistake | None:
    parent: Any = values
    *sections, name = override.path
    for depth, key in enumerate(sections, start=1):
        if parent.get(key) is None:  # absent, or a section without any keys
            parent[key] = {}
        parent = parent[key]
        if not isinstance(parent, dict):
            where = ".".join(sections[:depth])
            return Mistake(".".join(override.path), f"{where} is not a mapping, so it has no keys")
    parent[name] = override.value
    return None


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that `load_config` can read."""
    return write_yaml(config.model_dump(mode="json"))


def explain_config(config: RunConfig) -> str:
    """Return the text of `dump_config` with a comment on each section and each described key."""
    lines: list[str] = []
    for name, values in config.model_dump(mode="json").items():
        section = type(getattr(config, name))
        lines += ["", *_comment(cleandoc(section.__doc__ or "")), f"{name}:"]
        for key, value in values.items():
            description = _comment(section.model_fields[key].description or "")
            text = write_yaml({key: value}).splitlines()
            lines += [f"  {line}" for line in (*description, *text)]
    return "\n".join([*lines[1:], ""])


def _comment(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (f"# {line}" for line in textwrap.wrap(" ".join(paragraph.split()), 94))
