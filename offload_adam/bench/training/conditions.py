"""What is asked of an overlapped step, as inequalities between measured times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload_adam.bench.training.contenders import FSDP2, OVERLAPPED, PLAIN, TORCHAO

STREAMING_SLACK = 1.15
PLAIN_SLACK = 1.10
SHARE_OF_PEERS = 0.25
HIDEABLE = 0.75
"""A peer's update that takes at most this much longer than the forward could nearly be hidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One contender at one batch.

    step_ms: median of its steps; exposed_ms: that less forward and backward of the model alone.
    update_ms: the update by itself.
    """

    step_ms: float
    exposed_ms: float
    update_ms: float
    peak_gpu_nbytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One ratio of forward to update.

    forward_ms: F, the model's forward alone.
    update_ms: U, this package's updates with their copies to the device, one after the other.
    bucket_ms: b, the way of one bucket: down, update, up.
    results: by contender, those that work here.
    """

    forward_ms: float
    update_ms: float
    bucket_ms: float
    results: Mapping[str, Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One inequality: `value <= bound`.

    holds: None where it asks for nothing here, or cannot be told; `reason` says why.
    """

    name: str
    value: float | None
    bound: float | None
    holds: bool | None
    reason: str = ""


def evaluate(point: Point) -> list[Condition]:
    """Return every condition at one point."""
    found = [_hidden(point), _near_plain(point)]
    for peer in (TORCHAO, FSDP2):
        found += [_share_of(point, peer), _never_more(point, peer)]
    return [*found, _memory(point)]


def reached(conditions: Mapping[str, list[Condition]]) -> dict[str, bool | None]:
    """Return for each condition whether it holds wherever it asks for something.

    None where it could be told nowhere.
    """
    together: dict[str, bool | None] = {}
    for condition in (one for every in conditions.values() for one in every):
        before = together.get(condition.name)
        if condition.holds is None:
            together.setdefault(condition.name, None)
        else:
            together[condition.name] = condition.holds and before is not False
    return together


def _hidden(point: Point) -> Condition:
    name = f"exposed <= {STREAMING_SLACK} * (max(0, U - F) + b)"
    bound = STREAMING_SLACK * (max(0.0, point.update_ms - point.forward_ms) + point.bucket_ms)
    ours = point.results.get(OVERLAPPED)
    if ours is None:
        return _untold(name, OVERLAPPED)
    return _compared(name, ours.exposed_ms, bound)


def _near_plain(point: Point) -> Condition:
    name = f"step <= {PLAIN_SLACK} * plain AdamW's where F >= U"
    if point.forward_ms < point.update_ms:
        return _unasked(name, "F < U")
    found = _pair(point, PLAIN)
    if isinstance(found, str):
        return _untold(name, found)
    ours, plain = found
    return _compared(name, ours.step_ms, PLAIN_SLACK * plain.step_ms)


def _share_of(point: Point, peer: str) -> Condition:
    name = f"exposed <= {SHARE_OF_PEERS} * that of {peer} where F >= {HIDEABLE} * its update"
    found = _pair(point, peer)
    if isinstance(found, str):
        return _untold(name, found)
    ours, theirs = found
    if point.forward_ms < HIDEABLE * theirs.update_ms:
        return _unasked(name, f"F < {HIDEABLE} * its update")
    return _compared(name, ours.exposed_ms, SHARE_OF_PEERS * theirs.exposed_ms)


def _never_more(point: Point, peer: str) -> Condition:
    name = f"exposed <= that of {peer}"
    found = _pair(point, peer)
    if isinstance(found, str):
        return _untold(name, found)
    ours, theirs = found
    return _compared(name, ours.exposed_ms, theirs.exposed_ms)


def _memory(point: Point) -> Condition:
    name = f"peak GPU memory <= that of {TORCHAO}"
    found = _pair(point, TORCHAO)
    if isinstance(found, str):
        return _untold(name, found)
    ours, theirs = found
    if ours.peak_gpu_nbytes is None or theirs.peak_gpu_nbytes is None:
        return _unasked(name, "no GPU")
    return _compared(name, ours.peak_gpu_nbytes, theirs.peak_gpu_nbytes)


def _pair(point: Point, peer: str) -> tuple[Result, Result] | str:
    """Return this package's result and the peer's, or the name of the one that is missing."""
    ours, theirs = point.results.get(OVERLAPPED), point.results.get(peer)
    if ours is None:
        return OVERLAPPED
    return peer if theirs is None else (ours, theirs)


def _compared(name: str, value: float, bound: float) -> Condition:
    return Condition(name=name, value=value, bound=bound, holds=value <= bound)


def _unasked(name: str, reason: str) -> Condition:
    return Condition(name=name, value=None, bound=None, holds=None, reason=reason)


def _untold(name: str, missing: str) -> Condition:
    return _unasked(name, f"{missing} was not measured")
