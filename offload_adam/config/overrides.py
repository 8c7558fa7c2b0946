"""Dotted overrides from the command line, `--section.key=value`, laid over the file's mapping."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from offload_adam.config.mistakes import Mistake
from offload_adam.config.yaml_text import read_yaml

_OVERRIDE_PATTERN = re.compile(r"--(?P<path>[\w-]+(?:\.[\w-]+)+)=(?P<value>.*)", re.DOTALL)
# Two ways to say one thing: naming one on the command line puts the file's other one aside.
ALTERNATIVES = (("model", "sizes", "factory"), ("data", "source", "path"))


class Override(NamedTuple):
    """One value and the keys that lead to it."""

    path: tuple[str, ...]
    value: Any


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Mistake]]:
    """Return the overrides in the order given, and a mistake for each that cannot be read."""
    overrides: list[Override] = []
    mistakes: list[Mistake] = []
    for argument in arguments:
        match = _OVERRIDE_PATTERN.fullmatch(argument)
        if match is None:
            mistakes.append(
                Mistake("", f"cannot read {argument!r}; write --section.key=value, all in one word")
            )
            continue
        value, duplicates = _read_value(match["value"])
        overrides.append(Override(tuple(match["path"].split(".")), value))
        mistakes.extend(Mistake(match["path"], str(duplicate)) for duplicate in duplicates)
    return overrides, mistakes


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> list[Mistake]:
    """Lay the overrides over `values` in place; of two for the same key the later one holds."""
    _put_aside_alternatives(values, overrides)
    return [mistake for override in overrides if (mistake := _lay_over(values, override))]


def _lay_over(values: dict[str, Any], override: Override) -> Mistake | None:
    """Set one value in place, or return why it has no place."""
    parent: Any = values
    for depth, key in enumerate(override.path[:-1], start=1):
        if parent.get(key) is None:  # absent, or a section without any keys
            parent[key] = {}
        parent = parent[key]
        if not isinstance(parent, dict):
            where = ".".join(override.path[:depth])
            return Mistake(".".join(override.path), f"{where} is not a mapping, so it has no keys")
    parent[override.path[-1]] = override.value
    return None


def _read_value(text: str) -> tuple[Any, list[Mistake]]:
    """Return the text's value as YAML, or the text itself where it is none (`**/*.txt`)."""
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text, []


def _put_aside_alternatives(values: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Remove from `values` what an override names the alternative of."""
    named = {override.path[:2] for override in overrides if override.value is not None}
    for section, left, right in ALTERNATIVES:
        mapping = values.get(section)
        if not isinstance(mapping, dict):
            continue
        for wanted, other in ((left, right), (right, left)):
            if (section, wanted) in named:
                mapping.pop(other, None)
