"""The reference of all keys, read from the JSON schema: what a key expects, and what it does."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from offload_adam.config.mistakes import ConfigError, Mistake
from offload_adam.config.sections import RunConfig
from offload_adam.config.validation import PATTERNS, nearest_keys
from offload_adam.printable import printable

WIDTH = 100
"""Columns of a line."""
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NAMES = {
    "array": "list",
    "boolean": "true or false",
    "integer": "whole number",
    "null": "null",
    "number": "number",
    "object": "mapping of keys to values",
    "string": "text",
}
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}

# Bounds that only say that a value has 64 bits, as "at most" and as "below".
_LARGEST = (2**63 - 1, 2**63)


class Key(NamedTuple):
    """A key or a section.

    path: dotted path.
    schema: its JSON schema, without references.
    condition: what the key depends on; "" for a key that every configuration has.
    """

    path: str
    schema: Mapping[str, Any]
    condition: str = ""

    @property
    def is_section(self) -> bool:
        """Whether it has keys of its own that are known."""
        return "properties" in self.schema


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, for editors."""
    title = "A run of offload-adam"
    return {"$schema": _DIALECT, **RunConfig.model_json_schema(), "title": title}


def keys_by_section() -> str:
    """Return the names of all keys, a paragraph for each section, in lines of `WIDTH` columns."""
    lines = []
    for section in (key for key in all_keys() if "." not in key.path):
        below = [
            key.path.removeprefix(f"{section.path}.")
            for key in _below_section(section)
            if not key.is_section
        ]
        name = f"{section.path} ({section.condition})" if section.condition else section.path
        begin = f"  {name}: "
        lines += textwrap.wrap(
            ", ".join(below), WIDTH, initial_indent=begin, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def explain_key(path: str) -> str:
    """Return type, default, allowed values and meaning of a key, or of all keys of a section.

    Raises:
        ConfigError: there is no such key; the message names the nearest ones.
    """
    path = path.removeprefix("--").partition("=")[0]
    found = [key for key in all_keys() if key.path == path]
    if not found:
        parent, _, name = path.rpartition(".")
        problem = "unknown key"
        if nearest := nearest_keys(parent, name):
            problem += f"; did you mean {' or '.join(nearest)}?"
        else:
            problem += f"; the sections are {', '.join(RunConfig.model_fields)}"
        raise ConfigError("--explain", [Mistake(printable(path, WIDTH), problem)])
    if len(found) > 1 and all(key.schema == found[0].schema for key in found):
        found = [found[0]._replace(condition="")]  # both optimizers have this key
    keys = [one for key in found for one in (key, *_below_section(key))]
    return "\n".join(line for key in keys for line in _explained(key)).rstrip() + "\n"


def _below_section(section: Key) -> Iterator[Key]:
    """Yield what is below a section, nothing for a key."""
    begin = f"{section.path}."
    for key in all_keys():
        if key.path.startswith(begin) and key.condition == section.condition:
            yield key


def _explained(key: Key) -> Iterator[str]:
    yield f"{key.path}, with optimizer.{key.condition}" if key.condition else key.path
    if not key.is_section:
        kinds, allowed = kinds_of(key.schema), allowed_by(key.schema)
        yield from _wrapped(f"type:    {kinds}")
        if "default" in key.schema:
            yield from _wrapped(f"default: {json.dumps(key.schema['default'])}")
        if allowed:
            yield from _wrapped(f"allowed: {allowed}")
    for paragraph in str(key.schema.get("description", "")).split("\n\n"):
        yield from _wrapped(" ".join(paragraph.split()))
    yield ""


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


@cache
def all_keys() -> tuple[Key, ...]:
    """Return all sections and keys, each section before its keys."""
    schema = json_schema()
    top = Key("", _resolved(schema, schema["$defs"]))
    return tuple(_below(top, schema["$defs"]))


def _below(section: Key, definitions: Mapping[str, Any]) -> Iterator[Key]:
    for name, schema in section.schema["properties"].items():
        path = f"{section.path}.{name}".lstrip(".")
        schema = _resolved(schema, definitions)
        # The optimizer has one section for each name.
        for variant in (_resolved(one, definitions) for one in schema.get("oneOf", [schema])):
            condition = section.condition
            if "oneOf" in schema:
                condition = f"name: {variant['properties']['name']['const']}"
            key = Key(path, variant, condition)
            yield key
            if key.is_section:
                yield from _below(key, definitions)


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema with what its reference says; a section that may be null, as the section."""
    some = [one for one in schema.get("anyOf", []) if "$ref" in one]
    reference = schema.get("$ref") or (some[0]["$ref"] if some else None)
    if reference is None:
        return schema
    return definitions[reference.rpartition("/")[2]]  # type: ignore[no-any-return]


def kinds_of(schema: Mapping[str, Any]) -> str:
    """Return the types of a key's values."""
    if "anyOf" in schema:
        return " or ".join(kinds_of(one) for one in schema["anyOf"])
    if "prefixItems" in schema:
        return "list of two numbers"
    if "items" in schema:
        return f"list of {kinds_of(schema['items'])}s"
    if "const" in schema and "type" not in schema:
        return "text"
    return _NAMES[schema["type"]]


def allowed_by(schema: Mapping[str, Any]) -> str:
    """Return the values that a key may have, "" if its type says it all."""
    if "anyOf" in schema:
        return ", or ".join(filter(None, map(allowed_by, schema["anyOf"])))
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return ", ".join(map(repr, schema["enum"]))
    if "prefixItems" in schema:
        return f"each {allowed_by(schema['prefixItems'][0])}"
    if schema.get("pattern") in PATTERNS:
        return PATTERNS[schema["pattern"]]
    return " and ".join(
        f"{words} {schema[key]:,}"
        for key, words in _BOUNDS.items()
        if key in schema and schema[key] not in _LARGEST
    )
