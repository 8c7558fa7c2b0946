"""Plans of equal buckets."""

from __future__ import annotations

from dataclasses import replace

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import StateLocation, StatePlan, StatePolicy, plan_state


def equal_plans(num_buckets: int, *, numel: int = 100, world_size: int = 1) -> list[StatePlan]:
    """Return plans of buckets in host memory with one 16-bit parameter each, averaged."""
    specs = [ParameterSpec(index, numel, 2, "f") for index in range(num_buckets)]
    plans = plan_state(specs, StatePolicy(world_size=world_size, bucket_nbytes=1))
    assert len(plans) == num_buckets
    return list(plans)


def offloaded(plan: StatePlan) -> StatePlan:
    """Return the plan for parameters on a device whose state is in host memory."""
    gradient = replace(plan.gradient, shard_itemsize=plan.gradient.itemsize)
    return replace(plan, location=StateLocation.OFFLOADED, gradient=gradient, pinned=True)
