"""How much of a step the optimizer leaves exposed, by the schedule that it would run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload_adam.layout.budget import (
    NUM_REDUCE_SLOTS,
    NUM_STAGING_SLOTS,
    traffic_nbytes,
    update_traffic_nbytes,
)
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.ring import RingSpeed
from offload_adam.layout.schedule import Operation, Task, plan_schedule
from offload_adam.layout.state_plan import StatePlan
from offload_adam.layout.timeline import Timeline, predict_timeline
from offload_adam.plan.inputs import Machine, Training, total_numel
from offload_adam.plan.timing import GB, compute_seconds, gather_s, mean_pass_s

FORWARD_SHARE = 1 / 3
"""Of forward and backward together: two of six operations for each parameter and token."""


def predict_overlap(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> Timeline | None:
    """Return one step's timeline, None where it is not overlapped or a speed is not known.

    Forward and backward are divided over the buckets by their elements. Copies in both directions,
    collectives and updates do not slow each other down here; what takes place on the device beside
    the model (packing, and the update of state that stays there) takes no time.
    """
    compute = compute_seconds(specs, training, machine)
    distributed = training.world_size > 1
    if compute is None or machine.host_gb_per_s is None or machine.bus_gb_per_s is None:
        return None
    # On a CPU the model shares the cores with the updates, and gradients that others average come
    # after backward: neither is in the schedule's times.
    predictable = training.on_device and training.reduces
    if not (training.overlaps and predictable) or (distributed and machine.network is None):
        return None
    plans = training.plan(specs)
    schedule = plan_schedule(
        plans, num_reduce_slots=NUM_REDUCE_SLOTS, num_staging_slots=NUM_STAGING_SLOTS
    )
    seconds_of = _durations(plans, training, machine, compute / total_numel(specs))
    return predict_timeline(schedule, seconds_of)


def _durations(
    plans: Sequence[StatePlan], training: Training, machine: Machine, compute_s: float
) -> Callable[[Task], float]:
    """Return how long each task takes.

    Args:
        compute_s: of forward and backward, for each element.
    """
    by_index = {plan.bucket.index: plan for plan in plans}
    host, bus = machine.host_gb_per_s, machine.bus_gb_per_s
    network = machine.network or RingSpeed.uniform(1.0)  # of one rank, which sends nothing
    assert host is not None
    assert bus is not None

    def seconds_of(task: Task) -> float:
        plan = by_index[task.bucket]
        bucket = plan.bucket
        numel = sum(placed.numel for placed in bucket.placements)
        update = update_traffic_nbytes(plan) * training.local_world_size
        both = traffic_nbytes(plan) * training.local_world_size
        match task.operation:
            case Operation.GRADIENT:
                return compute_s * (1 - FORWARD_SHARE) * numel
            case Operation.USE:
                return compute_s * FORWARD_SHARE * numel
            case Operation.REDUCE:
                return mean_pass_s(plan, training, network)
            case Operation.GATHER:
                return gather_s(bucket, training, network)
            case Operation.COPY_D2H:
                return bucket.shard_numel * plan.gradient.itemsize / GB / bus
            case Operation.COPY_H2D:
                return bucket.shard_numel * bucket.itemsize / GB / bus
            case Operation.SUM_SQUARES if plan.location.is_host:
                return (both - update) / GB / host
            case Operation.UPDATE if plan.location.is_host:
                return update / GB / host
            case _:
                return 0.0

    return seconds_of
