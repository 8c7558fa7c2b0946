"""Turn timings into results: medians over pairs, each pair kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from offload_adam.bench.contender import Contender
from offload_adam.bench.limit import gb_per_s
from offload_adam.bench.planes import MEMORY_DEFINITIONS

BASELINE = "offload_adam"
DEFINITIONS = {
    **MEMORY_DEFINITIONS,
    "ms_median": "milliseconds of one run, median over the rounds",
    "pairs": "one for each round: milliseconds of offload_adam and of this entry, and their ratio",
    "ratio_to_this": "this entry's time / offload_adam's time, median over the pairs; above 1, "
    "offload_adam is faster",
    "bytes_per_param": "memory traffic that the entry's passes cannot avoid, bytes a parameter",
    "gb_per_s": "bytes_per_param * numel / ms_median, in 1e9 bytes a second",
    "limit": "one read-modify-write pass over the streams of an fp32 update, no arithmetic: the "
    "fastest of Numba's and torch's, in huge pages and in ordinary memory",
    "limit_ratio": "the limit's time / offload_adam's time, median over the pairs; 1 is the limit",
}


@dataclass(frozen=True)
class Pair:
    """One round: this package's time and another's, in milliseconds; `ratio` is ms / this_ms."""

    this_ms: float
    ms: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """One entry of the table; `ratio_to_this` is its time over this package's."""

    name: str
    memory: str
    bytes_per_param: int
    ms_median: float
    ms_min: float
    gb_per_s: float
    ratio_to_this: float
    pairs: tuple[Pair, ...]
    variant: str | None = None


def pair_up(this_ms: Sequence[float], other_ms: Sequence[float]) -> tuple[Pair, ...]:
    """Return the pairs of two contenders, round by round."""
    rounds = zip(this_ms, other_ms, strict=True)
    return tuple(Pair(this, other, other / this) for this, other in rounds)


def median_ratio(pairs: Sequence[Pair]) -> float:
    """Return the median of the pairs' ratios, which is not the ratio of the medians."""
    return median(pair.ratio for pair in pairs)


def summarise(
    timings: Mapping[str, Sequence[float]], contenders: Sequence[Contender], numel: int
) -> list[Result]:
    """Return one result for each contender, in their order."""
    return [_result(timings, contender, numel) for contender in contenders]


def _result(timings: Mapping[str, Sequence[float]], contender: Contender, numel: int) -> Result:
    times = timings[contender.name]
    pairs = pair_up(timings[BASELINE], times)
    return Result(
        name=contender.name,
        memory=contender.memory,
        bytes_per_param=contender.bytes_per_param,
        ms_median=median(times),
        ms_min=min(times),
        gb_per_s=gb_per_s(contender.bytes_per_param, numel, median(times)),
        ratio_to_this=median_ratio(pairs),
        pairs=pairs,
    )
