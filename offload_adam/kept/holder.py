"""What holds a rank's kept file while no process of its run does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from offload_adam.errors import KeptStateError
from offload_adam.printable import MAX_MESSAGE_LENGTH, printable


class Holder(Protocol):
    """Holds one rank's file: a folder in shared memory, or a keeper process.

    Lifecycle: `acquire`, then the other methods, then `release`. `has_file`, `open` and `names`
        work without `acquire`.

    Attributes:
        place: names the file in messages.
    """

    place: str

    def acquire(self, timeout_s: float) -> None:
        """Wait until nothing else uses the file, and keep others from it.

        Raises:
            KeptInUseError: the file was in use for `timeout_s` seconds.
            KeptStateError: the holder cannot be used.
        """

    def release(self) -> None:
        """Let others use the file. The process's death does the same. Idempotent."""

    def has_file(self) -> bool:
        """Return whether another process could open the file; True if that is unknown."""

    def open(self) -> int | None:
        """Return a new descriptor of the file, None if there is no file.

        Raises:
            KeptStateError: there may be a file, but it cannot be opened.
        """

    def create(self) -> int:
        """Replace the file by an empty one, and return a new descriptor of it.

        Raises:
            OSError: there is no space.
        """

    def remove(self) -> None:
        """Delete the file. Its memory is freed when no process maps it any more. Idempotent."""

    def check(self) -> None:
        """Warn once if the file would not outlive this process any more. Cost: microseconds."""

    def names(self) -> Sequence[str]:
        """Return the names of all files of the run on this node."""

    def of(self, name: str) -> Holder:
        """Return the holder of another file of the run."""


class NotKeptError(Exception):
    """There is no kept state to resume from; the message is the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MAX_MESSAGE_LENGTH))


def unusable(place: object, why: str) -> KeptStateError:
    """Return an error about a file or folder that must not be deleted either."""
    return KeptStateError(
        f"{place} {why}. Kept state cannot be used there: correct that, delete it, or choose "
        "another memory.keep_path."
    )
