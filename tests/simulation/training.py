"""Run a case, by the same code on the simulated machine and on the sequential host."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.stand_in import StreamedGradients
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.layout.state_plan import StatePolicy
from offload_adam.params.bucket import BucketState
from offload_adam.params.selection import NewParameter
from offload_adam.step.build import Backend, Storage
from offload_adam.step.messages import StepInputs
from offload_adam.step.step import ShardedAdam
from offload_adam.transfer.slots import SlotPool
from tests.simulation.case import Case
from tests.simulation.fsdp2 import Units
from tests.simulation.outcome import Outcome, state_of
from tests.support.devices import HOST_AS_DEVICE

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


class Device(Protocol):
    """The device of the model: it performs, or records, what the model does."""

    def read(self, buckets: Sequence[BucketState], what: str) -> None:
        """Read parameters."""
        ...

    def gradient(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a gradient with these values; work that is still queued may write them."""
        ...

    def both_streams(self) -> AbstractContextManager[None]:
        """Run a forward or a backward in the body; parts of it may be on a second stream."""
        ...

    def enter(self, layer: int) -> None:
        """Called before each layer."""
        ...

    def write_state(self, buckets: Sequence[BucketState]) -> None:
        """Called when the host may write to state, as a load does."""
        ...

    def step_over(self) -> None:
        """Called after each step."""
        ...


def train(
    case: Case,
    core: ShardedAdam,
    parameters: list[torch.nn.Parameter],
    on: Device,
    units: Units | None = None,
) -> Any:
    """Run all steps of a case; return their reports.

    Args:
        units: gather the parameters; None if each layer waits for its own.
    """
    reports = []
    for number, step in enumerate(case.steps):
        for _ in range(2 if step.drops else 1):
            core.reduction.reset()
            for round_, layers in enumerate(step.rounds):
                with on.both_streams():
                    _forward(case, core, on, layers, units)
                with on.both_streams():
                    _backward(case, core, parameters, on, layers, (number, round_), units)
                if units is not None and round_ == len(step.rounds) - 1:
                    units.finalize_backward()
                core.reduction.backward_ended()
        if step.evaluates:
            with on.both_streams():
                _forward(case, core, on, step.rounds[0], units)
        with torch.no_grad():
            report = core.step(StepInputs([HYPER], max_norm=case.max_norm))
        reports.append((report.skipped, report.clip_factor))
        on.step_over()
    core.synchronize()
    on.write_state(core.states)
    on.read(core.states, "the end")
    return reports


def _buckets(core: ShardedAdam, parameters: Sequence[int]) -> list[BucketState]:
    return list(
        {id(s): s for s in (core.bucket_and_position(index)[0] for index in parameters)}.values()
    )


def _forward(
    case: Case, core: ShardedAdam, on: Device, layers: Sequence[int], units: Units | None
) -> None:
    if units is not None:
        units.forward(layers)
        return
    for layer in layers:
        on.enter(layer)
        used = _buckets(core, case.members(layer))
        core.executor.wait_for_buckets([state.layout.index for state in used])
        on.read(used, f"forward of layer {layer}")


def _backward(
    case: Case,
    core: ShardedAdam,
    parameters: list[torch.nn.Parameter],
    on: Device,
    layers: Sequence[int],
    place: tuple[int, int],
    units: Units | None,
) -> None:
    for layer in reversed(layers):
        on.enter(layer)
        with nullcontext() if units is None else units.backward_of(layer):
            for index in reversed(case.members(layer)):
                values = case.gradient(*place, index)
                gradient = on.gradient(f"the gradient of parameter {index}", values)
                parameters[index].grad = gradient
                del gradient
                stream = core.stream_waits.current_stream(parameters[index].device)
                core.reduction.gradients_ready([parameters[index]], stream)
        if units is None:
            on.read(_buckets(core, case.members(layer)), f"backward of layer {layer}")


class _Host:
    """The sequential host: it records the parameters after each step."""

    def __init__(self, parameters: list[torch.nn.Parameter], outcome: Outcome) -> None:
        self._parameters = parameters
        self._outcome = outcome
        self.step_over()

    def read(self, buckets: Sequence[BucketState], what: str) -> None:
        pass

    def gradient(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values

    def both_streams(self) -> AbstractContextManager[None]:
        return nullcontext()

    def enter(self, layer: int) -> None:
        pass

    def write_state(self, buckets: Sequence[BucketState]) -> None:
        pass

    def step_over(self) -> None:
        self._outcome.weights.append([p.detach().clone() for p in self._parameters])


def reference_of(case: Case) -> Outcome:
    """Run a case with one rank in host memory, without overlap and FSDP2."""
    case = replace(case, sharding="none")
    outcome = _plain(case, offload_fraction=1.0)
    if case.on_device and case.offload_fraction < 1.0:
        outcome.updated_on_device = _plain(case, offload_fraction=0.0)
    return outcome


def _plain(case: Case, *, offload_fraction: float) -> Outcome:
    outcome = Outcome()
    parameters = case.weights()
    ranks = RankGroup()
    core = make_core(
        case,
        ranks,
        Backend() if offload_fraction == 1.0 else HOST_AS_DEVICE,
        parameters,
        overlaps=False,
        offload_fraction=offload_fraction,
    )
    outcome.reports = train(case, core, parameters, _Host(parameters, outcome))
    outcome.state = state_of(core)
    core.executor.close()
    return outcome


def make_policy(case: Case, world_size: int, offload_fraction: float) -> StatePolicy:
    """Return where the case stores state."""
    return StatePolicy(
        world_size=world_size,
        reduces=case.sharding == "none",
        sharded=case.sharding != "none",
        bucket_nbytes=case.bucket_nbytes,
        accumulates=case.accumulates,
        accumulates_later=case.accumulates_later and not case.accumulates,
        reduces_in_fp32=case.reduces_in_fp32,
        streams=True,
        offload_fraction=offload_fraction,
        pins_state=case.pin == "all",
        pins_staging=case.pin != "none",
    )


def make_core(
    case: Case,
    ranks: RankGroup,
    backend: Backend,
    parameters: list[torch.nn.Parameter],
    *,
    overlaps: bool,
    offload_fraction: float,
    slots: SlotPool | None = None,
    units: Units | None = None,
) -> ShardedAdam:
    """Return a `ShardedAdam` with these parameters.

    Args:
        slots: replaces the pool of slots in which gradients are averaged; None for the usual one.
        units: gather the parameters; None if each layer waits for its own.
    """
    policy = make_policy(case, ranks.world_size, offload_fraction)
    device = parameters[0].device
    runtime = backend.make_runtime(device) if backend.is_device(device) else None
    core = ShardedAdam(
        ranks,
        Storage(policy, backend, runtime),
        num_threads=1,
        module=None,
        overlaps=overlaps,
        unfreeze=lambda: None,
        streamed=StreamedGradients(lambda: np.zeros(0)),
        sharded=None if units is None else units.model,
    )
    if slots is not None:
        core.transfer.slots = slots
    new = [
        NewParameter(
            i,
            f"p{i}",
            parameter,
            group=0,
            amsgrad=False,
            state_format=case.state_format,
            shard=None if units is None else units.shard_of(i, ranks),
        )
        for i, parameter in enumerate(parameters)
    ]
    with torch.no_grad():
        core.extend(new)
    if units is not None:
        units.attach(core)
    return core
