"""A step within `torch.compile` is left as it is, and what a closure calls stays compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("optimizer_type", [OffloadAdam, Adam])
@pytest.mark.parametrize("streams", [False, True])
def test_a_compiled_step_is_an_ordinary_one(optimizer_type: Any, streams: bool) -> None:
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = optimizer_type(model.parameters(), module=model if streams else None)

        def train(
            data: torch.Tensor,
            model: torch.nn.Linear = model,
            optimizer: OffloadAdam = optimizer,
        ) -> None:
            model(data).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(train, backend="eager") if compiles else train
        for seed in range(3):
            run(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))
        if compiles:
            compiled_step: Any = torch.compile(optimizer.step, backend="eager")
            compiled_step()
        else:
            optimizer.step()
        assert optimizer.num_steps == 4
        found.append([parameter.tolist() for parameter in model.parameters()])
    assert found[0] == found[1]


def test_what_a_closure_calls_stays_compiled() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = OffloadAdam([weight], lr=0.1)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def loss_of(data: torch.Tensor) -> torch.Tensor:
        return (weight * data).sum()

    def closure() -> float:
        loss = loss_of(torch.ones(3))
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert len(graphs) == 1
    assert torch.allclose(weight.detach(), torch.full((3,), 0.9))
