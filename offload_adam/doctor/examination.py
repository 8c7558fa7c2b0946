"""All findings about a machine, in the order in which they are shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from offload_adam.doctor import bandwidth_cache, devices, host_memory, processors, storage
from offload_adam.doctor.bandwidth import counts_to_try, measure_bandwidth
from offload_adam.doctor.bandwidth_cache import Bandwidth
from offload_adam.doctor.finding import Finding, Status, failed, ok, warning, worst
from offload_adam.doctor.network import Network, network_findings
from offload_adam.doctor.step import can_step, measure_step
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import threads_per_node

GOOD_SHARE = 0.8
STEP_SHARE = 0.5
BUSY_LOAD_PER_CORE = 0.5


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found.

    bandwidth: what was measured of memory, network and bus.
    """

    findings: tuple[Finding, ...]
    bandwidth: Bandwidth

    @property
    def status(self) -> Status:
        """The gravest of all."""
        return worst(self.findings)


def examine(
    local_world_size: int,
    folder: Path,
    *,
    measure: bool = True,
    num_parameters: float | None = None,
    network: Network | None = None,
) -> Examination:
    """Look at everything that a run depends on; a look that fails is a finding of its own.

    Args:
        local_world_size: ranks that are to run on this node.
        folder: where runs are to be written.
        measure: measure memory, bus and disk, for some seconds, and keep the bandwidths for
            training and plans.
        num_parameters: those that this node's ranks are to save.
        network: what the ranks have found together, before this one was left to look alone.
    """
    measured: list[Bandwidth] = []
    on_device = torch.cuda.is_available()

    def keep(found: Bandwidth) -> Path | None:
        measured.append(found)
        return bandwidth_cache.keep(found)

    def bandwidth() -> Iterator[Finding]:
        load_average = os.getloadavg()[0]  # before the measurement has its part in it
        num_threads = threads_per_node(local_world_size, on_device=on_device)
        memory = measure_bandwidth(counts_to_try(num_threads))
        yield from bandwidth_findings(memory, load_average)
        step = measure_step(num_threads) if can_step() else None
        if step is not None:
            yield step_finding(step, memory[num_threads])
        path = keep(Bandwidth(memory, step))
        if path is not None:
            yield ok("bandwidth kept", f"in {path}, for runs and plans to compare with")

    def ranks() -> Iterator[Finding]:
        yield from network_findings(network, bandwidth_cache.recall(), local_world_size)
        if network is not None and network.speed is not None:
            keep(Bandwidth(network={network.ranks: network.speed}))

    def gpus() -> Iterator[Finding]:
        speeds: list[float] = []
        yield from devices.device_findings(local_world_size, speeds if measure else None)
        if speeds:
            keep(Bandwidth(bus=min(speeds)))

    looks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("cores", lambda: processors.core_findings(local_world_size, on_device=on_device)),
        ("threading layer", lambda: [processors.threading_layer()]),
        ("vector width", lambda: [processors.vector_width()]),
        ("host memory", lambda: [host_memory.available()]),
        ("locked memory", _locked_limit),
        ("huge pages", lambda: [host_memory.huge_pages()]),
        ("NUMA", lambda: [host_memory.numa(local_world_size)]),
        *([("bandwidth", bandwidth)] if measure else []),
        ("network", ranks),
        ("CUDA", gpus),
        ("disk", lambda: [storage.free_disk(folder)]),
        *([("last save", lambda: [storage.last_save(folder, num_parameters)])] if measure else []),
    ]
    findings = [finding for topic, look in looks for finding in looked(topic, look)]
    return Examination(tuple(findings), reduce(Bandwidth.updated, measured, Bandwidth()))


def _locked_limit() -> list[Finding]:
    return [host_memory.locked_limit(needed=torch.cuda.is_available())]


def looked(topic: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a look finds, and its exception as a last finding where it raises one."""
    findings: list[Finding] = []
    try:
        findings.extend(look())
    except HostMemoryError as error:
        findings.append(failed(topic, str(error), "free memory: a run needs more than this"))
    except Exception as error:
        found = f"cannot be looked at: {type(error).__name__}: {error}"
        findings.append(warning(topic, found, "a run may fail at the same place"))
    return findings


def bandwidth_findings(gb_per_s: Mapping[int, float], load_average: float) -> Iterator[Finding]:
    """Yield the bandwidth by thread count; the largest count is what a node's ranks use together.

    Args:
        gb_per_s: by number of threads.
        load_average: of the last minute before.
    """
    most = max(gb_per_s)
    best = max(gb_per_s, key=lambda count: gb_per_s[count])
    for count, measured in gb_per_s.items():
        topic, found = f"bandwidth, {count} thread(s)", f"{measured:.1f} GB/s"
        if count == most and measured < GOOD_SHARE * gb_per_s[best]:
            yield warning(
                topic,
                f"{found}, and {best} thread(s) have more",
                f"set optimizer.num_threads: {best} for all ranks of a node together",
            )
        else:
            yield ok(topic, found)
    if load_average > BUSY_LOAD_PER_CORE * most:
        yield warning(
            "load",
            f"{load_average:.1f} on {most} core(s): the bandwidth was shared with something else",
            "measure again when the machine is idle",
        )


def step_finding(step: float, memory: float) -> Finding:
    """Judge what a step gets of the memory's bandwidth, both in GB/s with the same threads."""
    found = f"{step:.1f} GB/s, {step / memory:.0%} of the memory's"
    if step < STEP_SHARE * memory:
        return warning(
            "bandwidth of a step", found, "measure again when the machine is idle; see the threads"
        )
    return ok("bandwidth of a step", found)
