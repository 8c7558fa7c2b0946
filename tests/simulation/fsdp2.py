"""FSDP2 on the simulated machine: the groups' calls and waits, in the order of FSDP2's own.

    stream       work
    COPY_IN      copies a unit's parameters from their buckets
    ALL_GATHER   waits for the copy-in, and gathers the parameters
    COMPUTE      waits for the all-gather, copies its output, and computes
    SCATTER      waits for the backward of a unit, writes its gradients, and is current in hooks

FSDP2's own code chooses the streams of a gather. The waits before it are those of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.fsdp_private import FsdpGroup
from offload_adam.layout.schedule import Lane
from offload_adam.params.bucket import BucketState
from offload_adam.params.local_shard import LocalShard, ShardedModel
from offload_adam.step.step import ShardedAdam
from tests.simulation.case import Case
from tests.simulation.machine import Machine, Side, SimulatedEvent, Stream

Read = Callable[[Sequence[BucketState], Sequence[torch.Tensor], str], None]


class Unit:
    """One layer, in the place of an `FSDPParamGroup`, with the same attributes.

    buckets: those of the layer's parameters.
    gathered: a copy of each bucket, which COMPUTE reads; empty while the unit is sharded.
    """

    def __init__(self, number: int, units: Units, *, is_alone: bool) -> None:
        self.buckets: list[BucketState] = []
        self.fsdp_params: list[Any] = []
        self.device = torch.device("cuda")
        self.device_handle = units
        self.comm_ctx = units.context
        self.mesh_info = SimpleNamespace(shard_mesh_size=1 if is_alone else 2)
        self.gathered: list[torch.Tensor] = []
        self._training_state = TrainingState.IDLE
        self._all_gather_result: SimulatedEvent | None = None
        self._output: list[torch.Tensor] = []
        self._number = number
        self._units = units
        self._is_alone = is_alone

    @property
    def is_unsharded(self) -> bool:
        """Whether COMPUTE may read what was gathered."""
        return bool(self.gathered)

    @property
    def is_sharded(self) -> bool:
        """Whether the unit is not gathered."""
        return not self.is_unsharded

    @contextmanager
    def state(self, state: TrainingState) -> Iterator[None]:
        """Be in a state of FSDP2 in the body."""
        before, self._training_state = self._training_state, state
        yield
        self._training_state = before

    def unshard(self, async_op: bool = False) -> None:
        """Start to gather the parameters."""
        machine = self._units.machine
        if self.is_unsharded or self._all_gather_result is not None:
            return
        if self._is_alone:
            self._all_gather_result = machine.record(machine.current_stream)
            return
        streams: Any = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)
        copy_in, all_gather = streams
        self._output = self._copy_buckets(copy_in)
        machine.wait(all_gather, machine.record(copy_in))
        self._all_gather_result = machine.record(all_gather)

    def wait_for_unshard(self) -> None:
        """Make the current stream wait for the gather; one rank alone copies its parameters."""
        machine = self._units.machine
        if self._all_gather_result is None:
            return
        in_forward = self._training_state is TrainingState.FORWARD
        if in_forward:
            self._units.free_gathered()
        machine.wait(machine.current_stream, self._all_gather_result)
        current = machine.current_stream
        self.gathered = (
            self._copy_buckets(current) if self._is_alone else self._copy(self._output, current)
        )
        self._all_gather_result = None
        self._units.copied_out = machine.record(machine.current_stream)
        # In the forward the next unit does this, so that its copy-in overlaps with this copy-out.
        if not in_forward or self._is_alone:
            self._units.free_gathered()

    def reshard(self) -> None:
        """Free what was gathered."""
        self.gathered = []

    def drop_unused(self) -> None:
        """Make the current stream wait for a gather that nothing has used."""
        machine = self._units.machine
        if self._all_gather_result is not None:
            machine.wait(machine.current_stream, self._all_gather_result)
            self._all_gather_result = None

    def compute(self, what: str) -> None:
        """Read the parameters that were gathered."""
        name = f"{what} of layer {self._number}"
        self._units.read(self.buckets, self.gathered, name)

    def _copy_buckets(self, stream: Stream) -> list[torch.Tensor]:
        """Copy the unit's buckets on a stream; return the copies."""
        flats = [state.flat for state in self.buckets]
        if not self._units.on_device:
            # The driver has read pageable memory when the launch of a copy returns.
            self._units.machine.touch(f"copy-in of unit {self._number}", reads=flats)
            flats = [flat.clone() for flat in flats]
            self._units.memory += flats
        return self._copy(flats, stream)

    def _copy(self, sources: Sequence[torch.Tensor], stream: Stream) -> list[torch.Tensor]:
        """Copy tensors on a stream; return the copies."""
        targets = [torch.full_like(source, torch.nan) for source in sources]
        self._units.memory += targets

        def copy() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

        name = f"copy of unit {self._number}"
        self._units.machine.launch(stream, copy, name, reads=sources, writes=targets)
        return targets


