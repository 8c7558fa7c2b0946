"""The error for an invalid configuration: a list of all mistakes, each with its key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mistake(NamedTuple):
    """One mistake in a configuration.

    path: dotted path of the key, such as "train.num_steps"; "" if no single key is at fault.
    problem: in lower case without a full stop, such as "must be greater than 0, got 0".
    """

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class ConfigError(ValueError):
    """The configuration of a run is invalid.

    origin: where the mistakes are, for the first line of the message: the path of the file,
        "command line", or "configuration" for those found later.
    """

    def __init__(self, origin: str, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        lines = [f"{origin}: {count}", *(f"  {mistake}" for mistake in self.mistakes)]
        super().__init__("\n".join(lines))

    @classmethod
    def at(cls, path: str, problem: str) -> ConfigError:
        """Return an error with one mistake, found after the configuration was read."""
        return cls("configuration", [Mistake(path, problem)])
