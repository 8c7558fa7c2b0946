"""What an overlapped step has to achieve, as inequalities between measured times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from offload_adam.bench.training.contenders import FSDP2, OVERLAPPED, PLAIN, TORCHAO

STREAMING_SLACK = 1.15
PLAIN_SLACK = 1.10
SHARE_OF_PEERS = 0.25
HIDEABLE = 0.75
"""A forward that takes at least this part of a peer's update could hide most of the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One contender at one batch.

    step_ms: median of its steps.
    exposed_ms: step_ms without forward and backward of the model alone.
    update_ms: the update alone, after backward has finished.
    """

    step_ms: float
    exposed_ms: float
    update_ms: float
    peak_gpu_nbytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The results at one batch.

    forward_ms: F, the model's forward alone.
    update_ms: U, this package's updates with their H2D copies, without overlap.
    bucket_ms: b, D2H copy, update and H2D copy of one bucket.
    results: by contender, those that work here.
    """

    forward_ms: float
    update_ms: float
    bucket_ms: float
    results: Mapping[str, Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One inequality: `value <= bound`.

    holds: None if the inequality does not apply at this batch or has no result; `reason` says why.
    """

    name: str
    value: float | None
    bound: float | None
    holds: bool | None
    reason: str = ""


def evaluate(point: Point) -> list[Condition]:
    """Return every condition at one point."""
    forward, update = point.forward_ms, point.update_ms

    def hidden(ours: Result, _: Result) -> tuple[float, float]:
        bound = STREAMING_SLACK * (max(0.0, update - forward) + point.bucket_ms)
        return ours.exposed_ms, bound

    def near_plain(ours: Result, plain: Result) -> tuple[float, float] | str:
        return "F < U" if forward < update else (ours.step_ms, PLAIN_SLACK * plain.step_ms)

    def share(ours: Result, peer: Result) -> tuple[float, float] | str:
        if forward < HIDEABLE * peer.update_ms:
            return f"F < {HIDEABLE} * its update"
        return ours.exposed_ms, SHARE_OF_PEERS * peer.exposed_ms

    def never_more(ours: Result, peer: Result) -> tuple[float, float]:
        return ours.exposed_ms, peer.exposed_ms

    def memory(ours: Result, peer: Result) -> tuple[float, float] | str:
        if ours.peak_gpu_nbytes is None or peer.peak_gpu_nbytes is None:
            return "no GPU"
        return ours.peak_gpu_nbytes, peer.peak_gpu_nbytes

    asked: list[tuple[str, str, Callable[[Result, Result], Any]]] = [
        (f"exposed <= {STREAMING_SLACK} * (max(0, U - F) + b)", OVERLAPPED, hidden),
        (f"step <= {PLAIN_SLACK} * plain AdamW's where F >= U", PLAIN, near_plain),
    ]
    for peer in (TORCHAO, FSDP2):
        name = f"exposed <= {SHARE_OF_PEERS} * that of {peer} where F >= {HIDEABLE} * its update"
        asked += [(name, peer, share), (f"exposed <= that of {peer}", peer, never_more)]
    asked.append((f"peak GPU memory <= that of {TORCHAO}", TORCHAO, memory))
    return [_condition(name, point.results, other, compare) for name, other, compare in asked]


def _condition(
    name: str,
    results: Mapping[str, Result],
    other: str,
    compare: Callable[[Result, Result], tuple[float, float] | str],
) -> Condition:
    """Evaluate one condition.

    Args:
        other: the contender to compare with, besides this package.
        compare: maps both results to value and bound, or to a reason why the condition does not
            apply.
    """
    missing = [needed for needed in (OVERLAPPED, other) if needed not in results]
    if missing:
        found: tuple[float, float] | str = f"{missing[0]} was not measured"
    else:
        found = compare(results[OVERLAPPED], results[other])
    if isinstance(found, str):
        return Condition(name=name, value=None, bound=None, holds=None, reason=found)
    value, bound = found
    return Condition(name=name, value=value, bound=bound, holds=value <= bound)


def reached(points: Mapping[str, list[Condition]]) -> dict[str, bool | None]:
    """Return for each condition whether it holds at all points where it applies, None if nowhere.

    Args:
        points: the conditions of each point.
    """
    combined: dict[str, bool | None] = {}
    for condition in (one for conditions in points.values() for one in conditions):
        before = combined.setdefault(condition.name, None)
        if condition.holds is not None:
            combined[condition.name] = condition.holds and before is not False
    return combined
