"""The error of a configuration: a list of all mistakes, each with its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mistake(NamedTuple):
    """One mistake.

    path: dotted, of the key; "" for a mistake that concerns no single key.
    problem: in lower case without a full stop, such as "must be greater than 0, got 0".
    """

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class ConfigError(ValueError):
    """The configuration of a run is invalid.

    origin: the file, or the part of the job that reports the mistakes.
    mistakes: all of them.
    """

    def __init__(self, origin: str, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        lines = [f"{origin}: {count}", *(f"  {mistake}" for mistake in self.mistakes)]
        super().__init__("\n".join(lines))

    @classmethod
    def at(cls, path: str, problem: str) -> ConfigError:
        """Return an error with one mistake that was found after the file had been read."""
        return cls("configuration", [Mistake(path, problem)])
