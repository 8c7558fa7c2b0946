"""All checks of a machine, in the order in which they are printed."""

from __future__ import annotations

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
from offload_adam.doctor.load import OtherProcesses
from offload_adam.doctor.network import Network, network_finding
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import threads_per_node
from offload_adam.options import LOW_PRECISION, StateFormat

GOOD_SHARE = 0.8
"""Share of the highest bandwidth that all threads of a node together should reach."""
STEP_SHARE = 0.5
"""Share of the memory bandwidth that a whole optimizer step should reach."""
BUSY_SHARE = 0.1
"""Share of the measured cores that other processes use above which measurements are in doubt."""
NUM_ROUNDS = 3
"""Measurements of everything, one round after the other. The best one counts: other processes only
ever make it lower."""


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
        num_threads = threads_per_node(local_world_size, on_device=on_device)
        counts, others = counts_to_try(num_threads), OtherProcesses()
        formats: tuple[StateFormat, ...] = ("fp32", *LOW_PRECISION)
        memory, steps = dict.fromkeys(counts, 0.0), dict.fromkeys(formats, 0.0)
        for _ in range(NUM_ROUNDS):
            for count, found in measure_bandwidth(counts).items():
                memory[count] = max(memory[count], found)
            for state_format in formats:
                found = measure_step(num_threads, state_format=state_format)
                steps[state_format] = max(steps[state_format], found)
        other_cores = others.cores()
        measured.memory, measured.step = memory, steps.pop("fp32")
        measured.low_precision_steps = steps
        measured.busy = other_cores > BUSY_SHARE * num_threads
        yield from bandwidth_findings(memory, other_cores)
        yield step_finding(measured.step, memory[num_threads])
        for state_format, step in steps.items():
            yield low_precision_finding(state_format, step)

    def between_ranks() -> Iterator[Finding]:
        yield network_finding(network, bandwidth_cache.recall(), local_world_size)
        if network is not None and network.speed is not None:
            measured.network = {network.ranks: network.speed}

    def save() -> Iterator[Finding]:
        path = None if measured == Bandwidth() else bandwidth_cache.keep(measured)
        if path is not None:
            found = f"in {path}, for training and `offload-adam plan`"
            if measured.busy:
                found += "; greater ones that were saved earlier stay, since this machine was busy"
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
        "disk": lambda: [storage.free_disk(folder, num_parameters)],
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


def bandwidth_findings(gb_per_s: Mapping[int, float], other_cores: float) -> Iterator[Finding]:
    """Yield the memory bandwidth by number of threads, and a warning if the machine was busy.

    Args:
        gb_per_s: by number of threads; the ranks of a node use the largest number together.
        other_cores: number of cores that other processes used during the measurement.
    """
    all_threads = max(gb_per_s)
    busy = other_cores > BUSY_SHARE * all_threads
    best = max(gb_per_s, key=lambda count: gb_per_s[count])
    for count, measured in gb_per_s.items():
        found, advice = f"{measured:.1f} GB/s", ""
        if count == all_threads and not busy and measured < GOOD_SHARE * gb_per_s[best]:
            found += f", but {best} thread(s) reach {gb_per_s[best]:.1f} GB/s"
            advice = (
                f"use {best} thread(s) for all ranks of a node together: optimizer.num_threads is "
                "the number of one rank"
            )
        yield Finding(f"bandwidth, {count} thread(s)", found, advice)
    found = f"other processes used {other_cores:.1f} of {all_threads} core(s) meanwhile"
    advice = "the bandwidths may be too low: run doctor again on an idle machine"
    yield Finding("load", found, advice if busy else "")


def step_finding(step: float, memory: float) -> Finding:
    """Compare the bandwidth of a step with that of the memory, both in GB/s for equal threads."""
    topic = "bandwidth of a step"
    if step > memory:
        found = f"{step:.1f} GB/s, more than the {memory:.1f} GB/s that the memory was measured at"
        return Finding(topic, found, "run doctor again on an idle machine: one of them is wrong")
    found = f"{step:.1f} GB/s, {step / memory:.0%} of the memory bandwidth"
    advice = "run doctor again on an idle machine; if it stays low, see the checks of cores"
    return Finding(topic, found, advice if step < STEP_SHARE * memory else "")


def low_precision_finding(state_format: StateFormat, step: float) -> Finding:
    """Return the bandwidth of a step in GB/s, and the bytes that it moves."""
    low, fp32 = step_nbytes_per_element(state_format), step_nbytes_per_element("fp32")
    found = f"{step:.1f} GB/s; a step moves {low:.3g} bytes a parameter instead of {fp32:.3g}"
    return Finding(f"bandwidth of a step, {state_format} state", found)
