"""A model on two streams: one computes a gradient late, and both read parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload_adam import OffloadAdam
from offload_adam.layout.schedule import Lane
from offload_adam.transfer.streams import CudaStreams

NUMEL = 1 << 20
DELAY_CYCLES = 200_000_000


class Late(torch.autograd.Function):
    """The identity; its backward first delays the current stream."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(DELAY_CYCLES)
        return gradients[0] * 1.0


class TwoStreams(nn.Module):
    """Reads `early` on the current stream and `late` on a side stream; both gradients are `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Parameter(torch.zeros(NUMEL))
        self.late = nn.Parameter(torch.zeros(NUMEL))
        self.side = torch.cuda.Stream()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # First in forward, hence last in backward: this gradient completes the bucket.
        completing = (self.early * x).sum()
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            late: torch.Tensor = Late.apply(self.late)  # type: ignore[no-untyped-call]
            delayed = (late * x).sum()
        current.wait_stream(self.side)
        return delayed + completing


def test_the_copy_to_the_host_waits_for_every_stream_that_computed_a_gradient() -> None:
    model = TwoStreams().cuda()
    optimizer = OffloadAdam(model.parameters(), lr=1e-3, module=model, overlap=True)
    x = torch.ones(NUMEL, device="cuda")
    for step in range(6):
        model(x * (step + 1)).backward()
        optimizer.step()
        (state,) = optimizer._alive().states
        gradient_shard = state.planes.gradient_shard
        assert gradient_shard is not None
        shard = gradient_shard.clone()
        for placement, name in zip(state.layout.placements, state.names, strict=True):
            wrong = int((shard[placement.start : placement.end] != step + 1).sum())
            assert wrong == 0, f"{wrong} elements of {name} were copied before they were computed"
        optimizer.zero_grad()
    optimizer.close()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUMEL))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class TwoUnits(nn.Module):
    """Two units whose parameters share a bucket; the second one runs on a side stream."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList([Scale(), Scale()])
        self.side = torch.cuda.Stream()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        first = self.units[0](x)
        with torch.cuda.stream(self.side):
            second = self.units[1](x)
        current.wait_stream(self.side)
        return [first, second]


def test_each_stream_waits_for_the_parameters_that_it_reads() -> None:
    model = TwoUnits().cuda()
    optimizer = OffloadAdam(model.parameters(), lr=0.1, module=model, overlap=True)
    streams = optimizer._alive().stream_waits.streams_of(0)
    assert isinstance(streams, CudaStreams)
    h2d = streams._own[Lane.H2D]
    x = torch.ones(NUMEL, device="cuda")
    for _ in range(4):
        torch.stack(model(x)).sum().backward()
        with torch.cuda.stream(h2d):
            torch.cuda._sleep(DELAY_CYCLES)
        optimizer.step()
        optimizer.zero_grad()
        read = model(x)
        optimizer.synchronize()
        for weight, output in zip(model.parameters(), read, strict=True):
            assert torch.equal(output, weight * x)
    optimizer.close()
