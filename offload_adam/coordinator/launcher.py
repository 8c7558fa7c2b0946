"""The numbers that torchrun sets in the environment of a rank, read without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
_LIMIT = 2**31


def launched(name: str, environment: Mapping[str, str] = os.environ) -> int:
    """Return RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE of this process.

    Without WORLD_SIZE, no launcher has started this process. It is then alone, and the other
    variables do not count. An invalid number counts as absent: `World.from_environment` rejects it.
    """
    number = whole_number(environment.get(name, "")) if "WORLD_SIZE" in environment else None
    return _ALONE[name] if number is None else number


def whole_number(text: str) -> int | None:
    """Return the value of a text of decimal digits, None for other texts and from 2**31 on."""
    # Digits first: Python converts no text of more than 4,300 digits.
    if not text.isdecimal() or len(text) > len(str(_LIMIT)):
        return None
    number = int(text)
    return number if number < _LIMIT else None