class Units:
    """The units of a model, and the device handle of FSDP2.

    on_device: the parameters are, else `CPUOffloadPolicy` keeps them in host memory.
    read: reads copies of buckets on the current stream.
    memory: all that was gathered: the detector does not know when an address is reused.
    copied_out: event of the last gather whose output is not free yet.
    """

    def __init__(self, case: Case, machine: Machine, read: Read) -> None:
        self.machine = machine
        self.on_device = case.on_device
        self.read = read
        self.context: Any = FSDPCommContext()
        self.context.device_handle = self
        self.context.all_gather_copy_in_stream = Side.COPY_IN
        self.context.all_gather_stream = Side.ALL_GATHER
        self.copied_out: SimulatedEvent | None = None
        self.memory: list[torch.Tensor] = []
        self._case = case
        self._scattered: SimulatedEvent | None = None
        self._units = [
            Unit(number, self, is_alone=case.world_size == 1) for number in range(len(case.layers))
        ]
        self.model = ShardedModel(RankGroup())
        self.model.units = [FsdpGroup(unit, unit) for unit in self._units]

    def shard_of(self, parameter: int, ranks: RankGroup) -> LocalShard:
        """Return how a parameter is sharded."""
        layer = next(k for k in range(len(self._units)) if parameter in self._case.members(k))
        divides = self._case.sharding == "HSDP"
        return LocalShard(
            record=None,
            unit=layer,
            replicas=ranks.global_ranks if divides else (ranks.global_ranks[ranks.rank],),
            counted=True,
            is_distinct=False,
            key=f"unit {layer}",
            padded_numel=self._case.parameters[parameter][0],
        )

    def attach(self, core: ShardedAdam) -> None:
        """Let the units wait for the updates of an optimizer."""
        for state in core.states:
            assert state.local_shard is not None
            self._units[state.local_shard.unit].buckets.append(state)
        core.hook_unshard()

    # The device handle of FSDP2.

    def current_stream(self) -> Stream:
        """Return the current stream."""
        return self.machine.current_stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self.machine.current_stream = self.machine.current_stream, stream
        yield
        self.machine.current_stream = before

    def free_gathered(self) -> None:
        """Let later gathers reuse the memory of the last one."""
        if self.copied_out is not None:
            self.machine.wait(Side.COPY_IN, self.copied_out)
            self.machine.wait(Side.ALL_GATHER, self.copied_out)
            self.copied_out = None

    # The passes.

    def forward(self, layers: Sequence[int]) -> None:
        """Run layers. Each one gathers the next unit too, even if that is not used."""
        machine = self.machine
        for stream in (Side.COPY_IN, Side.ALL_GATHER):
            machine.wait(stream, machine.record(Lane.COMPUTE))
        if machine.random.random() < 0.3:  # the user gathers a unit early
            self._units[machine.random.choice(layers)].unshard(async_op=True)
        for layer in layers:
            unit = self._units[layer]
            with unit.state(TrainingState.FORWARD):
                unit.unshard()
                unit.wait_for_unshard()
                self._prefetch(layer + 1, TrainingState.FORWARD)
                unit.compute("forward")
                if self._case.reshards:
                    unit.reshard()
        self.free_gathered()

    @contextmanager
    def backward_of(self, layer: int) -> Iterator[None]:
        """Gather a unit and run its backward. In the body, its gradients are written."""
        machine, unit = self.machine, self._units[layer]
        with unit.state(TrainingState.PRE_BACKWARD):
            unit.unshard()
            unit.wait_for_unshard()
            self._prefetch(layer - 1, TrainingState.PRE_BACKWARD)
        unit.compute("backward")
        unit.reshard()
        machine.wait(Side.SCATTER, machine.record(Lane.COMPUTE))
        with self.stream(Side.SCATTER):
            yield
        self._scattered = machine.record(Side.SCATTER)

    def finalize_backward(self) -> None:
        """Wait for all gradients, after the last backward of a step."""
        if self._scattered is not None:
            self.machine.wait(Lane.COMPUTE, self._scattered)
        for unit in self._units:
            unit.drop_unused()

    def _prefetch(self, layer: int, state: TrainingState) -> None:
        if 0 <= layer < len(self._units):
            with self._units[layer].state(state):
                self._units[layer].unshard()
