"""What has been measured of this machine, for plans of what is to train on it."""

from __future__ import annotations

from dataclasses import replace

from offload_adam.doctor import bandwidth_cache
from offload_adam.doctor.bandwidth import bus_gb_per_s, measure_step
from offload_adam.kernels.threads import threads_per_node
from offload_adam.plan.inputs import Machine, Source, Training


def known_speeds(training: Training) -> Machine:
    """Return what doctor has kept: of a step, the bus, and the network of exactly these ranks."""
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
    """Measure a step and, for parameters on a GPU, the bus; the network is as doctor has kept it.

    Raises:
        HostMemoryError: a measurement does not fit.
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
