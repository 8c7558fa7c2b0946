"""What is wrong with a configuration, all of it at once, and how that reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mistake(NamedTuple):
    """One thing to mend: the dotted path where it stands (or "") and what to do about it."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class ConfigError(ValueError):
    """The run's configuration cannot be used; `mistakes` holds everything that was found.

    `origin` names the file or the part of the job that the mistakes belong to.
    """

    def __init__(self, origin: str, mistakes: Sequence[Mistake]) -> None:
        self.origin = origin
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        lines = [f"{origin}: {count}", *(f"  {mistake}" for mistake in self.mistakes)]
        super().__init__("\n".join(lines))

    @classmethod
    def at(cls, path: str, problem: str) -> ConfigError:
        """Return the error for a single mistake found while the job was being put together."""
        return cls("configuration", [Mistake(path, problem)])
