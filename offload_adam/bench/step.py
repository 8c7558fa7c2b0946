"""`bench step`: all of a CPU-side step, bf16 gradient to bf16 parameter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from offload_adam.bench.comparison import compare, use_threads, yardsticks
from offload_adam.bench.contender import Contender
from offload_adam.bench.interleave import Clock
from offload_adam.bench.limit import Limit
from offload_adam.bench.machine import describe_machine
from offload_adam.bench.peers import available_peers, torch_fused
from offload_adam.bench.planes import HUGE_PAGES, ORDINARY, named, require_memory
from offload_adam.bench.results import DEFINITIONS, Result
from offload_adam.bench.step_contenders import (
    BLOCKED,
    CLIPPED,
    SCALED,
    BlockedStep,
    ClippedStep,
    OffloadStep,
    ScaledStep,
    StepStreams,
    step_streams,
)

# Two sets of planes with the copies' targets and bf16 streams; this package's state and its
# parameter, which stands twice while it moves into its bucket.
_HOST_BYTES_PER_PARAM = 2 * (16 + 4 + 4) + 12 + 4


@dataclass(frozen=True)
class Bound:
    """What this machine's bandwidth leaves for a step of so many bytes to reach."""

    ms: float
    ratio_to_torch_fused: float


def measure_step(
    numel: int, num_threads: int, num_pairs: int, *, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Return the report of `bench step`, a JSON object.

    Raises:
        LimitRefusedError: the machine was disturbed at every attempt.
        HostMemoryError: the node does not have enough memory available.
    """
    require_memory(_HOST_BYTES_PER_PARAM * numel)
    use_threads(num_threads)
    machine = describe_machine(num_threads)
    ordinary, huge = (step_streams(numel, memory) for memory in (ORDINARY, HUGE_PAGES))
    peers, left_out = peer_steps([ordinary, huge])
    with torch.no_grad():
        comparison = compare(
            [OffloadStep(ordinary, num_threads), *peers],
            yardsticks([huge.wide, ordinary.wide], num_threads),
            numel,
            num_pairs,
            clock=clock,
        )
    results = with_torch_fused(comparison.results)
    return {
        "benchmark": "step",
        "numel": numel,
        "num_pairs": num_pairs,
        "machine": machine,
        **asdict(replace(comparison, results=results)),
        "bound": asdict(bandwidth_bound(comparison.limit, results[0], results[1])),
        "left_out": left_out,
        "definitions": {
            **DEFINITIONS,
            "bound": "this step's bytes at the limit's bandwidth, and their share of torch_fused's "
            "time, median over the rounds: what a step could reach that had nothing to compute",
            "torch_fused": f"the faster of {CLIPPED} and {SCALED}",
            CLIPPED: "gradient converted to fp32, clip_grad_norm_, fused AdamW, rounded to bf16",
            SCALED: "the same with fused AdamW fed the clip factor through grad_scale",
            BLOCKED: "fused AdamW in blocks that stay in cache between conversions and update: a "
            "loop that torch does not come with",
        },
    }


def bandwidth_bound(limit: Limit, ours: Result, torch_fused: Result) -> Bound:
    """Return the time of this package's step if it ran at the limit's bandwidth."""
    share = ours.bytes_per_param / limit.bytes_per_param
    rounds = zip(limit.pairs_ms, torch_fused.pairs, strict=True)
    return Bound(limit.ms_median * share, median(ms * share / pair.ms for ms, pair in rounds))


def peer_steps(every_streams: Sequence[StepStreams]) -> tuple[list[Contender], dict[str, str]]:
    """Return torch's ways and the peers that work here on all streams, and why others do not."""
    contenders: list[Contender] = []
    left_out: dict[str, str] = {}
    for streams in every_streams:
        optimizers, left_out = available_peers(streams.wide)
        contenders += [
            ClippedStep(CLIPPED, torch_fused(streams.wide), streams),
            ScaledStep(torch_fused(streams.wide), streams),
            BlockedStep(streams),
            *(ClippedStep(name, one, streams) for name, one in optimizers.items()),
        ]
    return contenders, left_out


def with_torch_fused(results: Sequence[Result]) -> list[Result]:
    """Return the results with torch's baselines, the faster of its two ways, put in second."""
    baselines = []
    for memory in (ORDINARY, HUGE_PAGES):
        ways = {named(CLIPPED, memory), named(SCALED, memory)}
        faster = min((one for one in results if one.name in ways), key=lambda one: one.ms_median)
        baselines.append(replace(faster, name=named("torch_fused", memory), variant=faster.name))
    return [results[0], *baselines, *results[1:]]
