"""Errors and settings that concern all ranks: every rank goes on, or every rank raises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import (
    CheckpointError,
    HostMemoryError,
    PeerError,
    PeerFailedError,
    RankDisagreementError,
)

Field = tuple[str, str]
"""Name and value of a setting that must be the same on all ranks."""

_SHARED_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (TypeError, ValueError, RankDisagreementError, HostMemoryError, CheckpointError)
}


@contextmanager
def raise_on_all_ranks(ranks: RankGroup, phase: str) -> Iterator[None]:
    """Raise an error on every rank if the body raises one on any rank. Collective.

    The body itself must not be collective. Leaving it takes two small all-gathers. User errors
    (TypeError, ValueError and the like) are re-raised on every rank and name the failing ranks,
    unless all ranks raise the same error. Any other exception propagates on its own rank and
    becomes a `PeerError` that quotes it elsewhere.

    Args:
        phase: what the body does, for the error message.
    """
    if ranks.world_size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    message = "" if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        messages = gather_texts(ranks, message)
    except PeerFailedError as peer_error:
        if failure is not None:
            raise failure from peer_error  # the peer may have failed because of it
        raise
    failed = [rank for rank, text in enumerate(messages) if text]
    if not failed:
        return
    kind_name, _, problem = messages[failed[0]].partition(": ")
    kind = _SHARED_ERRORS.get(kind_name)
    if failure is not None and (kind is None or len(set(messages)) == 1):
        raise failure
    text = f"rank(s) {ranks.at(failed)} failed in {phase}: "
    raise (PeerError(text + messages[failed[0]]) if kind is None else kind(text + problem)) from (
        failure
    )


def require_same(ranks: RankGroup, what: str, fields: Sequence[Field], *, remedy: str = "") -> None:
    """Raise an error on every rank if any rank has another value in a field. Collective.

    The ranks compare digests first. Only if these differ does rank 0 broadcast its fields, and the
    error quotes for each rank the first field that differs from rank 0's.

    Args:
        what: what the fields describe, for the error message.
        remedy: the end of the error message.

    Raises:
        RankDisagreementError: naming the ranks, the field, and both values.
    """
    if ranks.world_size == 1:
        return
    text = json.dumps(fields)
    digests = gather_texts(ranks, hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return
    reference = [(field, value) for field, value in json.loads(_broadcast_text(ranks, text))]
    (first,) = ranks.at([0])
    differences = gather_texts(ranks, _first_difference(reference, fields, first))
    ranks_by_difference: dict[str, list[int]] = {}
    for place in different:
        ranks_by_difference.setdefault(differences[place], []).append(place)
    raise RankDisagreementError(
        "; ".join(
            f"rank(s) {ranks.at(others)} have another {what} than rank {first}: {difference}"
            for difference, others in ranks_by_difference.items()
        )
        + remedy
    )


def gather_texts(ranks: RankGroup, text: str) -> list[str]:
    """Return every rank's text in rank order. Collective."""
    if ranks.world_size == 1:
        return [text]
    encoded = text.encode()
    lengths = [
        int(n)
        for n in ranks.all_gather(torch.tensor([len(encoded)], dtype=torch.int64, device="cpu"))
    ]
    if max(lengths) == 0:
        return [""] * len(lengths)
    own = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device="cpu")
    buffers = ranks.all_gather(own)
    return [
        bytes(buffer[:length].tolist()).decode()
        for buffer, length in zip(buffers, lengths, strict=True)
    ]


def _broadcast_text(ranks: RankGroup, text: str) -> str:
    """Return rank 0's text. Collective."""
    encoded = text.encode()
    length = torch.tensor([len(encoded)], dtype=torch.int64, device="cpu")
    ranks.broadcast(length)
    buffer = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
    if ranks.rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    ranks.broadcast(buffer)
    return bytes(buffer.tolist()).decode()


def _first_difference(reference: Sequence[Field], fields: Sequence[Field], rank: int) -> str:
    """Describe the first field that differs from the reference, which is this rank's."""
    for expected, found in zip_longest(reference, fields):
        if expected == found:
            continue
        if expected is None or found is None:
            present, where = (found, "here") if expected is None else (expected, f"on rank {rank}")
            assert present is not None
            return f"{present[0]} is {present[1]} {where} only"
        if expected[0] != found[0]:
            return f"it has {found[0]} where rank {rank} has {expected[0]}"
        return f"{found[0]} is {found[1]} where rank {rank} has {expected[1]}"
    return "nothing"
