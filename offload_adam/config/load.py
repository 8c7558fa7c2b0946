"""Reads the configuration of a run from a file and the command line, and writes it as YAML."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml

from offload_adam.config.mistakes import ConfigError, Mistake
from offload_adam.config.sections import COMPLETE, RunConfig
from offload_adam.config.validation import nearest_keys, validate
from offload_adam.config.yaml_text import MAX_NBYTES, read_yaml, write_yaml
from offload_adam.printable import show

OVERRIDE_FORM = "--section.key=value"
_OVERRIDE = re.compile(r"--(?P<path>[\w-]+(?:\.[\w-]+)*)=(?P<value>.*)", re.DOTALL)
# pydantic cannot dump a configuration of more than 255 levels, and most walks over one recurse.
_MAX_LEVELS = 100
# Key -> the key of the same section that it excludes. An override of the first removes the second
# from the values of the file.
_ALTERNATIVES = {
    "model.sizes": "factory",
    "model.factory": "sizes",
    "data.source": "path",
    "data.path": "source",
}


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in a YAML file, changed by command-line overrides.

    If `run.name` is missing, the run gets the name of the file without its suffix.

    Args:
        path: of the file; None for the defaults.
        overrides: strings `--section.key=value` with a value in YAML. If several set the same key,
            the last one wins.

    Raises:
        ConfigError: with every mistake in the file and in the overrides.
    """
    origin = "command line" if path is None else str(path)
    values, mistakes = ({}, []) if path is None else _read_file(Path(path))
    parsed, override_mistakes = _parse_overrides(overrides)
    mistakes += override_mistakes
    if values is None:
        raise ConfigError(origin, mistakes)
    mistakes += _apply(values, parsed)
    if _is_too_deep(values):
        problem = f"mappings and lists are nested more than {_MAX_LEVELS} levels deep"
        raise ConfigError(origin, [*mistakes, Mistake("", problem)])
    run = values.setdefault("run", {})
    if isinstance(run, dict) and path is not None:
        run.setdefault("name", Path(path).stem)
    config, invalid = validate(values)
    if config is None or mistakes:
        raise ConfigError(origin, [*mistakes, *invalid])
    return config


def _read_file(path: Path) -> tuple[dict[str, Any] | None, list[Mistake]]:
    """Return the mapping in a file, and the mistakes found while reading it.

    Returns {} with a mistake if the file has no mapping, so that overrides are still validated, and
    None with a mistake if the file cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_NBYTES + 1)
        if len(content) > MAX_NBYTES:
            return None, [Mistake("", f"is larger than {MAX_NBYTES:,} bytes: is it a YAML file?")]
        values, mistakes = read_yaml(content.decode("utf-8"))
    except FileNotFoundError:
        return None, [Mistake("", "file not found")]
    except OSError as error:
        return None, [Mistake("", f"cannot be read: {error.strerror}")]
    except UnicodeDecodeError as error:
        return None, [Mistake("", f"is not UTF-8 text: {error.reason} at byte {error.start}")]
    except ValueError as error:  # a NUL character in the path
        return None, [Mistake("", f"cannot be read: {error}")]
    except yaml.YAMLError as error:
        # PyYAML was given the text only, and does not know the name of the file.
        problem = str(error).replace('"<unicode string>"', f'"{path}"')
        return None, [Mistake("", f"cannot be read as YAML: {problem}")]
    if isinstance(values, dict):
        return values, mistakes
    problem = f"must be a mapping of sections, got {type(values).__name__}"
    if values is None:
        problem = "is empty: write {} to run with the defaults"
    return {}, [Mistake("", problem), *mistakes]


def _parse_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Mistake]]:
    """Return the (dotted path, value) of each override in order, and the mistakes in them."""
    overrides: list[tuple[str, Any]] = []
    mistakes: list[Mistake] = []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            problem = f"cannot parse {show(argument)}: write {OVERRIDE_FORM} without spaces"
            mistakes.append(Mistake("", problem))
            continue
        path, value = match.groups()
        if "." not in path and path not in RunConfig.model_fields:
            mistakes.append(_without_section(path, value))
            continue
        try:
            value, value_mistakes = read_yaml(value, path)
            mistakes += value_mistakes
        except yaml.YAMLError:
            pass  # keep the value as text, such as **/*.txt
        overrides.append((path, value))
    return overrides, mistakes


def _without_section(name: str, value: str) -> Mistake:
    """Return the mistake of an override such as --lr=1, with the key that was meant."""
    problem = f"an override has the form {OVERRIDE_FORM}"
    if nearest := nearest_keys("", name):
        meant = " or ".join(f"--{key}={value}" for key in nearest)
        return Mistake(name, f"unknown key; {problem}: did you mean {meant}?")
    sections = ", ".join(RunConfig.model_fields)
    return Mistake(name, f"unknown key; {problem}, and the sections are {sections}")


def _apply(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> list[Mistake]:
    """Set the value of each override in `values`; return the mistakes."""
    # In a loop of its own, so that only values of the file are removed: two overrides that exclude
    # each other both remain, and validation reports them.
    for path, value in overrides:
        section, *below = path.split(".")
        other = _ALTERNATIVES.get(".".join([section, *below[:1]]))
        mapping = values.get(section)
        if other and value is not None and isinstance(mapping, dict):
            mapping.pop(other, None)
    return [mistake for path, value in overrides if (mistake := _set(values, path, value))]


def _set(values: dict[str, Any], path: str, value: Any) -> Mistake | None:
    """Set a value in nested mappings; return a mistake if its parent is not a mapping."""
    parent: Any = values
    *sections, name = path.split(".")
    for depth, key in enumerate(sections, start=1):
        if parent.get(key) is None:  # absent, or a section without any keys
            parent[key] = {}
        parent = parent[key]
        if not isinstance(parent, dict):
            where = ".".join(sections[:depth])
            return Mistake(path, f"{where} is not a mapping, so it has no keys")
    parent[name] = value
    return None


def _is_too_deep(values: dict[str, Any]) -> bool:
    """Return whether more than `_MAX_LEVELS` mappings and lists contain one another."""
    level: list[Any] = [values]
    for _ in range(_MAX_LEVELS):
        inner: dict[int, Any] = {}  # by id: aliases may repeat a value without limit
        for value in level:
            items = value.values() if isinstance(value, dict) else value
            inner |= {id(item): item for item in items if isinstance(item, (dict, list))}
        level = list(inner.values())
    return bool(level)


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that `load_config` can read."""
    return write_yaml(config.model_dump(mode="json"))


def explain_config(config: RunConfig) -> str:
    """Return the text of `dump_config` with a comment above each section and documented key.

    A section that the configuration lacks is commented out.
    """
    lines: list[str] = []
    for name, complete in COMPLETE:
        section = getattr(config, name) or complete
        mark = "# " if getattr(config, name) is None else ""
        lines += ["", *_comment(cleandoc(section.__doc__ or "")), f"{mark}{name}:"]
        for key, value in section.model_dump(mode="json").items():
            description = _comment(type(section).model_fields[key].description or "")
            text = write_yaml({key: value}).splitlines()
            lines += [f"{mark}  {line}" for line in (*description, *text)]
    return "\n".join([*lines[1:], ""])


def _comment(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        # 94, so that a comment that is indented and begins with "# " ends before column 100.
        yield from (f"# {line}" for line in textwrap.wrap(" ".join(paragraph.split()), 94))
