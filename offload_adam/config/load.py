"""Read a run's configuration from a file and the command line, and write the resolved one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml

from offload_adam.config.mistakes import ConfigError, Mistake
from offload_adam.config.overrides import apply_overrides, parse_overrides
from offload_adam.config.run_config import RunConfig
from offload_adam.config.validation import validate
from offload_adam.config.yaml_text import read_yaml


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in the YAML file `path` with `--section.key=value` laid over it.

    A run without a name takes the file's.

    Raises: ConfigError, with every mistake of the file and of the overrides.
    """
    path = Path(path)
    parsed, unreadable = parse_overrides(overrides)
    try:
        values, mistakes = _read_mapping(path)
    except ConfigError as error:
        raise ConfigError(error.origin, [*error.mistakes, *unreadable]) from error.__cause__
    mistakes += unreadable
    mistakes += apply_overrides(values, parsed)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
    config, invalid = validate(values)
    if config is None or mistakes:
        raise ConfigError(str(path), [*mistakes, *invalid])
    return config


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that `load_config` reads back."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def explain_config(config: RunConfig) -> str:
    """Return the text of `dump_config` with a comment on each section and each described key."""
    lines: list[str] = []
    for name, values in config.model_dump(mode="json").items():
        section = type(getattr(config, name))
        lines += ["", *_comment(cleandoc(section.__doc__ or "")), f"{name}:"]
        for key, value in values.items():
            text = yaml.safe_dump({key: value}, sort_keys=False).splitlines()
            described = _comment(section.model_fields[key].description or "")
            lines += [f"  {line}" for line in (*described, *text)]
    return "\n".join([*lines[1:], ""])


def _comment(text: str) -> list[str]:
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return [f"# {line}" for part in paragraphs for line in textwrap.wrap(part, 94)]


def _read_mapping(path: Path) -> tuple[dict[str, Any], list[Mistake]]:
    """Return the mapping in a file and what is wrong with it.

    A file without keys is read as {}, so that the overrides are judged as well. Where the content
    cannot be known they cannot be, and it is a ConfigError.
    """
    try:
        values, duplicates = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), [Mistake("", "there is no such file")]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Mistake("", f"cannot be read: {error}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [Mistake("", f"is not YAML: {error}")]) from error
    if isinstance(values, dict):
        return values, duplicates
    if values is None:
        return {}, [Mistake("", "is empty: write {} for a run of defaults and overrides alone")]
    problem = f"must hold a mapping of sections, got {type(values).__name__}"
    return {}, [Mistake("", problem), *duplicates]
