"""All checks of a machine, in the order in which they are printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path

import torch

from offload_adam.doctor import bandwidth_cache, devices, host, storage
from offload_adam.doctor.bandwidth import counts_to_try, measure_bandwidth, measure_step
from offload_adam.doctor.bandwidth_cache import Bandwidth
from offload_adam.doctor.finding import Finding, failed, ok, warning
from offload_adam.doctor.network import Network, network_findings
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import threads_per_node

GOOD_SHARE = 0.8
"""Of the highest bandwidth: all threads of a node should reach it."""
STEP_SHARE = 0.5
"""Of the memory bandwidth: a whole optimizer step should reach it."""
BUSY_LOAD_PER_CORE = 0.5


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
        network: what the ranks have measured together; None for a process without peers.
    """
    measured: list[Bandwidth] = []
    on_device = torch.cuda.is_available()

    def keep(found: Bandwidth) -> Path | None:
        measured.append(found)
        return bandwidth_cache.keep(found)

    def bandwidth() -> Iterator[Finding]:
        load_average = os.getloadavg()[0]  # read first: the measurement itself raises it
        num_threads = threads_per_node(local_world_size, on_device=on_device)
        memory = measure_bandwidth(counts_to_try(num_threads))
        yield from bandwidth_findings(memory, load_average)
        step = measure_step(num_threads)
        yield step_finding(step, memory[num_threads])
        path = keep(Bandwidth(memory, step))
        if path is not None:
            yield ok("bandwidth kept", f"saved in {path}; training and `offload-adam plan` read it")

    def ranks() -> Iterator[Finding]:
        yield from network_findings(network, bandwidth_cache.recall(), local_world_size)
        if network is not None and network.speed is not None:
            keep(Bandwidth(network={network.ranks: network.speed}))

    def gpus() -> Iterator[Finding]:
        speeds: list[float] = []
        yield from devices.device_findings(local_world_size, speeds if measure else None)
        if speeds:
            keep(Bandwidth(bus=min(speeds)))

    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("cores", lambda: host.core_findings(local_world_size, on_device=on_device)),
        ("threading layer", lambda: [host.threading_layer()]),
        ("vector width", lambda: [host.vector_width()]),
        ("host memory", lambda: [host.available()]),
        ("locked memory", lambda: [host.locked_limit(needed=on_device)]),
        ("huge pages", lambda: [host.huge_pages()]),
        ("NUMA", lambda: [host.numa(local_world_size)]),
        *([("bandwidth", bandwidth)] if measure else []),
        ("network", ranks),
        ("CUDA", gpus),
        ("disk", lambda: [storage.free_disk(folder)]),
        *([("last save", lambda: [storage.last_save(folder, num_parameters)])] if measure else []),
    ]
    findings = [finding for topic, check in checks for finding in run_check(topic, check)]
    return findings, reduce(Bandwidth.updated, measured, Bandwidth())


def run_check(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of a check; if it raises, the exception is the last finding."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except HostMemoryError as error:
        findings.append(failed(topic, str(error), "free memory: a run needs more than this check"))
    except Exception as error:
        found = f"the check raised {type(error).__name__}: {error}"
        findings.append(warning(topic, found, "fix the cause: a run may fail at the same place"))
    return findings


def bandwidth_findings(gb_per_s: Mapping[int, float], load_average: float) -> Iterator[Finding]:
    """Yield the memory bandwidth by number of threads, and a warning if the machine was busy.

    Args:
        gb_per_s: by number of threads; the ranks of a node use the largest number together.
        load_average: of the minute before the measurement.
    """
    most = max(gb_per_s)
    best = max(gb_per_s, key=lambda count: gb_per_s[count])
    for count, measured in gb_per_s.items():
        topic, found = f"bandwidth, {count} thread(s)", f"{measured:.1f} GB/s"
        if count == most and measured < GOOD_SHARE * gb_per_s[best]:
            found += f", but {best} thread(s) reach {gb_per_s[best]:.1f} GB/s"
            advice = f"set optimizer.num_threads: {best} for all ranks of a node together"
            yield warning(topic, found, advice)
        else:
            yield ok(topic, found)
    if load_average > BUSY_LOAD_PER_CORE * most:
        found = f"load average {load_average:.1f} on {most} core(s): other processes were running"
        yield warning("load", found, "the bandwidths may be too low: measure on an idle machine")


def step_finding(step: float, memory: float) -> Finding:
    """Compare the bandwidth of a step with that of the memory, both in GB/s for equal threads."""
    found = f"{step:.1f} GB/s, {step / memory:.0%} of the memory bandwidth"
    if step < STEP_SHARE * memory:
        advice = "measure on an idle machine; if it stays low, check the lines on cores and threads"
        return warning("bandwidth of a step", found, advice)
    return ok("bandwidth of a step", found)
