"""YAML as the configuration reads it: floats such as 1e-4 are floats, a key stands once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from offload_adam.config.mistakes import Mistake

_FLOAT_TAG = "tag:yaml.org,2002:float"
_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
# YAML 1.2's rule. That of YAML 1.1, which PyYAML follows, reads `1e-4` as a string.
_FLOAT_PATTERN = re.compile(
    r"""^(?: [-+]? (?: [0-9][0-9_]* \. [0-9_]* | \. [0-9][0-9_]* ) (?: [eE][-+]?[0-9]+ )?
           | [-+]? [0-9][0-9_]* [eE][-+]?[0-9]+
           | [-+]? \. (?: inf | Inf | INF )
           | \. (?: nan | NaN | NAN ) )$""",
    re.VERBOSE,
)


class ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats and without dates, which no key takes."""


ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in (_FLOAT_TAG, _TIMESTAMP_TAG)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(_FLOAT_TAG, _FLOAT_PATTERN, list("-+.0123456789"))


def read_yaml(text: str) -> tuple[Any, list[Mistake]]:
    """Return the value of one YAML document and a mistake for each key that stands twice.

    Raises: yaml.YAMLError where the text is not YAML, or holds a value that contains itself.
    """
    loader = ConfigLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, []
        _reject_endless(root, set(), set())
        duplicates = list(_duplicate_keys(root, "", set()))
        return loader.construct_document(root), duplicates
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a number of a form that YAML knows and Python does not
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _reject_endless(node: yaml.Node, around: set[int], finished: set[int]) -> None:
    """Reject an alias that leads back to a node around it: such a value cannot be written out."""
    if id(node) in around:
        raise yaml.YAMLError(
            f"the anchor in line {node.start_mark.line + 1} stands for a value that contains itself"
        )
    if isinstance(node, yaml.ScalarNode) or id(node) in finished:
        return
    around.add(id(node))
    for item in node.value:
        for inner in item if isinstance(item, tuple) else (item,):
            _reject_endless(inner, around, finished)
    around.discard(id(node))
    finished.add(id(node))


def _duplicate_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[Mistake]:
    """Yield a mistake for every repeated key below `node`, which stands at the dotted `path`."""
    if id(node) in seen:  # an alias stands for a node that has been looked at
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicate_keys(item, f"{path}.{index}", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        here = f"{path}.{name}".lstrip(".")
        if name in first_lines:
            yield Mistake(here, f"stands twice, in lines {first_lines[name]} and {line}")
        first_lines.setdefault(name, line)
        yield from _duplicate_keys(value, here, seen)
