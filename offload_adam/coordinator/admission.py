"""Admission: every rank builds the same optimizer, or none does and all say why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch

from offload_adam.coordinator.ranks import Membership
from offload_adam.errors import CheckpointError, HostMemoryError, PeerError, RankDisagreementError

Fact = tuple[str, str]
"""A field that all ranks must have in common, and its value on this one."""

_SHARED_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (TypeError, ValueError, RankDisagreementError, HostMemoryError, CheckpointError)
}


@contextmanager
def raise_on_all_ranks(membership: Membership, phase: str) -> Iterator[None]:
    """Raise an error on every rank if the body raises one on any rank. Collective.

    The body itself must not be collective. Leaving it takes two small all-gathers. User errors
    (TypeError, ValueError and the like) are re-raised on every rank and name the failing ranks,
    unless all ranks raise the same error. Any other exception propagates on its own rank and
    becomes a `PeerError` that quotes it elsewhere.

    Args:
        phase: what the body does, for the error message.
    """
    if membership.world_size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    message = "" if failure is None else f"{type(failure).__name__}: {failure}"
    messages = gather_texts(membership, message)
    failed = [rank for rank, text in enumerate(messages) if text]
    if not failed:
        return
    kind_name, _, problem = messages[failed[0]].partition(": ")
    kind = _SHARED_ERRORS.get(kind_name)
    if failure is not None and (kind is None or len(set(messages)) == 1):
        raise failure
    text = f"rank(s) {failed} failed in {phase}: "
    raise (PeerError(text + messages[failed[0]]) if kind is None else kind(text + problem)) from (
        failure
    )


def require_same(
    membership: Membership, what: str, facts: Sequence[Fact], *, remedy: str = ""
) -> None:
    """Refuse, on every rank alike, where ranks differ in a fact.

    Collective. Digests are compared first; only where they differ are rank 0's facts sent, and the
    error quotes for each rank the first field in which it parts from them.

    Args:
        remedy: what the error ends with.

    Raises:
        RankDisagreementError: naming the ranks, the field, and both values.
    """
    if membership.world_size == 1:
        return
    text = json.dumps(facts)
    digests = gather_texts(membership, hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return
    reference = [(field, value) for field, value in json.loads(_broadcast_text(membership, text))]
    differences = gather_texts(membership, _first_difference(reference, facts))
    ranks_by_difference: dict[str, list[int]] = {}
    for rank in different:
        ranks_by_difference.setdefault(differences[rank], []).append(rank)
    raise RankDisagreementError(
        "; ".join(
            f"rank(s) {ranks} have another {what} than rank 0: {difference}"
            for difference, ranks in ranks_by_difference.items()
        )
        + remedy
    )


def gather_texts(membership: Membership, text: str) -> list[str]:
    """Return every rank's text in rank order. Collective."""
    encoded = text.encode()
    lengths = [
        int(n)
        for n in membership.all_gather(
            torch.tensor([len(encoded)], dtype=torch.int64, device="cpu")
        )
    ]
    if max(lengths) == 0:
        return [""] * len(lengths)
    own = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device="cpu")
    buffers = membership.all_gather(own)
    return [
        bytes(buffer[:length].tolist()).decode()
        for buffer, length in zip(buffers, lengths, strict=True)
    ]


def _broadcast_text(membership: Membership, text: str) -> str:
    """Return rank 0's text. Collective."""
    encoded = text.encode()
    length = torch.tensor([len(encoded)], dtype=torch.int64, device="cpu")
    membership.broadcast(length)
    buffer = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
    if membership.rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    membership.broadcast(buffer)
    return bytes(buffer.tolist()).decode()


def _first_difference(reference: Sequence[Fact], facts: Sequence[Fact]) -> str:
    """Say where a rank's facts first part from rank 0's."""
    for expected, found in zip_longest(reference, facts):
        if expected == found:
            continue
        if expected is None or found is None:
            present, where = (found, "here") if expected is None else (expected, "on rank 0")
            assert present is not None
            return f"{present[0]} is {present[1]} {where} only"
        if expected[0] != found[0]:
            return f"it has {found[0]} where rank 0 has {expected[0]}"
        return f"{found[0]} is {found[1]} where rank 0 has {expected[1]}"
    return "nothing"
