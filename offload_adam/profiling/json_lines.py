"""Reads a file of JSON objects, one on each line. A killed process may have left it damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_objects(path: Path, *keys: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a file with its object, without lines that are damaged or lack a key.

    A file that is missing or not regular has no lines.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict) and values.keys() >= set(keys):
                yield line, values
