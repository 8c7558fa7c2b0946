"""What an overlapped step has to achieve, as inequalities between the times of `bench train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from offload_adam.bench.training.contenders import FSDP2, OVERLAPPED, PLAIN, TORCHAO

STREAMING_SLACK = 1.15
PLAIN_SLACK = 1.10
SHARE_OF_PEERS = 0.25
HIDEABLE = 0.75
"""A forward that takes at least this part of a peer's update could hide most of the update."""

Row = Mapping[str, Any]


class Condition(NamedTuple):
    """One inequality: `value <= bound`.

    holds: None if the inequality does not apply at this batch or has no result; `reason` says why.
    """

    name: str
    value: float | None
    bound: float | None
    holds: bool | None
    reason: str = ""


def evaluate(point: Mapping[str, Any]) -> list[Condition]:
    """Return every condition at one point of a report; none if its F, U or b is not known.

    F is the model's forward, U the optimizer's updates without overlap, b a bucket's part of them.
    """
    forward, update, bucket = (point[key] for key in ("forward_ms", "update_ms", "bucket_ms"))
    if None in (forward, update, bucket, point["forward_backward_ms"]):
        return []

    def hidden(ours: Row, _: Row) -> tuple[float, float]:
        return ours["exposed_ms"], STREAMING_SLACK * (max(0.0, update - forward) + bucket)

    def near_plain(ours: Row, plain: Row) -> tuple[float, float] | str:
        return "F < U" if forward < update else (ours["step_ms"], PLAIN_SLACK * plain["step_ms"])

    def share(ours: Row, peer: Row) -> tuple[float, float] | str:
        if forward < HIDEABLE * peer["update_ms"]:
            return f"F < {HIDEABLE} * its update"
        return ours["exposed_ms"], SHARE_OF_PEERS * peer["exposed_ms"]

    def never_more(ours: Row, peer: Row) -> tuple[float, float]:
        return ours["exposed_ms"], peer["exposed_ms"]

    def memory(ours: Row, peer: Row) -> tuple[float, float] | str:
        if ours["peak_gpu_gib"] is None or peer["peak_gpu_gib"] is None:
            return "no GPU"
        return ours["peak_gpu_gib"], peer["peak_gpu_gib"]

    asked: list[tuple[str, str, Callable[[Row, Row], tuple[float, float] | str]]] = [
        (f"exposed <= {STREAMING_SLACK} * (max(0, U - F) + b)", OVERLAPPED, hidden),
        (f"step <= {PLAIN_SLACK} * plain AdamW's where F >= U", PLAIN, near_plain),
    ]
    for peer in (TORCHAO, FSDP2):
        name = f"exposed <= {SHARE_OF_PEERS} * that of {peer} where F >= {HIDEABLE} * its update"
        asked += [(name, peer, share), (f"exposed <= that of {peer}", peer, never_more)]
    asked.append((f"peak GPU memory <= that of {TORCHAO}", TORCHAO, memory))
    return [_condition(name, point["contenders"], peer, compare) for name, peer, compare in asked]


def _condition(
    name: str,
    rows: Mapping[str, Row],
    other: str,
    compare: Callable[[Row, Row], tuple[float, float] | str],
) -> Condition:
    """Evaluate one condition.

    Args:
        other: the contender to compare with, besides this package.
        compare: maps both rows to value and bound, or to a reason why the condition does not
            apply.
    """
    missing = [one for one in (OVERLAPPED, other) if "reason" in rows.get(one, {"reason": ""})]
    if missing:
        return Condition(name, None, None, None, f"{missing[0]} was not measured")
    found = compare(rows[OVERLAPPED], rows[other])
    if isinstance(found, str):
        return Condition(name, None, None, None, found)
    value, bound = found
    return Condition(name, value, bound, value <= bound)


def reached(points: Iterable[Iterable[Condition]]) -> dict[str, bool | None]:
    """Return for each condition whether it holds at all points where it applies, None if nowhere.

    Args:
        points: the conditions of each point.
    """
    combined: dict[str, bool | None] = {}
    for condition in (one for conditions in points for one in conditions):
        before = combined.setdefault(condition.name, None)
        if condition.holds is not None:
            combined[condition.name] = condition.holds and before is not False
    return combined
