"""Time contenders in turns in one process, and compare each with this package.

`bench kernel`, `bench step` and, on each rank, `bench fsdp2` make a list of contenders for
`compare`; the measurements in tests/bench of the source repository call `interleave`. `bench train`
runs each contender in its own process instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch

from offload_adam.bench.machine import describe_machine
from offload_adam.errors import HostMemoryError
from offload_adam.kernels import threads
from offload_adam.units import format_nbytes

Clock = Callable[[], float]
Timings = dict[str, list[float]]  # milliseconds of each round, by contender
Result = dict[str, Any]  # the times of one contender; DEFINITIONS explains the keys

OURS = "offload_adam"
WARMUP_ROUNDS = 2
# After its work, a thread of torch's or Numba's pool spins for a while. Without this pause it would
# take a core of the next contender.
REST_S = 0.01
DEFINITIONS = {
    "variant": "for the best of several contenders, the name of this contender",
    "ms_median": "milliseconds of one run, median over the rounds",
    "pairs": "one for each round: milliseconds of offload_adam, of this entry, and their ratio",
    "ratio_to_this": "this entry's time / offload_adam's time, median over the pairs; above 1, "
    "offload_adam is faster",
    "bytes_per_param": "bytes of memory traffic for each parameter, if every pass reads and writes "
    "each of its tensors once",
    "gb_per_s": "bytes_per_param * numel / ms_median, in 1e9 bytes a second",
    "memory": "offload_adam keeps its state in huge pages; the others use what torch.empty returns",
}


@dataclass(frozen=True)
class Contender:
    """One implementation of the measured work.

    name: in the table and in the JSON.
    run: does the work once, on its own data.
    bytes_per_param: memory traffic for each parameter; see DEFINITIONS.
    prepare: called before each run, outside the timing.
    """

    name: str
    run: Callable[[], object]
    bytes_per_param: float = 0
    prepare: Callable[[], object] | None = None


def prepare_machine(nbytes: int, num_threads: int) -> dict[str, Any]:
    """Check the available memory, set the threads of torch and Numba, and describe the machine.

    Raises:
        HostMemoryError: fewer than `nbytes` are available. `torch.empty` would succeed, and the
            kernel would kill the process later.
    """
    available_nbytes = psutil.virtual_memory().available
    if nbytes > available_nbytes:
        raise HostMemoryError(
            f"This benchmark needs about {format_nbytes(nbytes)} of memory, but only "
            f"{format_nbytes(available_nbytes)} is available. Measure fewer parameters."
        )
    torch.set_num_threads(num_threads)
    threads.plan_threads(num_threads)
    return describe_machine(num_threads)


def interleave(
    contenders: Sequence[Contender], num_rounds: int, *, clock: Clock = time.perf_counter
) -> Timings:
    """Run all contenders once in each round, and return their milliseconds by name.

    A change of the machine's speed then affects all contenders alike. Every second round runs in
    reverse order, so that no contender always follows the same other one. Warmup rounds are not
    returned.
    """
    timings: Timings = {contender.name: [] for contender in contenders}
    if len(timings) != len(contenders):
        raise AssertionError("Two contenders have the same name.")
    for number in range(WARMUP_ROUNDS + num_rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            elapsed_s = _timed(contender, clock)
            if number >= WARMUP_ROUNDS:
                timings[contender.name].append(elapsed_s * 1e3)
    return timings


def _timed(contender: Contender, clock: Clock) -> float:
    if contender.prepare is not None:
        contender.prepare()
    time.sleep(REST_S)
    start_s = clock()
    contender.run()
    return clock() - start_s


def pair_up(this_ms: Sequence[float], other_ms: Sequence[float]) -> list[dict[str, float]]:
    """Return the pairs of two contenders, round by round, as DEFINITIONS explains them."""
    rounds = zip(this_ms, other_ms, strict=True)
    return [{"this_ms": this, "ms": other, "ratio": other / this} for this, other in rounds]


def median_ratio(pairs: Sequence[Mapping[str, float]]) -> float:
    """Return the median of the pairs' ratios, which is not the ratio of the medians."""
    return median(pair["ratio"] for pair in pairs)


def gb_per_s(bytes_per_param: float, numel: int, milliseconds: float) -> float:
    """Return a bandwidth in 1e9 bytes a second."""
    return bytes_per_param * numel / milliseconds / 1e6


def summarize(
    timings: Mapping[str, Sequence[float]], contenders: Sequence[Contender], numel: int
) -> list[Result]:
    """Return one result for each contender, in the order of the contenders."""
    results: list[Result] = []
    for contender in contenders:
        times = timings[contender.name]
        pairs = pair_up(timings[OURS], times)
        results.append(
            {
                "name": contender.name,
                "bytes_per_param": contender.bytes_per_param,
                "ms_median": median(times),
                "ms_min": min(times),
                "gb_per_s": gb_per_s(contender.bytes_per_param, numel, median(times)),
                "ratio_to_this": median_ratio(pairs),
                "pairs": pairs,
                "variant": None,
            }
        )
    return results


def best_of(name: str, variants: Sequence[str], results: Sequence[Result]) -> Result:
    """Return a copy of the fastest of some results under a new name."""
    fastest = min(
        (one for one in results if one["name"] in variants), key=lambda one: one["ms_median"]
    )
    return {**fastest, "name": name, "variant": fastest["name"]}


def compare(
    benchmark: str,
    contenders: Sequence[Contender],
    *,
    numel: int,
    num_pairs: int,
    machine: Mapping[str, Any],
    left_out: Mapping[str, str],
    definitions: Mapping[str, str],
    best: Mapping[str, Sequence[str]] | None = None,
    combine: Callable[[Timings], Timings] = lambda timings: timings,
) -> dict[str, Any]:
    """Time contenders, this package first, and return the report, a JSON object.

    Args:
        left_out: why a contender is not among them, by name.
        definitions: what this benchmark's own entries mean, by name.
        best: variants by name; the fastest variant is added under this name after this package.
        combine: combines the timings of all ranks.
    """
    with torch.no_grad():
        timings = combine(interleave(contenders, num_pairs))
    ours, *others = summarize(timings, contenders, numel)
    bests = [best_of(name, variants, others) for name, variants in (best or {}).items()]
    return {
        "benchmark": benchmark,
        "numel": numel,
        "num_pairs": num_pairs,
        "machine": machine,
        "results": [ours, *bests, *others],
        "left_out": left_out,
        "definitions": {**DEFINITIONS, **definitions},
    }
