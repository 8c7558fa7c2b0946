"""The error for an invalid configuration: a list of all mistakes, each with its key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from offload_adam.printable import printable

MAX_SHOWN = 50
"""Mistakes in the message of one error."""
_MAX_LENGTH = 500  # of one mistake in characters


class Mistake(NamedTuple):
    """One mistake in a configuration.

    path: dotted path of the key, such as "train.num_steps"; "" if no single key is at fault.
    problem: in lower case without a full stop, such as "must be greater than 0, got 0".
    """

    path: str
    problem: str

    def __str__(self) -> str:
        # A key with a line break in it must not look like another mistake.
        path = self.path.replace("\n", "\\n")
        return printable(f"{path}: {self.problem}" if path else self.problem, _MAX_LENGTH)


class ConfigError(ValueError):
    """The configuration of a run is invalid.

    origin: where the mistakes are, for the first line of the message: the path of the file,
        "command line", or "configuration" for those found later.
    """

    def __init__(self, origin: str, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        lines = [f"{printable(origin, _MAX_LENGTH)}: {count}"]
        lines += [f"  {mistake}" for mistake in self.mistakes[:MAX_SHOWN]]
        if len(self.mistakes) > MAX_SHOWN:
            lines.append(f"  ... and {len(self.mistakes) - MAX_SHOWN} more")
        super().__init__("\n".join(lines))

    @classmethod
    def at(cls, path: str, problem: str) -> ConfigError:
        """Return an error with one mistake, found after the configuration was read."""
        return cls("configuration", [Mistake(path, problem)])
