"""Whether the updates of a run get what this machine's memory gives; said once where not."""

from __future__ import annotations

import logging
from statistics import median

from offload_adam.doctor import bandwidth_cache
from offload_adam.doctor.bandwidth import measure_bandwidth
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores, threads_per_rank
from offload_adam.plan.timing import update_nbytes
from offload_adam.train.loop import Job
from offload_adam.train.plan import specs_of, training_of_job
from offload_adam.train.records import StepRecord

logger = logging.getLogger(__name__)

LEAST_NBYTES = 128 * 1024 * 1024
"""Traffic of an update, 3 ms or more: of a smaller one, fixed costs and caches are measured."""
NUM_WARMUP = 2
NUM_STEPS = 10
LEAST_SHARE = 0.5
_SHORT_NUMEL = 8_000_000
"""Elements of a stream where doctor has measured nothing: 128 MB in all, for some 50 ms."""


class UpdateSpeed:
    """Warns once when the median update moves less than half of what it could.

    An update's time stands in its own step's record or, where updates overlap, in the next one's,
    which may be a skipped step's. So what counts is that there is a time.

    nbytes: traffic of one update of this rank; one that leaves parameters out has less, and seems
        faster.
    limit_gb_per_s: this rank's share of the memory's bandwidth.
    """

    def __init__(self, nbytes: int, limit_gb_per_s: float) -> None:
        self._nbytes = nbytes
        self._limit_gb_per_s = limit_gb_per_s
        self._num_seen = 0
        self._updates_ms: list[float] = []

    def take(self, record: StepRecord) -> None:
        """Count one step in; the last that counts may bring the warning."""
        update_ms = record.timings_ms.get("optimizer.update", 0.0)
        if update_ms <= 0.0 or len(self._updates_ms) == NUM_STEPS:
            return
        self._num_seen += 1
        if self._num_seen <= NUM_WARMUP:
            return
        self._updates_ms.append(update_ms)
        if len(self._updates_ms) == NUM_STEPS:
            self._judge()

    def _judge(self) -> None:
        achieved = self._nbytes / median(self._updates_ms) / 1e6
        if achieved < LEAST_SHARE * self._limit_gb_per_s:
            logger.warning(
                "the update moves %.1f GB/s on this rank, less than half of the %.1f GB/s that is "
                "its share of this machine's memory: `offload-adam doctor` says what may be wrong",
                achieved,
                self._limit_gb_per_s,
            )


def update_speed(job: Job) -> UpdateSpeed | None:
    """Return what judges this rank's updates, None where they are small, or nothing is known.

    Nor are those judged that share cores and memory with a forward on the same CPU: they are slow
    for a reason that doctor does not know.
    """
    if job.world.device.type == "cpu" and job.optimizer.overlaps:
        return None
    nbytes = update_nbytes(specs_of(job.model), training_of_job(job))
    if nbytes < LEAST_NBYTES:
        return None
    limit = limit_gb_per_s(job)
    return None if limit is None else UpdateSpeed(nbytes, limit)


def limit_gb_per_s(job: Job) -> float | None:
    """Return this rank's share of what the memory gives to the node's ranks, None if not known.

    It is what doctor has kept for all threads of the node's ranks; else it is measured here,
    briefly. Ranks that are bound to cores of their own have no limit unless doctor ran in the same
    binding: alone they see more of the memory than is theirs.
    """
    local = job.world.local_world_size
    of_rank = job.config.optimizer.num_threads or threads_per_rank(
        local, on_device=job.world.device.type == "cuda"
    )
    limit = _limit_gb_per_s(of_rank * local)
    return None if limit is None else limit / local


def _limit_gb_per_s(num_threads: int) -> float | None:
    """Return the bandwidth of the memory with that many threads or, as kept, the next fewer."""
    if num_threads > allowed_cores():
        return None
    known = bandwidth_cache.recall().memory
    fewer = [count for count in known if count <= num_threads]
    if fewer:
        return known[max(fewer)]
    try:
        return measure_bandwidth([num_threads], numel=_SHORT_NUMEL)[num_threads]
    except HostMemoryError as error:
        logger.debug("the memory's bandwidth is not measured: %s", error)
        return None
