"""Decide from the records that ranks published which of them have failed; the errors for users."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from offload_adam.coordinator.progress import PeerRecord

_MOST_NAMED = 8  # most ranks in a message, which must stay readable if 1000 ranks hang


@dataclass(frozen=True, slots=True)
class Verdict:
    """The failed ranks and the error message.

    The first verdict that any rank writes to the store is final, and every rank raises it.
    """

    ranks: tuple[int, ...]
    text: str

    def to_json(self) -> str:
        """Return the verdict as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        """Read the output of `to_json`."""
        values = json.loads(text)
        return cls(tuple(values["ranks"]), values["text"])


def dead_verdict(record: PeerRecord) -> Verdict:
    """Return the verdict on a rank whose process ended without `leave`."""
    return Verdict(
        (record.rank,),
        f"Rank {record.rank} is dead: {record.address} ended unexpectedly, last seen in "
        f"{record.progress.where}. Check its log and the kernel's log (out of memory?), then "
        "restart from the newest checkpoint, or from kept state if there is any.",
    )


def silent_verdict(record: PeerRecord, silent_s: float) -> Verdict:
    """Return the verdict on a rank that sends no heartbeats."""
    return Verdict(
        (record.rank,),
        f"Rank {record.rank} is dead: {record.address} has sent no heartbeat for {silent_s:.0f} s, "
        f"last seen in {record.progress.where}. It was stopped, or its machine or network is down. "
        "Restart from the newest checkpoint, or from kept state if there is any.",
    )


def exited_verdict(record: PeerRecord) -> Verdict:
    """Return the verdict on a rank that left while other ranks waited for it."""
    why = f" with {record.left}" if record.left else ""
    return Verdict(
        (record.rank,),
        f"Rank {record.rank} exited{why}: {record.address}, last seen in {record.progress.where}. "
        "Other ranks were waiting for it. Check its log. All ranks must take the same steps.",
    )


def hung_verdict(records: Sequence[PeerRecord], stuck_after: float) -> Verdict | None:
    """Return a verdict if a rank has waited for `stuck_after` and others make no progress.

    A rank that makes progress, waits, or is in a long-running phase is not hung. If all ranks wait,
    they wait for each other, and all are hung.

    Args:
        records: of all ranks.
        stuck_after: seconds.
    """
    present = [record for record in records if record.left is None]
    if not any(record.progress.waiting and record.still_s > stuck_after for record in present):
        return None
    busy = [record for record in present if not record.progress.waiting]
    still = [r for r in busy if r.still_s > stuck_after and not r.progress.long_running]
    if still:
        return _verdict_on(
            still,
            f"Hung while other ranks waited for more than {stuck_after:g} s: {_describe(still)}. "
            "Inspect these processes with py-spy dump --pid. If the work takes that long, increase "
            "stuck_after.",
        )
    if not busy and all(record.still_s > stuck_after for record in present):
        return _verdict_on(
            present,
            f"All ranks have waited for each other for more than {stuck_after:g} s: "
            f"{_describe(present)}. All ranks must take the same steps.",
        )
    return None


def late_verdict(records: Sequence[PeerRecord], problem: str) -> Verdict:
    """Return the verdict on a collective that failed although no rank is known to be dead."""
    absent = [record for record in records if not record.progress.waiting]
    return _verdict_on(
        absent,
        f"A collective failed ({problem}), and no rank was found dead. "
        f"{'Not in the collective' if absent else 'Waiting'}: {_describe(absent or records)}. "
        "All ranks must take the same steps, each within the process group's timeout.",
    )


def unreachable_verdict(silence_s: float) -> Verdict:
    """Return the verdict on a store that does not answer, which names no rank."""
    return Verdict(
        (),
        f"The store has not answered for {silence_s:.0f} s. Check the process that hosts it (under "
        "torchrun the agent on the first node) and the network to it.",
    )


def _verdict_on(records: Iterable[PeerRecord], text: str) -> Verdict:
    return Verdict(tuple(record.rank for record in records), text)


def _describe(records: Sequence[PeerRecord]) -> str:
    named = records[:_MOST_NAMED]
    return "; ".join(f"rank {r.rank} ({r.address}) in {r.progress.where}" for r in named)
