"""One training run that any number of ranks performs to the same bits.

Every gradient is a small multiple of 1/64 times a weight that depends on the rank, and the weights
of all ranks add up to their number. Sums, means and squares are then exact in every dtype used
here, so that the mean over the ranks is the same bits whatever the order in which a collective
adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from offload_adam import OffloadAdam
from tests.support.devices import HOST_AS_DEVICE
from tests.support.policies import in_policies

NUM_STEPS = 4


@dataclass(frozen=True)
class Scenario:
    """Settings of a run: how the optimizer gets its gradients, its options, and oddities."""

    mode: str = "drop_in"  # drop_in, external, streaming, no_sync, accumulate, by_hand
    max_grad_norm: float | None = None
    bucket_nbytes: int = 1024
    uneven_presence: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    offloads: bool = False


class Offloading(OffloadAdam):
    """The path of parameters on a device, with parameters in host memory.

    Overlapped only where a test asks for it: other tests read parameters when `step()` returns.
    """

    _backend = HOST_AS_DEVICE

    def __init__(
        self, params: Any, *args: Any, overlap: bool | None = False, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, overlap=overlap, **kwargs)


class Model(torch.nn.Module):
    """Unusual parameters of every kind; the loss of `forward` has exactly the given gradients."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((7, 19), torch.float32),
            ((), torch.float32),
            ((0, 3), torch.float32),
            ((1000,), torch.bfloat16),
            ((129,), torch.float16),
            ((2, 3, 4, 5), torch.float32),
            ((300,), torch.float32),
            ((1,), torch.bfloat16),
            ((5, 130), torch.float16),
        ]
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape, dtype in shapes
        )
        channels_last = self.weights[5].detach().to(memory_format=torch.channels_last)
        self.weights[5] = torch.nn.Parameter(channels_last)
        self.unused = torch.nn.Parameter(torch.ones(11))
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, gradients: list[torch.Tensor | None]) -> torch.Tensor:
        terms = [
            (weight * gradient).sum().float()
            for weight, gradient in zip(self.weights, gradients, strict=True)
            if gradient is not None
        ]
        return torch.stack(terms).sum()


def gradients_of(
    model: Model, step: int, rank: int, world_size: int, scenario: Scenario
) -> list[torch.Tensor | None]:
    """Return this rank's gradients, whose mean over the ranks does not depend on their number."""
    generator = torch.Generator().manual_seed(100 + step)
    weight = _weights(world_size)[rank]
    gradients: list[torch.Tensor | None] = []
    for position, parameter in enumerate(model.weights):
        base = torch.randint(-16, 17, parameter.shape, generator=generator) / 64
        if position == 6 and step % 2 == 1:
            gradients.append(None)  # on no rank
        elif position == 4 and scenario.uneven_presence and scenario.mode != "external":
            # On the last rank only, multiplied so that the mean is the same.
            gradient = (base * world_size).to(parameter.dtype)
            gradients.append(gradient if rank == world_size - 1 else None)
        else:
            gradients.append((base * weight).to(parameter.dtype))
    return gradients


def _weights(world_size: int) -> list[int]:
    """Return one weight per rank; the weights differ and add up to `world_size`."""
    weights = [1 - 2 * rank for rank in range(world_size - 1)]
    return [*weights, world_size - sum(weights)]


def train(rank: int, world_size: int, scenario: Scenario) -> tuple[list[bytes], list[float], Any]:
    """Run the scenario; return the parameters' bits, the norms, and the full state on rank 0."""
    model = Model()
    optimizer = make_optimizer(model, scenario)
    norms = []
    for step in range(NUM_STEPS):
        # "external" stands for gradients that have been averaged: every rank has the mean.
        place = (0, 1) if scenario.mode == "external" else (rank, world_size)
        gradients = gradients_of(model, step, *place, scenario)
        backward(model, optimizer, gradients, scenario)
        optimizer.step()
        assert optimizer.last_step is not None
        assert not optimizer.last_step.skipped
        norms.append(optimizer.last_step.total_norm)
        optimizer.zero_grad()
    full = optimizer.full_state_dict()
    bits = [bits_of(parameter) for parameter in model.parameters()]
    optimizer.close()
    return bits, norms, full


def make_optimizer(model: Model, scenario: Scenario) -> OffloadAdam:
    """Make the scenario's optimizer, with two groups of different hyperparameters."""
    weights = list(model.weights)
    groups: list[dict[str, Any]] = [
        {"params": weights[:4], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [*weights[4:], model.unused, model.frozen], "betas": (0.8, 0.95)},
    ]
    streams = scenario.mode in ("streaming", "no_sync", "accumulate")
    reduction = "external" if scenario.mode == "external" else "optimizer"
    maker = Offloading if scenario.offloads else OffloadAdam
    return maker(
        groups,
        lr=3e-2,
        decoupled_weight_decay=True,
        max_grad_norm=scenario.max_grad_norm,
        module=model if streams else None,
        gradient_reduction=reduction,
        accumulate="host" if scenario.mode == "accumulate" else None,
        num_threads=1,
        **in_policies(bucket_nbytes=scenario.bucket_nbytes, **dict(scenario.options)),
    )


def backward(
    model: Model,
    optimizer: OffloadAdam,
    gradients: list[torch.Tensor | None],
    scenario: Scenario,
) -> None:
    """Pass the gradients to the optimizer in the scenario's mode."""
    if scenario.mode in ("by_hand", "external"):
        for parameter, gradient in zip(model.weights, gradients, strict=True):
            parameter.grad = gradient
        return
    if scenario.mode not in ("no_sync", "accumulate"):
        model(gradients).backward()
        return
    halves = [
        [None if gradient is None else gradient / 2 for gradient in gradients] for _ in range(2)
    ]
    with optimizer.no_sync() if scenario.mode == "no_sync" else nullcontext():
        model(halves[0]).backward()
    model(halves[1]).backward()


def bits_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as bytes, in the order of its indices."""
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def tensors_in(full: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a full state dict with a name."""
    for packed, entry in full["state"].items():
        for key, value in entry.items():
            yield f"{packed}.{key}", value
    for packed, value in full["offload_adam"]["master_weight"].items():
        yield f"{packed}.master_weight", value
