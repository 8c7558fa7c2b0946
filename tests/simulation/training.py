"""Run a case on the plain host, one task after the other, or on the simulated machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from offload_adam.coordinator import agreement
from offload_adam.coordinator.membership import Membership
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.layout.schedule import Lane, Schedule
from offload_adam.parameters.selection import NewParameter
from offload_adam.step.backend import Backend
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.construction import Placing
from offload_adam.step.reduction import GradientReduction
from offload_adam.step.sharded_adam import ShardedAdam, StepInputs
from tests.cuda_runtime import StandInRuntime
from tests.simulation.backend import (
    HostLanes,
    SimulatedCollectives,
    SimulatedStreams,
    SimulatedWorker,
)
from tests.simulation.case import Case
from tests.simulation.detector import Detector, Race
from tests.simulation.machine import ACTORS, Machine
from tests.simulation.memory import GradientMemory, SimulatedSlots
from tests.simulation.watched import WatchedLanding, WatchedUpdates, name_tasks

HYPER = Hyperparameters(
    lr=1e-2,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.1,
    decoupled_weight_decay=True,
    nesterov=False,
    maximize=False,
)


class Read(NamedTuple):
    """What the model found in a parameter after so many steps."""

    step: int
    parameter: int
    values: torch.Tensor


class StateKey(NamedTuple):
    """A stretch of one parameter's plane, from its element `start` on."""

    parameter: int
    plane: str
    start: int


