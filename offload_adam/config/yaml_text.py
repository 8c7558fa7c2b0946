"""Reads and writes YAML 1.2's core schema with PyYAML, whose own types are those of YAML 1.1.

written     YAML 1.1    here, as in YAML 1.2
1e-4        "1e-4"      0.0001
1:30        90          "1:30"
017         15          17
0o17        "0o17"      15
1_000       1000        "1_000"
no, off     false       "no", "off"
2024-01-01  a date      "2024-01-01"

A key that expects text gets the value exactly as written: `run.name: 017` is "017".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from offload_adam.config.mistakes import Mistake
from offload_adam.config.sections import TEXT_KEYS

MAX_NBYTES = 4 * 2**20
"""Largest file in bytes: enough for `MAX_VALUES` values, as `write_yaml` writes them."""
MAX_VALUES = 200_000
"""Most values in a document. An alias counts as often as the values that it repeats: ten lines of
aliases to lists of aliases could otherwise stand for billions of values. A text counts as one more
value for each `_VALUE_LENGTH` characters."""
_VALUE_LENGTH = 20
_MAX_PATH_LENGTH = 500

_TAG = "tag:yaml.org,2002:"
_TOO_MANY = f"it has more than {MAX_VALUES:,} values, counting those that aliases (*) repeat"
_NUMBERS = (f"{_TAG}bool", f"{_TAG}int", f"{_TAG}float")
# An unquoted scalar has the first of these types whose pattern matches all of it, else it is text.
_CORE_SCHEMA = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the types of YAML 1.2's core schema and no others.

    It stops at the value after `MAX_VALUES`.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._num_nodes += 1
        if self._num_nodes > MAX_VALUES:
            raise yaml.YAMLError(_TOO_MANY)
        return super().compose_node(parent, index)


class ConfigDumper(yaml.SafeDumper):
    """PyYAML's dumper. Quotes strings that YAML 1.1 or 1.2 would read as another type."""


ConfigLoader.yaml_implicit_resolvers = {}
for _name, _pattern in _CORE_SCHEMA.items():
    for _kind in (ConfigLoader, ConfigDumper):
        # None: the scalar may start with any character.
        _kind.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), None)


def _construct_int(loader: ConfigLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # Base 0 would reject 017, which is 17 in YAML 1.2.
    value = int(text, 0 if text[:2] in ("0o", "0x") else 10)
    # Raises ValueError if the decimal form is too long for Python to print, so that every value can
    # be shown in a message and saved. `int` checks the length of decimal text only, not of 0x.
    str(value)
    return value


# PyYAML calls the constructor registered for None if a tag is unknown: it raises an error.
ConfigLoader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (None, *(_TAG + name for name in (*_CORE_SCHEMA, "str", "seq", "map")))
}
ConfigLoader.add_constructor(f"{_TAG}int", _construct_int)


def write_yaml(value: Any) -> str:
    """Return a value as YAML, with the keys of mappings in insertion order."""
    text: str = yaml.dump(value, Dumper=ConfigDumper, sort_keys=False)
    return text


def read_yaml(text: str, path: str = "") -> tuple[Any, list[Mistake]]:
    """Return the value of one YAML document, and a mistake for each duplicate or merge key and tag.

    Args:
        path: dotted path of the key whose value the text is; "" for a whole file.

    Raises:
        yaml.YAMLError: the text is not YAML, a value in it contains itself, or it has more than
            `MAX_VALUES` values.
    """
    loader = ConfigLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, []
        root = _keep_text(root, path)
        mistakes = list(_mistakes_below(root, path, frozenset(), set()))
        if _count_values(root, {}) > MAX_VALUES:
            raise yaml.YAMLError(_TOO_MANY)
        return loader.construct_document(root), mistakes
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, KeyError, IndexError) as error:  # such as !!int a, !!bool a, !!float ''
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node, path: str) -> yaml.Node:
    """Return the node of a number or bool as text if the key at `path` expects text."""
    if path in TEXT_KEYS and node.tag in _NUMBERS:
        # A new node: an alias may use the same node as the value of a key that expects a number.
        return yaml.ScalarNode(f"{_TAG}str", node.value)
    return node


def _mistakes_below(
    node: yaml.Node, path: str, above: frozenset[int], finished: set[int]
) -> Iterator[Mistake]:
    """Yield a mistake for each duplicate or merge key and each unknown tag in `node`.

    Applies `_keep_text` to values, and replaces unknown tags, so that the rest can be checked.

    Args:
        path: the dotted path of `node`.
        above: ids of the nodes that contain `node`.
        finished: ids of the nodes that have been checked; an alias is its anchor's node again.
    """
    if id(node) in above:
        line = node.start_mark.line + 1
        raise yaml.YAMLError(f"the value of the anchor in line {line} contains itself")
    if node.tag not in ConfigLoader.yaml_constructors:
        tag, line = node.tag.replace(_TAG, "!!"), node.start_mark.line + 1
        yield Mistake(path, f"the tag {tag} in line {line} is not supported: remove it")
        kinds = {yaml.MappingNode: "map", yaml.SequenceNode: "seq", yaml.ScalarNode: "str"}
        node.tag = _TAG + next(name for kind, name in kinds.items() if isinstance(node, kind))
    if isinstance(node, yaml.ScalarNode) or id(node) in finished:
        return
    above |= {id(node)}
    first_lines: dict[str, int] = {}
    for index, item in enumerate(node.value):
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        # If a key is a list or a mapping, `key.value` holds nodes. Their text would repeat all that
        # aliases in them stand for, so the path has "?" instead.
        is_plain = key is None or isinstance(key, yaml.ScalarNode)
        name = str(index if key is None else key.value) if is_plain else "?"
        # Cut, since a long key could otherwise be in the path of each of many mistakes.
        here = f"{path}.{name}".lstrip(".")[:_MAX_PATH_LENGTH]
        if key is not None:
            yield from _mistakes_below(key, here, above, finished)
            line = key.start_mark.line + 1
            if is_plain and name in first_lines:
                yield Mistake(here, f"duplicate key, in lines {first_lines[name]} and {line}")
            if name == "<<" and key.style is None:
                problem = "which YAML 1.2 does not have: write the merged keys out"
                yield Mistake(here, f"merge key in line {line}, {problem}")
            first_lines.setdefault(name, line)
            node.value[index] = (key, _keep_text(value, here))
        yield from _mistakes_below(value, here, above, finished)
    finished.add(id(node))


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return the number of values in `node`, which does not contain itself.

    Args:
        counted: number of values by the id of the node, for nodes that aliases repeat.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // _VALUE_LENGTH
    if id(node) not in counted:
        is_mapping = isinstance(node, yaml.MappingNode)
        inner = (n for pair in node.value for n in pair) if is_mapping else node.value
        counted[id(node)] = 1 + sum(_count_values(value, counted) for value in inner)
    return counted[id(node)]
