"""The speeds of this machine, for plans and for the warning that the updates of a run are slow."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import median

import torch

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

# Traffic in bytes below which an update is not judged. It takes less than about 3 ms, which caches
# and fixed costs dominate.
LEAST_NBYTES = 128 * 1024 * 1024
NUM_WARMUP = 2  # updates that are left out, since the first ones touch memory for the first time
NUM_STEPS = 10  # updates that are judged, by their median: a few slow ones do not count
# Share of the memory's bandwidth below which an update counts as slow. A good one reaches 0.9. The
# margin is for machines whose bandwidth is lower now than when doctor measured it.
LEAST_SHARE = 0.5
# Share of that bandwidth above which it was measured too low. Measurements differ by less.
MOST_SHARE = 1.1
# Elements of each of the four arrays if doctor has measured nothing: 128 MB in all, about 50 ms.
_SHORT_NUMEL = 8_000_000


def gpu_nbytes() -> int | None:
    """Return the memory of this machine's first GPU, None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def known_speeds(training: Training) -> Machine:
    """Return the speeds that `offload-adam doctor` has measured on this machine.

    The network's speed is used only if it was measured with the same ranks and kind of device.
    """
    known = bandwidth_cache.recall()
    device = "cuda" if training.on_device else "cpu"
    ranks = bandwidth_cache.ranks_like(training.world_size, training.local_world_size, device)
    return Machine(
        host_gb_per_s=known.step_in(training.state_format),
        bus_gb_per_s=known.bus,
        network=known.network.get(ranks),
        sources=dict.fromkeys(("update", "bus", "network"), Source.KEPT),
    )


def measured_speeds(training: Training) -> Machine:
    """Measure a step and, on a GPU, the bus; take the network's speed from `known_speeds`.

    Raises:
        HostMemoryError: a measurement does not fit into memory.
    """
    known = known_speeds(training)
    return replace(
        known,
        host_gb_per_s=measure_step(
            threads_per_node(training.local_world_size, on_device=training.on_device),
            state_format=training.state_format,
        ),
        bus_gb_per_s=min(bus_gb_per_s(0)) if training.on_device else None,
        sources={**known.sources, "update": Source.MEASURED, "bus": Source.MEASURED},
    )


class UpdateSpeed:
    """Warns once if the updates of this rank are slow, or faster than the memory's bandwidth.

    They are slow below half of the bandwidth.

    Args:
        nbytes: traffic of one update of all parameters on this rank. An update without some of the
            parameters moves less, and therefore seems faster than it is.
        limit_gb_per_s: this rank's share of the memory's bandwidth.
    """

    def __init__(self, nbytes: int, limit_gb_per_s: float) -> None:
        self._nbytes = nbytes
        self._limit_gb_per_s = limit_gb_per_s
        self._updates_ms: list[float] = []

    def add(self, record: StepRecord) -> None:
        """Add the update time of one step; after `NUM_WARMUP + NUM_STEPS` updates, judge them."""
        # An overlapped update is timed in the record of the next step, even if that is skipped. So
        # records of skipped steps count if they have a time.
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
        elif achieved > MOST_SHARE * self._limit_gb_per_s:
            logger.warning("%s", faster_than_measured(achieved, self._limit_gb_per_s))


def faster_than_measured(achieved_gb_per_s: float, limit_gb_per_s: float) -> str:
    """Return what it means if updates are faster than this rank's share of the bandwidth."""
    return (
        f"The update moves {achieved_gb_per_s:.1f} GB/s on this rank, more than the "
        f"{limit_gb_per_s:.1f} GB/s that were measured as its share of this machine's memory "
        "bandwidth. The machine was busy during that measurement, or the state fits into the "
        "caches. Run offload-adam doctor again on an idle machine."
    )


def update_speed(job: Job) -> UpdateSpeed | None:
    """Return the check of this rank's update speed, None if it would not be meaningful.

    That is so for small updates, or if the memory's bandwidth is not known. Updates that overlap
    with a forward on the CPU are not judged either: they share cores and memory with the forward.
    """
    if job.world.device.type == "cpu" and job.optimizer.overlaps:
        return None
    nbytes = update_nbytes(specs_of(job.model), training_of_job(job))
    if nbytes < LEAST_NBYTES:
        return None
    limit = limit_gb_per_s(job)
    return None if limit is None else UpdateSpeed(nbytes, limit)


def limit_gb_per_s(job: Job) -> float | None:
    """Return this rank's share of its node's memory bandwidth in 1e9 bytes a second.

    The bandwidth is what doctor measured with the threads of all ranks of the node. Without such a
    measurement, or if the machine was busy then, it is measured here in about 50 ms. None if this
    process cannot run that many threads, because each rank is bound to its own cores, or if the
    arrays do not fit into memory.
    """
    local = job.world.local_world_size
    of_rank = job.config.optimizer.num_threads or threads_per_rank(
        local, on_device=job.world.device.type == "cuda"
    )
    limit = _limit_gb_per_s(of_rank * local)
    return None if limit is None else limit / local


def _limit_gb_per_s(num_threads: int) -> float | None:
    """Return the memory bandwidth with `num_threads`, or with the next fewer that were measured."""
    if num_threads > allowed_cores():
        return None
    known = bandwidth_cache.recall()
    fewer = [count for count in known.memory if count <= num_threads]
    saved = known.memory[max(fewer)] if fewer else 0.0
    if saved and not known.busy:
        return saved
    try:
        measured = measure_bandwidth([num_threads], numel=_SHORT_NUMEL)[num_threads]
    except HostMemoryError as error:
        logger.debug("Skipping the measurement of the memory bandwidth: %s", error)
        return None
    # A busy machine is slower than it could be, but hardly by half: then the machine has changed.
    return measured if measured < LEAST_SHARE * saved else max(saved, measured)