@dataclass
class Outcome:
    """What a run came to.

    weights: for each number of steps taken, every parameter's values (of the reference only).
    reads: what the model read, of a simulated run only.
    state: at the end, of this rank's shard.
    reports: whether each step was skipped, and its clip factor.
    kept: the same with all state updated by the device's own operations, which round otherwise.
    """

    weights: list[list[torch.Tensor]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    state: dict[StateKey, torch.Tensor] = field(default_factory=dict)
    reports: list[tuple[bool, float]] = field(default_factory=list)
    kept: Outcome | None = None

    def with_kept(self, parameters: Collection[int]) -> Outcome:
        """Return the outcome where the state of these parameters is kept on the device."""
        assert self.kept is not None
        weights = [
            [others[i] if i in parameters else own[i] for i in range(len(own))]
            for own, others in zip(self.weights, self.kept.weights, strict=True)
        ]
        state = {
            key: (self.kept if key.parameter in parameters else self).state[key]
            for key in self.state
        }
        return replace(self, weights=weights, state=state)


class Device(Protocol):
    """Where the model itself runs."""

    def read(self, buckets: Sequence[BucketState], what: str) -> None:
        """Read parameters."""
        ...

    def gradient(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a gradient that has, or will have, these values."""
        ...

    def step_over(self) -> None:
        """Hear that a step has been taken."""
        ...


def train(case: Case, core: ShardedAdam, parameters: list[torch.nn.Parameter], on: Device) -> Any:
    """Run all steps of a case; return their reports."""
    reports = []
    for number, step in enumerate(case.steps):
        for _ in range(2 if step.drops else 1):
            core.reduction.reset()
            for round_, layers in enumerate(step.rounds):
                _forward(case, core, on, layers)
                _backward(case, core, parameters, on, layers, (number, round_))
        if step.evaluates:
            _forward(case, core, on, step.rounds[0])
        with torch.no_grad():
            report = core.step(StepInputs([HYPER], max_norm=case.max_norm))
        reports.append((report.skipped, report.clip_factor))
        on.step_over()
    core.synchronize()
    on.read(core.states, "the end")
    return reports


def _buckets(core: ShardedAdam, parameters: Sequence[int]) -> list[BucketState]:
    return list({id(s): s for s in (core.place_of(index)[0] for index in parameters)}.values())


def _forward(case: Case, core: ShardedAdam, on: Device, layers: Sequence[int]) -> None:
    for layer in layers:
        used = _buckets(core, case.members(layer))
        core.executor.need([state.layout.index for state in used])
        on.read(used, f"forward of layer {layer}")


def _backward(
    case: Case,
    core: ShardedAdam,
    parameters: list[torch.nn.Parameter],
    on: Device,
    layers: Sequence[int],
    place: tuple[int, int],
) -> None:
    for layer in reversed(layers):
        for index in reversed(case.members(layer)):
            values = case.gradient(*place, index)
            gradient = on.gradient(f"the gradient of parameter {index}", values)
            parameters[index].grad = gradient
            del gradient
            core.reduction.gradients_ready([parameters[index]])
        on.read(_buckets(core, case.members(layer)), f"backward of layer {layer}")
    core.reduction.backward_ended()


class _Host:
    """The plain host: what is asked for is done."""

    def __init__(self, parameters: list[torch.nn.Parameter], outcome: Outcome) -> None:
        self._parameters = parameters
        self._outcome = outcome
        self.step_over()

    def read(self, buckets: Sequence[BucketState], what: str) -> None:
        pass

    def gradient(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values

    def step_over(self) -> None:
        self._outcome.weights.append([p.detach().clone() for p in self._parameters])


class Mirrors(Membership):
    """One rank of a world whose other ranks do what this one does.

    What they find in their own shards is what the reference run found in the whole, less this
    rank's part: sums of squares of few-bit numbers are exact.
    """

    def __init__(self, case: Case, reference: Outcome) -> None:
        ranks = tuple(range(case.world_size))
        super().__init__(case.rank, case.world_size, global_ranks=ranks)
        self._case = case
        self._skips = [skipped for skipped, _ in reference.reports]
        self.num_agreed = 0

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Put the mirrored ranks' parts in."""
        if operation == dist.ReduceOp.MAX:
            return
        if tensor.dtype != torch.float64:
            tensor *= self.world_size
            return
        rows = tensor[: self.world_size * agreement._NUM_FINDINGS].view(self.world_size, -1)
        own = rows[self.rank].clone()
        rows[:] = own
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

    def wait(self, work: Any) -> None:
        """Let the clock run until a collective is over."""
        work.wait()

    def broadcast_data(self, tensor: torch.Tensor) -> None:
        """Leave it: all ranks have the same."""


class Simulation:
    """A case on the simulated machine, beside peers and a model that are simulated, too.

    Args:
        reference: what the same case came to on the plain host.
        seed: of all times.
    """

    def __init__(self, case: Case, reference: Outcome, seed: int) -> None:
        self.detector = Detector(ACTORS)
        self.machine = Machine(seed, self.detector)
        self.outcome = Outcome()
        self.wrong: list[str] = []
        self._case = case
        self._reference = reference
        self._num_steps = 0
        self._memory = GradientMemory(self.machine, on_device=case.on_device)
        self.parameters = case.weights()
        self._index = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self._membership = Mirrors(case, reference)
        backend = Backend(
            make_streams=lambda _: (SimulatedStreams if case.on_device else HostLanes)(
                self.machine
            ),
            make_collectives=lambda _: SimulatedCollectives(self.machine, self),
            make_worker=lambda: SimulatedWorker(self.machine),
            num_reduce_slots=case.num_reduce_slots,
            num_staging_slots=case.num_staging_slots,
        )
        reduction = _make_reduction(case, self._membership)
        reduction.slots = SimulatedSlots(self.machine, on_device=case.on_device)
        self.core = _make_core(
            case,
            self._membership,
            reduction,
            backend,
            self.parameters,
            simulated=True,
            offload_fraction=case.offload_fraction if case.on_device else 1.0,
        )
        if reference.kept is not None:
            states = {i: self.core.place_of(i)[0] for i in range(len(self.parameters))}
            kept = {index for index, state in states.items() if not state.hosted}
            self._reference = reference.with_kept(kept)
        tasks = self.core.executor.tasks
        tasks.updates = WatchedUpdates(tasks.updates, self.machine)
        tasks.landing = WatchedLanding(tasks.landing, self.machine)
        name_tasks(tasks.crossing, self.machine)

    def with_schedule(self, schedule: Schedule) -> None:
        """Go on with another schedule."""
        tasks = self.core.executor.tasks
        self.core.executor.extend([], tasks.routes, schedule)
        name_tasks(tasks.crossing, self.machine)

    def run(self) -> list[str]:
        """Train; return what was found wrong, races first."""
        self.outcome.reports = train(self._case, self.core, self.parameters, self)
        self.core.executor.close()
        self.machine.drain()
        self.outcome.state = state_of(self.core)
        found = [f"{first} and {second} are not ordered" for first, second in self.races]
        return [*found, *self.wrong, *self._differences()]

    @property
    def races(self) -> list[Race]:
        """What the vector clock has reported."""
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
        """Read parameters; on COMPUTE, late, where there is a device."""
        step = self._num_steps

        def look() -> None:
            for state in buckets:
                for parameter in state.parameters:
                    index = self._index[id(parameter)]
                    self.outcome.reads.append(Read(step, index, parameter.detach().clone()))

        flats = [state.flat for state in buckets]
        if self._case.on_device:
            self.machine.launch(Lane.COMPUTE, look, what, reads=flats)
        else:
            self.machine.touch(what, reads=flats)
            look()

    def gradient(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return memory in which the values are, or will be once COMPUTE gets there."""
        gradient = self._memory.take(name, tuple(values.shape), values.dtype)
        target = gradient.detach()
        if self._case.on_device:
            self.machine.launch(Lane.COMPUTE, lambda: target.copy_(values), name, writes=[target])
        else:
            self.machine.touch(name, writes=[target])
            target.copy_(values)
        return gradient

    def step_over(self) -> None:
        """Count the step."""
        self._num_steps += 1

    # The peers.

    def fill(self, flat: torch.Tensor) -> Callable[[], None]:
        """Bring what the reference has; look whether this rank's own shard is it, too."""
        state = next(state for state in self.core.states if state.flat is flat)
        low, high = state.layout.shard_bounds(state.rank)
        step = self._membership.num_agreed
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
                self.wrong.append(f"{task}: the peers were sent something else")
            flat[low:high] = sent

        return exchange


def reference_of(case: Case) -> Outcome:
    """Run a case in a world of one on the plain host, by the sequential executor."""
    outcome = _plain(case, offload_fraction=1.0)
    if case.on_device and case.offload_fraction < 1.0:
        outcome.kept = _plain(case, offload_fraction=0.0)
    return outcome


def _plain(case: Case, *, offload_fraction: float) -> Outcome:
    outcome = Outcome()
    parameters = case.weights()
    membership = Membership()
    reduction = _make_reduction(case, membership)
    core = _make_core(
        case,
        membership,
        reduction,
        Backend(),
        parameters,
        simulated=False,
        offload_fraction=offload_fraction,
    )
    outcome.reports = train(case, core, parameters, _Host(parameters, outcome))
    outcome.state = state_of(core)
    core.executor.close()
    return outcome


def state_of(core: ShardedAdam) -> dict[StateKey, torch.Tensor]:
    """Return copies of all state: for each segment its planes, and for each parameter its count."""
    found: dict[StateKey, torch.Tensor] = {}
    for state in core.states:
        planes = {**state.planes.named(own_master=False), "step": state.step_counts}
        for segment in state.layout.segments(state.rank):
            index = int(state.indices[segment.position])
            for name, plane in planes.items():
                place, numel = segment.shard_start, segment.numel
                if name == "step":
                    place, numel = segment.position, 1
                key = StateKey(index, name, 0 if name == "step" else segment.parameter_start)
                found[key] = plane[place : place + numel].clone()
    return found


def _make_reduction(case: Case, membership: Membership) -> GradientReduction:
    return GradientReduction(
        membership,
        reduces=True,
        streams=True,
        accumulates=case.accumulates,
        reduce_dtype=torch.float32 if case.reduces_in_fp32 else None,
    )


def _make_core(
    case: Case,
    membership: Membership,
    reduction: GradientReduction,
    backend: Backend,
    parameters: list[torch.nn.Parameter],
    *,
    simulated: bool,
    offload_fraction: float,
) -> ShardedAdam:
    on_device = simulated and case.on_device
    placing = Placing(
        case.bucket_nbytes,
        reduction.landed_dtype,
        pin=case.pin,
        runtime=StandInRuntime() if on_device else None,
        offload_fraction=offload_fraction,
        force_offload=on_device or offload_fraction < 1.0,
    )
    core = ShardedAdam(
        membership,
        reduction,
        placing,
        num_threads=1,
        module=None,
        external=False,
        overlaps=simulated and case.overlaps,
        backend=backend,
    )
    new = [
        NewParameter(i, f"p{i}", parameter, group=0, amsgrad=False)
        for i, parameter in enumerate(parameters)
    ]
    with torch.no_grad():
        core.extend(new)
    return core
