"""Exceptions that callers may want to catch by type, and the function that warns users.

Wrong arguments raise ValueError or TypeError.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from offload_adam.printable import MAX_MESSAGE_LENGTH, printable

# contextlib: context managers of ours; importlib: kernels are imported late.
_INTERNAL_PACKAGES = ("offload_adam", "torch", "contextlib", "importlib")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the user's line: the innermost frame outside this package and torch.

    Args:
        category: UserWarning for a mistake that all ranks make alike, since the commands show
            UserWarnings of rank 0 only. RuntimeWarning for a problem of this rank or its machine.
    """
    # A fixed stacklevel is wrong for subclasses and for methods that torch has wrapped.
    # `skip_file_prefixes` needs Python 3.12.
    stacklevel = 1
    frame = sys._getframe()
    while frame.f_back is not None and is_internal(frame):
        frame = frame.f_back
        # `warnings.warn` does not count the frames of a running import either.
        stacklevel += "importlib._bootstrap" not in frame.f_code.co_filename
    warnings.warn(message, category, stacklevel=stacklevel)


def is_internal(frame: FrameType) -> bool:
    """Return whether a frame is of this package, of torch, or of a library between the two."""
    package, _, _ = str(frame.f_globals.get("__name__")).partition(".")
    return package in _INTERNAL_PACKAGES


class RankDisagreementError(RuntimeError):
    """Ranks differ in a value that must be the same on all; the message names ranks and value."""


class PeerError(RuntimeError):
    """Another rank raised an error in the same call; see the traceback in that rank's log."""


class PeerFailedError(PeerError):
    """A peer that this rank waited for has died, hung or closed its optimizer.

    Attributes:
        ranks: global ranks of the failed peers; empty if the rendezvous store cannot be reached.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks

    # An exception is pickled as its class and `args`, here only the message. Without this method,
    # an error that a child process sends to its parent would lose `ranks`.
    def __reduce__(self) -> tuple[type[PeerFailedError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class ParameterReplacedError(RuntimeError):
    """A parameter's storage was replaced, so updates of the optimizer no longer reach it."""


class UnreadyParameterError(RuntimeError):
    """A parameter was read, written or copied before its update finished, or may have been."""


class StreamedGradientError(RuntimeError):
    """An operation needs the values of a gradient that was moved out of `.grad` during backward."""


class HostMemoryError(MemoryError):
    """The optimizer state does not fit into this node's memory; nothing stays allocated."""


class KeptStateError(RuntimeError):
    """Files of kept state cannot be used: the message says why and what to do."""


class KeptInUseError(KeptStateError):
    """Another process, or another optimizer of this one, uses the state kept at this path."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra to install."""


class NotRetriedError(RuntimeError):
    """A restarted run found the record of an earlier error that no restart can fix."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is unreadable, damaged or of another model.

    The message may quote a file of unknown origin, so it is made printable and short.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MAX_MESSAGE_LENGTH))


class RunFolderLostError(RuntimeError):
    """Another job took over the run's folder, because this process did not refresh its lock."""
