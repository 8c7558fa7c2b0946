"""Exceptions that callers may want to tell apart; plain mistakes are ValueError or TypeError."""

from __future__ import annotations


class RankDisagreementError(RuntimeError):
    """Ranks that must agree do not: the message names the ranks and what differs."""


class PeerError(RuntimeError):
    """Another rank raised an error in the same call; see its traceback."""


class PeerFailedError(PeerError):
    """Ranks that the others waited for have died, stopped, or left.

    ranks: their global ranks; empty where it is the store that cannot be reached.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[PeerFailedError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class ParameterReplacedError(RuntimeError):
    """A parameter's storage is no longer the one that the optimizer updates."""


class UnreadyParameterError(RuntimeError):
    """A parameter was read or written beside its update, in a way that does not wait for it."""


class StreamedGradientError(RuntimeError):
    """An operation needs the values of a gradient that has left `.grad` during backward."""


class HostMemoryError(MemoryError):
    """The optimizer state does not fit into this node's memory; nothing was allocated."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says which extra brings it."""


class NotRetriedError(RuntimeError):
    """A restarted run meets the mark of an error that no restart can mend."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, does not fit, or is damaged; the message says where."""


class RunFolderLostError(RuntimeError):
    """Another job has taken the run's folder over, since this process seemed dead."""
