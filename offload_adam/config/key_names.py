"""Every dotted path that a configuration admits, and the nearest one to a path that it does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag


@cache
def key_paths(section: type[BaseModel], tag: str) -> tuple[str, ...]:
    """Return the dotted paths of all keys below `section`, the inner sections' own included.

    Args:
        tag: which one to take of several sections of which a configuration has one.
    """
    return tuple(_walk(section, "", tag))


def keys_beside(section: type[BaseModel], path: str, tag: str) -> dict[str, str]:
    """Return name -> dotted path of the valid keys that stand where `path` stands."""
    parent = path.rpartition(".")[0]
    split = ((known.rpartition("."), known) for known in key_paths(section, tag))
    return {name: known for (known_parent, _, name), known in split if known_parent == parent}


def nearest_key(section: type[BaseModel], path: str, tag: str) -> str | None:
    """Return the valid path most like `path`, or None where nothing comes close.

    Sought as a like name beside it, then as the same name in another section.
    """
    name = path.rpartition(".")[2]
    beside = keys_beside(section, path, tag)
    like = difflib.get_close_matches(name, beside, n=1, cutoff=0.65)
    if like:
        return beside[like[0]]
    return next((known for known in key_paths(section, tag) if known.endswith(f".{name}")), None)


def _walk(section: type[BaseModel], prefix: str, tag: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(field.annotation, tag):
            yield from _walk(inner, f"{prefix}{name}.", tag)


def _sections_in(annotation: Any, tag: str) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names, also behind `| None` and with this tag."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    for option in options:
        model = option
        if get_origin(option) is Annotated:
            model, *metadata = get_args(option)
            if any(isinstance(item, Tag) and item.tag != tag for item in metadata):
                continue
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield model
