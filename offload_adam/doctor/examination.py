"""All checks of a machine, in the order in which they are printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from offload_adam.doctor import bandwidth_cache, devices, host, storage
from offload_adam.doctor.bandwidth import (
    counts_to_try,
    measure_bandwidth,
    measure_step,
    step_nbytes_per_element,
)
from offload_adam.doctor.bandwidth_cache import Bandwidth
from offload_adam.doctor.finding import Finding
from offload_adam.doctor.network import Network, network_finding
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import threads_per_node
from offload_adam.options import LOW_PRECISION, StateFormat

GOOD_SHARE = 0.8
"""Share of the highest bandwidth that all threads of a node together should reach."""
STEP_SHARE = 0.5
"""Share of the memory bandwidth that a whole optimizer step should reach."""
BUSY_LOAD_PER_CORE = 0.5
"""Load average per measured thread above which the measurements are in doubt."""


def examine(
    local_world_size: int,
    folder: Path,
    *,
    measure: bool = True,
    num_parameters: float | None = None,
    network: Network | None = None,
) -> tuple[list[Finding], Bandwidth]:
    """Return the findings on everything that a run depends on, and the measured bandwidths.

    A check that raises becomes a finding.

    Args:
        local_world_size: number of ranks to be started on this node.
        folder: where runs are to be written.
        measure: measure memory, bus and disk, which takes some seconds, and save the bandwidths
            for training and plans.
        num_parameters: number that the ranks of this node save; None if it is not known.
        network: the speed that the ranks have measured together; None for a process without peers.
    """
    measured = Bandwidth()
    on_device = torch.cuda.is_available()

    def memory_and_step() -> Iterator[Finding]:
        load_average = os.getloadavg()[0]  # read first: the measurement itself raises it
        num_threads = threads_per_node(local_world_size, on_device=on_device)
        measured.memory = measure_bandwidth(counts_to_try(num_threads))
        yield from bandwidth_findings(measured.memory, load_average)
        measured.step = measure_step(num_threads)
        yield step_finding(measured.step, measured.memory[num_threads])
        for state_format in LOW_PRECISION:
            step = measure_step(num_threads, state_format=state_format)
            measured.low_precision_steps[state_format] = step
            yield low_precision_finding(state_format, step)

    def between_ranks() -> Iterator[Finding]:
        yield network_finding(network, bandwidth_cache.recall(), local_world_size)
        if network is not None and network.speed is not None:
            measured.network = {network.ranks: network.speed}

    def save() -> Iterator[Finding]:
        path = None if measured == Bandwidth() else bandwidth_cache.keep(measured)
        if path is not None:
            found = f"in {path}, for training and `offload-adam plan`"
            yield Finding("saved bandwidths", found)

    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "cores": lambda: host.core_findings(local_world_size, on_device=on_device),
        "threading layer": lambda: [host.threading_layer()],
        "vector width": lambda: [host.vector_width()],
        "host memory": lambda: [host.available()],
        "locked memory": lambda: [host.locked_limit(needed=on_device)],
        "huge pages": lambda: [host.huge_pages()],
        "NUMA": lambda: [host.numa(local_world_size)],
        "bandwidth": lambda: memory_and_step() if measure else [],
        "network": between_ranks,
        "CUDA": lambda: devices.device_findings(local_world_size, measured if measure else None),
        # After the last check that measures a bandwidth. The disk's speed is not saved.
        "saved bandwidths": save,
        "disk": lambda: [storage.free_disk(folder)],
        "last save": lambda: [storage.last_save(folder, num_parameters)] if measure else [],
    }
    findings = [one for topic, check in checks.items() for one in run_check(topic, check)]
    return findings, measured


def run_check(topic: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. If the check raises, the exception becomes a finding."""
    try:
        yield from check()
    except HostMemoryError as error:
        advice = "free memory: a run needs more than this check"
        yield Finding(topic, str(error), advice, is_fatal=True)
    except Exception as error:
        found = f"the check raised {type(error).__name__}: {error}"
        yield Finding(topic, found, "fix the cause: a run may fail at the same place")


def bandwidth_findings(gb_per_s: Mapping[int, float], load_average: float) -> Iterator[Finding]:
    """Yield the memory bandwidth by number of threads, and a warning if the machine was busy.

    Args:
        gb_per_s: by number of threads; the ranks of a node use the largest number together.
        load_average: of the minute before the measurement.
    """
    all_threads = max(gb_per_s)
    best = max(gb_per_s, key=lambda count: gb_per_s[count])
    for count, measured in gb_per_s.items():
        found, advice = f"{measured:.1f} GB/s", ""
        if count == all_threads and measured < GOOD_SHARE * gb_per_s[best]:
            found += f", but {best} thread(s) reach {gb_per_s[best]:.1f} GB/s"
            advice = (
                f"use {best} thread(s) for all ranks of a node together: optimizer.num_threads is "
                "the number of one rank"
            )
        yield Finding(f"bandwidth, {count} thread(s)", found, advice)
    if load_average > BUSY_LOAD_PER_CORE * all_threads:
        found = (
            f"load average {load_average:.1f} on {all_threads} core(s): other processes were "
            "running"
        )
        yield Finding("load", found, "the bandwidths may be too low: measure on an idle machine")


def step_finding(step: float, memory: float) -> Finding:
    """Compare the bandwidth of a step with that of the memory, both in GB/s for equal threads."""
    found = f"{step:.1f} GB/s, {step / memory:.0%} of the memory bandwidth"
    advice = "measure on an idle machine; if it stays low, see the checks of cores and threads"
    return Finding("bandwidth of a step", found, advice if step < STEP_SHARE * memory else "")


def low_precision_finding(state_format: StateFormat, step: float) -> Finding:
    """Return the bandwidth of a step in GB/s, and the bytes that it moves."""
    low, fp32 = step_nbytes_per_element(state_format), step_nbytes_per_element("fp32")
    found = f"{step:.1f} GB/s; a step moves {low:.3g} bytes a parameter instead of {fp32:.3g}"
    return Finding(f"bandwidth of a step, {state_format} state", found)
