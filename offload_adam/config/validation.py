"""From a mapping to a `RunConfig`, or to every mistake in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from offload_adam.config.key_names import keys_beside, nearest_key
from offload_adam.config.mistakes import Mistake
from offload_adam.config.optimizer_sections import TAGS
from offload_adam.config.run_config import ConflictError, RunConfig
from offload_adam.config.sections import FACTORY_PATTERN

_PATTERN_ADVICE = {
    FACTORY_PATTERN: "must read package.module:function",
    r"^\w[\w.-]*$": "must be a plain folder name: letters, digits, and . _ - after the first",
}


def validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[Mistake]]:
    """Return the configuration, or None and everything that is wrong with `values`.

    pydantic compares keys with each other only where each is right by itself. So wrong values
    give way to defaults for a second look, and conflicts with those defaults are left out.
    """
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        details = error.errors()
    mistakes = _without_repetition(details)
    if any(_conflicts_of(detail) for detail in details):
        return None, mistakes
    wrong = {mistake.path for mistake in mistakes}
    mended = copy.deepcopy(values)
    for detail in details:
        _remove(mended, _place(detail))
    try:
        RunConfig.model_validate(mended)
    except ValidationError as error:
        mistakes += [
            Mistake(conflict.paths[0], conflict.problem)
            for detail in error.errors()
            for conflict in _conflicts_of(detail)
            if not any(_touches(path, wrong) for path in conflict.paths)
        ]
    return None, mistakes


def _without_repetition(details: list[ErrorDetails]) -> list[Mistake]:
    """Return the mistakes in the order found, each path and problem once."""
    return list(dict.fromkeys(mistake for detail in details for mistake in _mistakes_of(detail)))


def _mistakes_of(detail: ErrorDetails) -> list[Mistake]:
    conflicts = _conflicts_of(detail)
    if conflicts:
        return [Mistake(conflict.paths[0], conflict.problem) for conflict in conflicts]
    path = ".".join(map(str, _place(detail)))
    if detail["type"] == "extra_forbidden":
        tag = next((part for part in detail["loc"] if part in TAGS), TAGS[0])
        return [Mistake(path, _unknown_key(path, str(tag)))]
    return [Mistake(path, f"{_problem(detail)}, got {_shown(detail['input'])}")]


def _place(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Return where a mistake stands, without what pydantic adds to tell optimizers apart."""
    first, *rest = detail["loc"] or ("",)
    return (first, *(rest[1:] if first == "optimizer" and rest[:1] and rest[0] in TAGS else rest))


def _conflicts_of(detail: ErrorDetails) -> tuple[Any, ...]:
    raised = detail.get("ctx", {}).get("error")
    return raised.conflicts if isinstance(raised, ConflictError) else ()


def _unknown_key(path: str, tag: str) -> str:
    nearest = nearest_key(RunConfig, path, tag)
    if nearest is not None:
        return f"no such key; did you mean {nearest}?"
    return f"no such key; here you can set {', '.join(keys_beside(RunConfig, path, tag))}"


def _problem(detail: ErrorDetails) -> str:
    """Return pydantic's message as advice, in YAML's words rather than in Python's."""
    context = detail.get("ctx", {})
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys to values"
    if detail["type"] == "string_pattern_mismatch":
        return _PATTERN_ADVICE[context["pattern"]]
    if detail["type"] in ("missing", "too_long"):
        return "has the wrong number of values"
    return detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _shown(value: object) -> str:
    """Return a wrong value as YAML would write it, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _touches(path: str, wrong: set[str]) -> bool:
    """Say whether a mistake was found at `path`, above it or below it."""
    below, above = f"{path}.", tuple(f"{other}." for other in wrong)
    return below.startswith(above) or any(other.startswith(below) for other in above)


def _remove(values: dict[str, Any], place: Sequence[int | str]) -> None:
    """Remove the key at `place` from nested mappings; an item takes its whole list along."""
    inner = values.get(str(place[0]))
    if len(place) > 1 and isinstance(inner, dict):
        _remove(inner, place[1:])
    else:
        values.pop(str(place[0]), None)
