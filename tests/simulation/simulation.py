"""Run a case on the simulated machine, and compare it with its run on the plain host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, cast

import torch
import torch.distributed as dist

from offload_adam.coordinator import agreement
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Lane, Schedule
from offload_adam.params.bucket import BucketState
from offload_adam.step.build import Backend
from tests.simulation.backend import (
    HostLanes,
    SimulatedCollectives,
    SimulatedStreams,
    simulated_workers,
)
from tests.simulation.case import Case
from tests.simulation.detector import Detector, Race
from tests.simulation.fsdp2 import Units
from tests.simulation.machine import ACTORS, Machine, Side
from tests.simulation.memory import GradientMemory, SimulatedSlots
from tests.simulation.outcome import Outcome, Read, state_of
from tests.simulation.training import make_core, reference_of, train
from tests.simulation.watched import (
    WatchedUpdate,
    name_tasks,
    watch_folds,
    watch_order,
    watch_packing,
    watch_staging,
)
from tests.support.cuda_runtime import StandInRuntime


class Mirrors(RankGroup):
    """One rank of a world whose other ranks do the same as this rank.

    The other ranks' sum of squares is the reference run's minus this rank's. All numbers have few
    bits, so the difference is exact.
    """

    def __init__(self, case: Case, reference: Outcome) -> None:
        ranks = tuple(range(case.world_size))
        super().__init__(case.rank, case.world_size, global_ranks=ranks)
        self._case = case
        self._skips = [skipped for skipped, _ in reference.reports]
        self.num_agreed = 0

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Add the parts of the mirrored ranks."""
        if operation == dist.ReduceOp.MAX:
            return
        if tensor.dtype != torch.float64:
            tensor *= self.world_size
            return
        rows = tensor[: self.world_size * agreement._NUM_FINDINGS].view(self.world_size, -1)
        own = rows[self.rank].clone()
        rows[:] = own
        if own[agreement._AHEAD]:
            return  # a second agreement with the same step's norm follows
        peers = [rank for rank in range(self.world_size) if rank != self.rank]
        rows[peers, agreement._NON_FINITE] = float(self._skips[self.num_agreed])
        rows[peers, agreement._SQUARES] = 0.0
        if peers and not self._skips[self.num_agreed]:
            whole = self._case.sum_of_squares(self.num_agreed)
            rows[peers[0], agreement._SQUARES] = whole - float(own[agreement._SQUARES])
        tensor[rows.numel() :] *= self.world_size
        self.num_agreed += 1

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return what every rank has."""
        return [tensor.clone() for _ in range(self.world_size)]

    def wait(self, work: Any, *, on_device: bool = False) -> None:
        """Run the machine until a collective is complete."""
        work.wait()

    def broadcast_data(self, tensor: torch.Tensor) -> None:
        """Do nothing: all ranks have the same tensor."""


class _RaceFoundError(Exception):
    """Ends a run early: a race has been found."""


class Simulation:
    """A case on the simulated machine, with simulated peers and a simulated model.

    Args:
        reference: outcome of the same case on the plain host.
        seed: of all random times.
    """

    def __init__(self, case: Case, reference: Outcome, seed: int) -> None:
        self.detector = Detector(ACTORS)
        self.machine = Machine(seed, self.detector)
        self.outcome = Outcome()
        self.wrong: list[str] = []
        self._case = case
        self._reference = reference
        self._num_steps = 0
        self._ends_at_race = False
        self._memory = GradientMemory(self.machine, on_device=case.on_device)
        self.parameters = case.weights()
        self._index = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self._ranks = Mirrors(case, reference)
        self._units = (
            None if case.sharding == "none" else Units(case, self.machine, self.launch_read)
        )
        backend = Backend(
            is_device=lambda _: case.on_device,
            make_runtime=StandInRuntime,
            make_streams=lambda _: (SimulatedStreams if case.on_device else HostLanes)(
                self.machine
            ),
            make_collectives=lambda _: SimulatedCollectives(self.machine, self),
            make_workers=lambda: simulated_workers(self.machine),
            num_reduce_slots=case.num_reduce_slots,
            num_staging_slots=case.num_staging_slots,
        )
        self.core = make_core(
            case,
            self._ranks,
            backend,
            self.parameters,
            overlaps=case.overlaps,
            offload_fraction=case.offload_fraction if case.on_device else 1.0,
            slots=SimulatedSlots(
                self.machine,
                on_device=case.on_device,
                two_streams=bool(case.side_layers) or case.sharding != "none",
            ),
            units=self._units,
        )
        if reference.updated_on_device is not None:
            states = {i: self.core.bucket_and_position(i)[0] for i in range(len(self.parameters))}
            on_device = {
                index for index, state in states.items() if not state.plan.location.is_host
            }
            self._reference = reference.with_device_state(on_device)
        if case.on_device:
            # On a device, `find_unseen` reads parameters by a D2H copy, which waits for COMPUTE.
            # Here it would read them before the simulated work on COMPUTE has run.
            self.core.external_edits.find_unseen = lambda changed: []  # type: ignore[method-assign]
        tasks = self.core.tasks
        tasks.updates = cast(Any, [WatchedUpdate(one, self.machine) for one in tasks.updates])
        watch_folds(self.core.transfer, self.machine)
        watch_packing(self.core.transfer)
        watch_staging(tasks, self.machine)
        name_tasks(self.core.stream_waits, self.machine)
        watch_order(self.core, self.wrong)

    def with_schedule(self, schedule: Schedule) -> None:
        """Use another schedule from now on."""
        devices = {state.layout.index: state.device for state in self.core.states}
        self.core.stream_waits.use_schedule(schedule, devices)

    def run(self) -> list[str]:
        """Train; return a description of each mistake found, races first."""
        self.outcome.reports = train(self._case, self.core, self.parameters, self, self._units)
        self.core.executor.close()
        self.machine.drain()
        self.outcome.state = state_of(self.core)
        found = [f"{first} and {second} are not ordered" for first, second in self.races]
        return [*found, *self.wrong, *self._differences()]

    def has_race(self) -> bool:
        """Train until the end of the first step with a race; return whether there was one."""
        self._ends_at_race = True
        with suppress(_RaceFoundError):
            self.run()
        return bool(self.races)

    @property
    def races(self) -> list[Race]:
        """The races that the vector clock has found."""
        return self.detector.races

    def _differences(self) -> list[str]:
        found = []
        for step, parameter, values in self.outcome.reads:
            if not torch.equal(values, self._reference.weights[step][parameter]):
                found.append(f"after {step} steps the model read parameter {parameter} wrong")
        for key, values in self.outcome.state.items():
            whole = self._reference.state[key._replace(start=0)]
            if not torch.equal(values, whole[key.start : key.start + values.numel()]):
                found.append(f"{key.plane} of parameter {key.parameter} differs at the end")
        if self.outcome.reports != self._reference.reports:
            found.append("the steps were not those of the reference")
        return found

    # The model's device.

    def read(self, buckets: Sequence[BucketState], what: str) -> None:
        """Read parameters; with a device, on COMPUTE at a later virtual time."""
        flats = [state.flat for state in buckets]
        if self._case.on_device:
            self.launch_read(buckets, flats, what)
        else:
            self.machine.touch(what, reads=flats)
            self._look(buckets, flats, self._num_steps)

    def launch_read(
        self, buckets: Sequence[BucketState], flats: Sequence[torch.Tensor], what: str
    ) -> None:
        """Read buckets, or copies of them, on the current stream at a later virtual time."""
        look = partial(self._look, buckets, flats, self._num_steps)
        self.machine.launch(self.machine.current_stream, look, what, reads=flats)

    def _look(
        self, buckets: Sequence[BucketState], flats: Sequence[torch.Tensor], step: int
    ) -> None:
        for state, flat in zip(buckets, flats, strict=True):
            for placed, parameter in zip(state.layout.placements, state.parameters, strict=True):
                values = flat[placed.start : placed.end].clone()
                self.outcome.reads.append(Read(step, self._index[id(parameter)], values))

    def gradient(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a tensor that holds the values, on a device once COMPUTE has written them."""
        gradient = self._memory.take(name, tuple(values.shape), values.dtype)
        target = gradient.detach()
        if self._case.on_device:
            stream = self.machine.current_stream
            self.machine.launch(stream, lambda: target.copy_(values), name, writes=[target])
        else:
            self.machine.touch(name, writes=[target])
            target.copy_(values)
        return gradient

    @contextmanager
    def both_streams(self) -> Iterator[None]:
        """Fork to the side stream, and join it to the main stream after the body."""
        if self._case.side_layers:
            self.machine.wait(Side.COMPUTE, self.machine.record(Lane.COMPUTE))
        yield
        self.machine.current_stream = Lane.COMPUTE
        if self._case.side_layers:
            self.machine.wait(Lane.COMPUTE, self.machine.record(Side.COMPUTE))

    def enter(self, layer: int) -> None:
        """Make the stream of this layer the current one."""
        is_side = layer in self._case.side_layers
        self.machine.current_stream = Side.COMPUTE if is_side else Lane.COMPUTE

    def write_state(self, buckets: Sequence[BucketState]) -> None:
        """Record that the host writes to state in host memory; the values stay the same."""
        for state in buckets:
            if state.plan.location.is_host:
                planes = state.planes.allocated(own_master=state.own_master)
                name = f"a load into bucket {state.layout.index}"
                self.machine.touch(name, writes=planes.values())

    def step_over(self) -> None:
        """Count the step."""
        self._num_steps += 1
        if self._ends_at_race and self.races:
            raise _RaceFoundError

    # The peers.

    def fill(self, flat: torch.Tensor) -> Callable[[], None]:
        """Return a function that simulates the all-gather of a bucket.

        It fills in the reference's values and checks that this rank's shard has the same ones.
        """
        state = next(state for state in self.core.states if state.flat is flat)
        low, high = state.layout.shard_bounds(state.rank)
        step = self._ranks.num_agreed
        task = self.machine.task

        def exchange() -> None:
            sent = flat[low:high].clone()
            for placed, parameter in zip(state.layout.placements, state.parameters, strict=True):
                values = self._reference.weights[step][self._index[id(parameter)]]
                flat[placed.start : placed.end] = values
            segments = [(s.shard_start, s.numel) for s in state.layout.segments(state.rank)]
            if not all(
                torch.equal(sent[a : a + n], flat[low + a : low + a + n]) for a, n in segments
            ):
                self.wrong.append(f"{task}: this rank sent other values than the reference's")
            flat[low:high] = sent

        return exchange


@cache
def clean_reference_of(case: Case, num_seeds: int) -> Outcome:
    """Return the reference of a case, after checking that its runs with these seeds are correct."""
    reference = reference_of(case)
    for seed in range(num_seeds):
        assert Simulation(case, reference, seed).run() == [], f"at seed {seed}"
    return reference
