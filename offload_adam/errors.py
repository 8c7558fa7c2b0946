"""Exceptions that callers may want to tell apart; plain mistakes are ValueError or TypeError."""

from __future__ import annotations


class RankDisagreementError(RuntimeError):
    """Ranks that must agree do not: the message names the ranks and what differs."""


class PeerError(RuntimeError):
    """Another rank refused the step or the construction; its own traceback says why."""


class ParameterReplacedError(RuntimeError):
    """A parameter's storage is no longer the one that the optimizer updates."""


class HostMemoryError(MemoryError):
    """The optimizer state does not fit into this node's memory; nothing was allocated."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says which extra brings it."""
