"""Who has failed: decided from the ranks' records alone, so that it can be tested without ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from offload_adam.coordinator.progress import PeerRecord

_RESTART = "Start the run again from its newest checkpoint."


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which ranks have failed, and what is to be said about it; the first one written holds."""

    ranks: tuple[int, ...]
    text: str

    def to_json(self) -> str:
        """Return the verdict as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(tuple(values["ranks"]), values["text"])


def gone(record: PeerRecord) -> Verdict:
    """Return the verdict on a rank whose process has ended without a word."""
    return Verdict(
        (record.rank,),
        f"rank {record.rank} is dead: {record.address} has ended, last seen in {record.where}. "
        f"Its own output or the kernel's log (out of memory?) says why. {_RESTART}",
    )


def silent(record: PeerRecord, silent_s: float) -> Verdict:
    """Return the verdict on a rank that has stopped beating."""
    return Verdict(
        (record.rank,),
        f"rank {record.rank} is dead: {record.address} has given no sign for {silent_s:.0f} s, "
        f"last seen in {record.where}. It was stopped, or its machine or network is down. "
        f"{_RESTART}",
    )


def departed(record: PeerRecord) -> Verdict:
    """Return the verdict on a rank that has left while others waited for it."""
    why = f" with {record.left}" if record.left else ""
    return Verdict(
        (record.rank,),
        f"rank {record.rank} has left{why}: {record.address}, last in {record.where}. "
        "All ranks must take the same steps.",
    )


def stuck(records: Sequence[PeerRecord], stuck_after: float) -> Verdict | None:
    """Return the verdict when a rank has waited for `stuck_after` and others do not get on.

    A rank that moves, waits, or does work that takes long is not stuck. Where all of them wait,
    each for another, all are.
    """
    present = [record for record in records if record.left is None]
    if not any(record.waiting and record.still_s > stuck_after for record in present):
        return None
    busy = [record for record in present if not record.waiting]
    still = [r for r in busy if r.still_s > stuck_after and not r.long_running]
    if still:
        return _stuck_verdict(still, stuck_after)
    if not busy and all(record.still_s > stuck_after for record in present):
        return _parted_verdict(present, stuck_after)
    return None


def late(records: Sequence[PeerRecord], problem: str) -> Verdict:
    """Return the verdict when a collective has failed and no rank is known to be dead."""
    absent = [record for record in records if not record.waiting]
    places = "; ".join(f"rank {r.rank} is in {r.where}" for r in (absent or records)[:8])
    return Verdict(
        tuple(record.rank for record in absent),
        f"a collective failed ({problem}) and no rank is known to be dead; {places}. "
        "All ranks must take the same steps, each within the process group's timeout.",
    )


def _stuck_verdict(still: Sequence[PeerRecord], stuck_after: float) -> Verdict:
    places = "; ".join(f"rank {r.rank} ({r.address}) in {r.where}" for r in still[:8])
    return Verdict(
        tuple(record.rank for record in still),
        f"stuck while others waited for more than {stuck_after:g} s: {places}. "
        "See where it stands with py-spy dump --pid; if its work takes that long, "
        "raise stuck_after.",
    )


def _parted_verdict(records: Sequence[PeerRecord], stuck_after: float) -> Verdict:
    places = "; ".join(f"rank {r.rank} in {r.where}" for r in records[:8])
    return Verdict(
        tuple(record.rank for record in records),
        f"all ranks wait for each other for more than {stuck_after:g} s: {places}. "
        "They have parted: all ranks must take the same steps.",
    )
