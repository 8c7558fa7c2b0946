"""`bench kernel`: the update alone, in fp32."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from offload_adam.bench.comparison import compare, use_threads, yardsticks
from offload_adam.bench.contender import Contender
from offload_adam.bench.interleave import Clock, Turn, interleave
from offload_adam.bench.machine import describe_machine
from offload_adam.bench.peers import available_peers, torch_fused
from offload_adam.bench.planes import (
    HUGE_PAGES,
    ORDINARY,
    Planes,
    fill_with_noise,
    make_planes,
    require_memory,
)
from offload_adam.bench.results import DEFINITIONS
from offload_adam.bench.update_contenders import OffloadUpdate, OptimizerUpdate

DENORMAL = 5.6e-45
"""Four times the smallest positive float32: where a moment of zero gradients comes to rest."""

# Two sets of planes, and the copy's target for each.
_HOST_BYTES_PER_PARAM = 2 * (16 + 4)


def measure_kernel(
    numel: int, num_threads: int, num_pairs: int, *, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Return the report of `bench kernel`, a JSON object.

    Raises:
        LimitRefusedError: the machine was disturbed at every attempt.
        HostMemoryError: the node does not have enough memory available.
    """
    require_memory(_HOST_BYTES_PER_PARAM * numel)
    use_threads(num_threads)
    machine = describe_machine(num_threads)
    planes, ordinary = (make_planes(numel, memory) for memory in (HUGE_PAGES, ORDINARY))
    ours = OffloadUpdate(planes, num_threads)
    peers, left_out = peer_updates([ordinary, planes])
    with torch.no_grad():
        comparison = compare(
            [ours, *peers],
            yardsticks([planes, ordinary], num_threads),
            numel,
            num_pairs,
            clock=clock,
        )
        denormal_ratio = measure_denormals(ours, planes, num_pairs, clock=clock)
    return {
        "benchmark": "kernel",
        "numel": numel,
        "num_pairs": num_pairs,
        "machine": machine,
        **asdict(comparison),
        "denormal_ratio": denormal_ratio,
        "left_out": left_out,
        "definitions": {
            **DEFINITIONS,
            "denormal_ratio": f"time with zero gradients and both moments at {DENORMAL}, refilled "
            "before each run, / time on ordinary values; median over the pairs",
        },
    }


def peer_updates(every_planes: Sequence[Planes]) -> tuple[list[Contender], dict[str, str]]:
    """Return torch and the peers that work here on each set of planes, and why others do not."""
    contenders: list[Contender] = []
    left_out: dict[str, str] = {}
    for planes in every_planes:
        optimizers, left_out = available_peers(planes)
        contenders.append(OptimizerUpdate("torch_fused", torch_fused(planes), planes))
        contenders += [OptimizerUpdate(name, one, planes) for name, one in optimizers.items()]
    return contenders, left_out


def measure_denormals(
    ours: OffloadUpdate, planes: Planes, num_pairs: int, *, clock: Clock = time.perf_counter
) -> float:
    """Return the time on moments that have decayed into the denormals over that on normal ones."""

    def decayed() -> None:
        planes.gradient.zero_()
        planes.exp_avg.fill_(DENORMAL)
        planes.exp_avg_sq.fill_(DENORMAL)

    def normal() -> None:
        fill_with_noise(planes.gradient)
        planes.exp_avg.fill_(1e-3)
        planes.exp_avg_sq.fill_(1e-4)

    turns = [Turn("normal", ours.run, normal), Turn("denormal", ours.run, decayed)]
    timings = interleave(turns, num_pairs, clock=clock)
    rounds = zip(timings["denormal"], timings["normal"], strict=True)
    return median(denormal / ordinary for denormal, ordinary in rounds)
