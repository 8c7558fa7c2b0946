"""Run a case: the same for the plain host, one task after the other, and the simulated machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from offload_adam.coordinator.membership import Membership
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.parameters.selection import NewParameter
from offload_adam.step.backend import Backend
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.construction import Placing
from offload_adam.step.inputs import StepInputs
from offload_adam.step.reduction import GradientReduction
from offload_adam.step.sharded_adam import ShardedAdam
from tests.simulation.case import Case
from tests.simulation.outcome import Outcome, state_of
from tests.support.cuda_runtime import StandInRuntime

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
    reduction = make_reduction(case, membership)
    core = make_core(
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


def make_reduction(case: Case, membership: Membership) -> GradientReduction:
    """Return a streaming reduction as the case asks for."""
    return GradientReduction(
        membership,
        reduces=True,
        streams=True,
        accumulates=case.accumulates,
        reduce_dtype=torch.float32 if case.reduces_in_fp32 else None,
    )


def make_core(
    case: Case,
    membership: Membership,
    reduction: GradientReduction,
    backend: Backend,
    parameters: list[torch.nn.Parameter],
    *,
    simulated: bool,
    offload_fraction: float,
) -> ShardedAdam:
    """Return a core with the parameters taken in.

    Args:
        simulated: on the machine of `backend`, with overlap if the case has it; else on the plain
            host, sequentially.
        offload_fraction: below 1 the buckets of parameters in host memory count as a device's.
    """
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
