"""Every dotted path that a configuration admits, and the nearest one to a path that it does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel


@cache
def key_paths(section: type[BaseModel]) -> tuple[str, ...]:
    """Return the dotted paths of all keys below `section`, the inner sections' own included."""
    return tuple(_walk(section, ""))


def keys_beside(section: type[BaseModel], path: str) -> dict[str, str]:
    """Return name -> dotted path of the valid keys that stand where `path` stands."""
    parent = path.rpartition(".")[0]
    split = ((known.rpartition("."), known) for known in key_paths(section))
    return {name: known for (known_parent, _, name), known in split if known_parent == parent}


def nearest_key(section: type[BaseModel], path: str) -> str | None:
    """Return the valid path most like `path`, or None where nothing comes close.

    Sought as a like name beside it, then as the same name in another section.
    """
    name = path.rpartition(".")[2]
    beside = keys_beside(section, path)
    like = difflib.get_close_matches(name, beside, n=1, cutoff=0.65)
    if like:
        return beside[like[0]]
    return next((known for known in key_paths(section) if known.endswith(f".{name}")), None)


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(field.annotation):
            yield from _walk(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names, also behind `| None`."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            yield option
