"""An optimizer within `torch.compile` runs uncompiled, and what a closure calls stays compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam, OffloadPolicy
from tests.support.reference import bits
from tests.unit.overlap.lazy_worker import Lazy


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


class Layers(torch.nn.Module):
    """Layers whose forward waits for them one by one if updates overlap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.entry = torch.nn.Linear(16, 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.entry(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


def make(how: str, model: Layers) -> OffloadAdam:
    kind = Lazy if how == "overlapped" else OffloadAdam
    return kind(
        model.parameters(),
        lr=1e-2,
        module=None if how == "drop-in" else model,
        overlap=how == "overlapped" or None,
        offload=OffloadPolicy(bucket_nbytes=2048),
        num_threads=1,
    )


def train(how: str, order: str, backend: Any) -> tuple[list[float], list[bytes]]:
    """Return the losses and the weights after whole steps, compiled if there is a backend."""
    model = Layers()
    optimizer = make(how, model)

    def step(x: torch.Tensor) -> torch.Tensor:
        if order == "zero first":
            optimizer.zero_grad()
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        if order == "torch clips":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if order == "optimizer clips":
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        if order != "zero first":
            optimizer.zero_grad()
        return loss.detach()

    run: Callable[[torch.Tensor], torch.Tensor] = step
    if backend is not None:
        run = torch.compile(step, backend=backend)
    losses = [run(batch(number)).item() for number in range(4)]
    optimizer.close()
    return losses, bits(list(model.parameters()))


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("order", ["zero last", "zero first", "torch clips", "optimizer clips"])
@pytest.mark.parametrize("how", ["drop-in", "streaming", "overlapped"])
def test_a_whole_step_is_compiled_around_the_optimizer(
    how: str, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    expected = train(how, order, None)
    assert train(how, order, backend) == expected
    assert sum("linear" in graph.code for graph in graphs) == 1  # the whole forward
    # torch would compile what stand-ins do again and again, for each value of a norm.
    assert "recompile_limit" not in caplog.text


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_full_graph_of_a_step_is_an_error_with_the_reason() -> None:
    optimizer = OffloadAdam([torch.nn.Parameter(torch.ones(3))])

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        return x + 1

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot be part of a graph\. Leave fullgraph=True"):
            step(torch.ones(2))
    assert optimizer.num_steps == 0


def test_a_compiled_evaluation_waits_for_running_updates() -> None:
    """No gradient shows afterwards that it has read weights before their update."""
    model, reference = Layers(), Layers()
    optimizer, sequential = make("overlapped", model), make("drop-in", reference)

    def evaluate(of: Layers, x: torch.Tensor) -> Any:
        return of(x).square().sum()

    compiled = torch.compile(evaluate, backend="eager")
    for step in range(4):
        for of, used in ((model, optimizer), (reference, sequential)):
            of(batch(step)).square().mean().backward()
            used.step()
            used.zero_grad()
        with torch.no_grad():
            assert compiled(model, batch(9)) == evaluate(reference, batch(9))


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
