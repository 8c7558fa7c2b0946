"""How long a step is apart from the model's own forward and backward, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload_adam.layout.flat import ParameterSpec
from offload_adam.plan.inputs import Machine, Training, total_numel

GB = 1e9


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds that a step spends on each resource, were it used alone.

    rough: a bandwidth was given rather than measured where the run will be.
    """

    seconds: Mapping[str, float]
    rough: bool

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total_s(self) -> float:
        """The time without any overlap, as the sequential executor takes it."""
        return sum(self.seconds.values())


def predict_time(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> StepTime | None:
    """Return the optimizer's part of a step, None where no bandwidth is known.

    update: the state is read and written once, the gradient is read twice (norm and update); the
    ranks of a node share its memory. bus: gradients down, parameters up. network: the average and
    the gather each send (N - 1) / N of the model over a ring, twice for an all-reduce.
    """
    numel = total_numel(specs)
    itemsize = max(spec.itemsize for spec in specs)
    share = numel if training.beside else numel / training.world_size
    seconds: dict[str, float] = {}
    if machine.host_gb_per_s is not None:
        on_node = share * training.local_world_size
        seconds["update"] = (
            on_node * _update_nbytes(itemsize, training) / GB / machine.host_gb_per_s
        )
    if machine.bus_gb_per_s is not None and training.on_device and not training.beside:
        seconds["bus"] = 2 * share * itemsize / GB / machine.bus_gb_per_s
    if machine.network_gb_per_s is not None and training.world_size > 1:
        around = (training.world_size - 1) / training.world_size
        reduced = FLOAT32 if training.reduce_fp32 else itemsize
        sent = numel * around * ((reduced if training.reduces else 0) + itemsize)
        seconds["network"] = sent / GB / machine.network_gb_per_s
    return StepTime(seconds, rough=not machine.measured) if seconds else None


FLOAT32 = 4


def _update_nbytes(itemsize: int, training: Training) -> float:
    """Return the bytes of memory traffic of one element's norm and update."""
    planes = 3 + training.amsgrad
    gradient = 2 * itemsize
    rounded = 0 if itemsize == FLOAT32 else itemsize
    return planes * 2 * FLOAT32 + gradient + rounded
