"""Checks across ranks: if one rank fails or has different settings, every rank raises an error."""

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
    KeptInUseError,
    KeptStateError,
    PeerError,
    PeerFailedError,
    RankDisagreementError,
)

Field = tuple[str, str]
"""Name and value of a setting that must be the same on all ranks."""

# User errors: `raise_on_all_ranks` re-raises these on every rank with their own type.
_SHARED_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        TypeError,
        ValueError,
        RankDisagreementError,
        HostMemoryError,
        CheckpointError,
        KeptInUseError,
        KeptStateError,
    )
}


@contextmanager
def raise_on_all_ranks(ranks: RankGroup, phase: str) -> Iterator[None]:
    """Raise an error on every rank if the body raises one on any rank. Collective.

    The body itself must not be collective. At its end the ranks run one small all-gather, and a
    second one if a rank failed. User errors (TypeError, ValueError and others, see
    `_SHARED_ERRORS`) are re-raised on every rank and name the failing ranks, unless all ranks raise
    the same error. Any other exception propagates on its own rank, and the other ranks raise a
    `PeerError` that quotes it.

    Args:
        phase: describes the body in the error message, such as "construction".
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
            # This rank's own error may be why the peer ended, so report this error.
            raise failure from peer_error
        raise
    failed = [rank for rank, text in enumerate(messages) if text]
    if not failed:
        return
    kind_name, _, problem = messages[failed[0]].partition(": ")
    kind = _SHARED_ERRORS.get(kind_name)
    if failure is not None and (kind is None or len(set(messages)) == 1):
        raise failure  # with its original traceback
    text = f"Rank(s) {ranks.to_global(failed)} failed in {phase}: "
    raise (PeerError(text + messages[failed[0]]) if kind is None else kind(text + problem)) from (
        failure
    )


def require_same(ranks: RankGroup, what: str, fields: Sequence[Field], *, remedy: str = "") -> None:
    """Raise an error on every rank if the value of a field differs between ranks. Collective.

    The ranks compare digests first. Only if these differ does rank 0 broadcast its fields. The
    error then quotes for each rank the first field that differs from rank 0's.

    Args:
        what: names the object that the fields describe, such as "optimizer".
        remedy: sentences that end the error message.

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
    (first,) = ranks.to_global([0])  # its rank in the default group, which may not be 0
    differences = gather_texts(ranks, _first_difference(reference, fields, first))
    ranks_by_difference: dict[str, list[int]] = {}
    for rank in different:
        ranks_by_difference.setdefault(differences[rank], []).append(rank)
    raise RankDisagreementError(
        ". ".join(
            f"Rank(s) {ranks.to_global(others)} have a different {what} than rank {first}: "
            f"{difference}"
            for difference, others in ranks_by_difference.items()
        )
        + f". {remedy}".rstrip()
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
    # An all-gather needs tensors of one shape, so each text is padded to the length of the longest.
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
    """Describe the first of this rank's fields that differs from the reference.

    Args:
        reference: the fields of `rank`.
    """
    for expected, found in zip_longest(reference, fields):
        if expected == found:
            continue
        if expected is None:
            return f"they have {found[0]} ({found[1]}), which rank {rank} lacks"
        if found is None:
            return f"they lack {expected[0]}, which is {expected[1]} on rank {rank}"
        if expected[0] != found[0]:
            return f"they have {found[0]}, but rank {rank} has {expected[0]}"
        return f"{found[0]} is {found[1]}, but {expected[1]} on rank {rank}"
    return "nothing"  # this rank equals the reference, so nobody reads its text
