"""Admission: every rank builds the same optimizer, or none does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist

from offload_adam.coordinator.membership import Membership
from offload_adam.errors import PeerError, RankDisagreementError

_MESSAGE_NBYTES = 512
T = TypeVar("T")


def together(membership: Membership, phase: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank, and raise on all of them when it raised on any.

    Collective, one small all-gather. The failing ranks raise their own error, the others a
    `PeerError` that names those ranks and quotes the first error.
    """
    if membership.world_size == 1:
        return action()
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    message = "" if failure is None else f"{type(failure).__name__}: {failure}"
    messages = gather_texts(membership, message)
    if failure is not None:
        raise failure
    failed = [rank for rank, text in enumerate(messages) if text]
    if failed:
        raise PeerError(f"rank(s) {failed} failed in {phase}: {messages[failed[0]]}")
    return result


def require_same(membership: Membership, what: str, lines: list[str]) -> None:
    """Refuse, on every rank, where ranks describe different optimizers.

    Collective. Digests are compared first; only where they differ is rank 0's description sent, and
    the error quotes the first line in which each rank parts from it.

    Raises:
        RankDisagreementError: naming the ranks and the first difference.
    """
    if membership.world_size == 1:
        return
    text = "\n".join(lines)
    digests = gather_texts(membership, hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return
    reference = _broadcast_text(membership, text).split("\n")
    differences = gather_texts(membership, _first_difference(reference, lines))
    raise RankDisagreementError(
        f"rank(s) {different} have another {what} than rank 0: {differences[different[0]]}"
    )


def gather_texts(membership: Membership, text: str) -> list[str]:
    """Return every rank's text in rank order, each cut to 512 bytes. Collective."""
    encoded = text.encode()[:_MESSAGE_NBYTES]
    own = torch.zeros(_MESSAGE_NBYTES, dtype=torch.uint8)
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    gathered = [torch.zeros_like(own) for _ in range(membership.world_size)]
    dist.all_gather(gathered, own, group=membership.control)
    return [_decode(buffer) for buffer in gathered]


def _broadcast_text(membership: Membership, text: str) -> str:
    """Return rank 0's text. Collective."""
    encoded = text.encode()
    length = torch.tensor([len(encoded)])
    source = membership.global_ranks[0]
    dist.broadcast(length, source, group=membership.control)
    buffer = torch.zeros(int(length), dtype=torch.uint8)
    if membership.rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    dist.broadcast(buffer, source, group=membership.control)
    return _decode(buffer)


def _decode(buffer: torch.Tensor) -> str:
    return bytes(buffer.tolist()).rstrip(b"\0").decode(errors="ignore")


def _first_difference(reference: list[str], lines: list[str]) -> str:
    """Say where a description first parts from rank 0's."""
    for expected, found in zip_longest(reference, lines):
        if expected != found:
            return f"{_quoted(found)} where rank 0 has {_quoted(expected)}"
    return "nothing"


def _quoted(line: str | None) -> str:
    return "nothing" if line is None else repr(line)
