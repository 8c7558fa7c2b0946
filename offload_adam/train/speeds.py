"""Speeds of this machine: for plans, and to warn if the updates of a run are slow."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import median

from offload_adam.doctor import bandwidth_cache
from offload_adam.doctor.bandwidth import bus_gb_per_s, measure_bandwidth, measure_step
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores, threads_per_node, threads_per_rank
from offload_adam.plan.inputs import Machine, Source, Training
from offload_adam.plan.timing import update_nbytes
from offload_adam.train.loop import Job
from offload_adam.train.plan import specs_of, training_of_job
from offload_adam.train.records import StepRecord

logger = logging.getLogger(__name__)

LEAST_NBYTES = 128 * 1024 * 1024
"""Least traffic of an update to judge, about 3 ms. Less would measure fixed costs and caches."""
NUM_WARMUP = 2
NUM_STEPS = 10
LEAST_SHARE = 0.5
_SHORT_NUMEL = 8_000_000
"""Elements of each array if doctor has measured nothing: 128 MB in all, about 50 ms."""


def known_speeds(training: Training) -> Machine:
    """Return the speeds that `offload-adam doctor` has measured.

    The network's speed counts only if it was measured with the same ranks and devices.
    """
    known = bandwidth_cache.recall()
    device = "cuda" if training.on_device else "cpu"
    ranks = bandwidth_cache.ranks_like(training.world_size, training.local_world_size, device)
    return Machine(
        host_gb_per_s=known.step,
        bus_gb_per_s=known.bus,
        network=known.network.get(ranks),
        sources=dict.fromkeys(("update", "bus", "network"), Source.KEPT),
    )


def measured_speeds(training: Training) -> Machine:
    """Measure a step and, on a GPU, the bus. The network's speed is as in `known_speeds`.

    Raises:
        HostMemoryError: a measurement does not fit into memory.
    """
    known = known_speeds(training)
    return replace(
        known,
        host_gb_per_s=measure_step(
            threads_per_node(training.local_world_size, on_device=training.on_device)
        ),
        bus_gb_per_s=min(bus_gb_per_s(0)) if training.on_device else None,
        sources={**known.sources, "update": Source.MEASURED, "bus": Source.MEASURED},
    )


class UpdateSpeed:
    """Warns once if the median update moves less than half of the memory's bandwidth.

    Args:
        nbytes: traffic of one update of this rank. An update that leaves out parameters moves
            less, and seems faster than it is.
        limit_gb_per_s: this rank's share of the memory's bandwidth.
    """

    def __init__(self, nbytes: int, limit_gb_per_s: float) -> None:
        self._nbytes = nbytes
        self._limit_gb_per_s = limit_gb_per_s
        self._updates_ms: list[float] = []

    def take(self, record: StepRecord) -> None:
        """Add the update of one step; judge all after `NUM_WARMUP + NUM_STEPS` updates."""
        # An overlapped update is timed in the record of the next step, skipped or not. So any
        # record with a time counts.
        update_ms = record.timings_ms.get("optimizer.update", 0.0)
        if update_ms <= 0.0 or len(self._updates_ms) == NUM_WARMUP + NUM_STEPS:
            return
        self._updates_ms.append(update_ms)
        if len(self._updates_ms) < NUM_WARMUP + NUM_STEPS:
            return
        achieved = self._nbytes / median(self._updates_ms[NUM_WARMUP:]) / 1e6
        if achieved < LEAST_SHARE * self._limit_gb_per_s:
            logger.warning(
                "The update moves %.1f GB/s on this rank, less than half of the %.1f GB/s that are "
                "its share of this machine's memory bandwidth. Run offload-adam doctor to find the "
                "cause.",
                achieved,
                self._limit_gb_per_s,
            )


def update_speed(job: Job) -> UpdateSpeed | None:
    """Return what judges this rank's updates, None if they are small or no limit is known.

    Updates that overlap with a forward on the same CPU are not judged either. They share cores and
    memory with the forward, which doctor would not find.
    """
    if job.world.device.type == "cpu" and job.optimizer.overlaps:
        return None
    nbytes = update_nbytes(specs_of(job.model), training_of_job(job))
    if nbytes < LEAST_NBYTES:
        return None
    limit = limit_gb_per_s(job)
    return None if limit is None else UpdateSpeed(nbytes, limit)


def limit_gb_per_s(job: Job) -> float | None:
    """Return this rank's share of the memory bandwidth of its node, None if it is not known.

    The bandwidth is what doctor measured with the threads of all ranks of the node. Without such a
    measurement it is measured here, briefly. It is not known if each rank is bound to its own
    cores: this process cannot run the threads of all ranks.
    """
    local = job.world.local_world_size
    of_rank = job.config.optimizer.num_threads or threads_per_rank(
        local, on_device=job.world.device.type == "cuda"
    )
    limit = _limit_gb_per_s(of_rank * local)
    return None if limit is None else limit / local


def _limit_gb_per_s(num_threads: int) -> float | None:
    """Return the memory bandwidth with that many threads, or the next fewer that were measured."""
    if num_threads > allowed_cores():
        return None
    known = bandwidth_cache.recall().memory
    fewer = [count for count in known if count <= num_threads]
    if fewer:
        return known[max(fewer)]
    try:
        return measure_bandwidth([num_threads], numel=_SHORT_NUMEL)[num_threads]
    except HostMemoryError as error:
        logger.debug("Skipping the measurement of the memory bandwidth: %s", error)
        return None
