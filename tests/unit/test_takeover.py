"""A newer optimizer takes over the parameters of an older one, as in a cell that runs again."""

from __future__ import annotations

import gc
import linecache
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam, OffloadAdamW, OffloadPolicy
from offload_adam.errors import HostMemoryError
from offload_adam.sharded_optimizer.optimizer import ShardedOptimizer
from offload_adam.step.executor import Executor
from tests.support.reference import Weights, adam_in_float64, bits, exact_gradients

SHAPES: list[tuple[int, ...]] = [(70,), (3, 50), (9,), (40,)]
LR = 0.05


def make(model: Weights, how: str = "drop-in", *, bucket_nbytes: int = 512) -> OffloadAdam:
    return OffloadAdam(
        model.parameters(),
        lr=LR,
        module=None if how == "drop-in" else model,
        overlap=how == "overlapped" or None,
        offload=OffloadPolicy(bucket_nbytes=bucket_nbytes),
        num_threads=1,
    )


def train(model: Weights, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        model(exact_gradients(model.all, seed, 1)).backward()
        optimizer.step()


def assert_follows_torch(model: Weights, start: list[torch.Tensor], seeds: range) -> None:
    """Check that the model made these steps of a new Adam from these weights."""
    steps = [exact_gradients(start, seed, 1) for seed in seeds]
    for found, expected in zip(model.all, adam_in_float64(start, steps, lr=LR), strict=True):
        # Three fp32 roundings of a weight below 4, and of updates of at most LR each.
        torch.testing.assert_close(found.detach().double(), expected, rtol=0.0, atol=1e-6)


def copies(model: Weights) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.all]


@pytest.fixture
def last_error() -> Iterator[None]:
    """Keep the error of `interrupted`, as a prompt does, until the test ends."""
    yield
    if hasattr(sys, "last_value"):
        del sys.last_value


def interrupted(call: Callable[[], object]) -> None:
    """Call a function that Ctrl-C interrupts, and keep the error as a prompt does."""
    try:
        call()
    except KeyboardInterrupt as error:
        sys.last_value = error
        return
    raise AssertionError("it was not interrupted")


MAKERS: dict[str, Callable[[Weights], Any]] = {
    "OffloadAdam": make,
    "streaming": lambda model: make(model, "streaming"),
    "overlapped": lambda model: make(model, "overlapped"),
    "OffloadAdamW": lambda model: OffloadAdamW(model.parameters(), lr=LR, weight_decay=0.0),
    "Adam": lambda model: Adam(model.parameters(), LR),
    "Adam offloaded": lambda model: Adam(model.parameters(), LR, module=model, use_offload=True),
}


@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", ["OffloadAdam", "overlapped", "Adam"])
def test_a_cell_that_runs_again_replaces_its_optimizer(first: str, second: str) -> None:
    model = Weights(SHAPES)
    start = copies(model)
    older = MAKERS[first](model)
    train(model, older, range(3))
    with pytest.warns(UserWarning, match=r"takes over .* older \w*Adam, which is closed\. Call"):
        newer = MAKERS[second](model)
    # The older one may have been updating the weights when the newer one was constructed.
    assert_follows_torch(model, start, range(3))
    start = copies(model)
    train(model, newer, range(3, 6))
    newer.close()
    assert_follows_torch(model, start, range(3, 6))
    for call in (older.step, older.state_dict, lambda: older.overlaps):
        with pytest.raises(RuntimeError, match="newer optimizer has taken over its parameters"):
            call()
    older.close()
    older.zero_grad()


def test_parameters_may_be_unfrozen_and_frozen_before_a_cell_runs_again() -> None:
    model = Weights(SHAPES)
    model.w1.requires_grad_(False)
    older = make(model)
    model.w1.requires_grad_()
    start = copies(model)
    with pytest.warns(UserWarning, match="takes over"):
        newer = make(model)
    train(model, newer, range(2))
    assert_follows_torch(model, start, range(2))
    model.w1.requires_grad_(False)
    frozen = model.w1.detach().clone()
    with pytest.raises(ValueError, match="already trained by another"):
        OffloadAdam([w for w in model.all if w.requires_grad])  # without the frozen one
    start = copies(model)
    with pytest.warns(UserWarning, match="takes over"):
        newest = make(model)
    gradients = [exact_gradients(model.all, seed, 1) for seed in range(2)]
    for given in gradients:
        for weight, gradient in zip(model.all, given, strict=True):
            weight.grad = gradient if weight.requires_grad else None
        newest.step()
    assert torch.equal(model.w1, frozen)
    expected = adam_in_float64(start, gradients, lr=LR)
    for weight, value in zip(model.all, expected, strict=True):
        if weight.requires_grad:
            torch.testing.assert_close(weight.detach().double(), value, rtol=0.0, atol=1e-6)
    with pytest.raises(RuntimeError, match="has been closed"):
        newer.step()
    older.close()


def test_the_warning_points_at_the_users_line() -> None:
    model = Weights(SHAPES)
    older = make(model)
    with pytest.warns(UserWarning, match="takes over") as caught:
        OffloadAdam(model.parameters())
    (warning,) = caught
    assert warning.filename == __file__
    assert "OffloadAdam(model" in linecache.getline(__file__, warning.lineno)
    older.close()


@pytest.mark.parametrize("kept", [slice(1, None), slice(None), slice(0, 2)])
def test_an_optimizer_of_other_parameters_is_left_alone(kept: slice) -> None:
    """It has some of the parameters, or all and one more."""
    model = Weights(SHAPES)
    older = OffloadAdam(model.all, lr=LR)
    further = [torch.nn.Parameter(torch.ones(3, dtype=torch.float32, device="cpu"))]
    parameters = model.all[kept] + (further if kept == slice(None) else [])
    start = copies(model)
    with pytest.raises(ValueError, match=r"already trained by another .* Call close\(\)"):
        OffloadAdam(parameters)
    added = OffloadAdam(further)
    with pytest.raises(ValueError, match="already trained by another"):
        added.add_param_group({"params": model.all})
    train(model, older, range(2))
    assert_follows_torch(model, start, range(2))


def test_two_optimizers_of_the_parameters_are_not_replaced_by_one() -> None:
    model = Weights(SHAPES)
    halves = [OffloadAdam(model.all[:2]), OffloadAdam(model.all[2:])]
    with pytest.raises(ValueError, match="'w0' is already trained"):
        OffloadAdam(model.named_parameters())
    for half in halves:
        half.step()


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"capturable": True}, {"max_grad_norm": 0.0}, {"accumulate": "host"}],
)
def test_a_rejected_optimizer_takes_nothing_over(wrong: dict[str, Any]) -> None:
    model = Weights(SHAPES)
    older = make(model, "streaming")
    start = copies(model)
    train(model, older, range(1))
    model(exact_gradients(model.all, 1, 1)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"must be|not supported|needs module="):
            OffloadAdam(model.parameters(), **wrong)
        with pytest.raises(UserWarning, match="takes over"):
            OffloadAdam(model.parameters())
    older.step()
    assert_follows_torch(model, start, range(2))


def test_the_older_state_is_gone_if_the_newer_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Weights(SHAPES)
    older = make(model)
    train(model, older, range(1))
    before = bits(model.all)
    available = "offload_adam.coordinator.node_memory.available_memory"
    monkeypatch.setattr(available, lambda: (10, "of the machine"))
    with pytest.warns(UserWarning, match="which is closed"), pytest.raises(HostMemoryError):
        make(model)
    monkeypatch.undo()
    assert bits(model.all) == before
    make(model)  # without a warning: no optimizer is left
    with pytest.raises(RuntimeError, match="has been closed"):
        older.step()


def references(optimizer: OffloadAdam) -> list[Any]:
    """Return weak references to the memory of the optimizer's state."""
    core = optimizer._core
    assert core is not None
    return [weakref.ref(arena._mapping) for arena in core.arenas if arena._mapping is not None]


def fit(model: Weights, how: str, bucket_nbytes: int, memory: list[Any]) -> None:
    """Train, and put references to the optimizer's memory into `memory`."""
    optimizer = make(model, how, bucket_nbytes=bucket_nbytes)
    memory += references(optimizer)
    train(model, optimizer, range(3))


def in_backward(monkeypatch: pytest.MonkeyPatch, model: Weights) -> None:
    """Let Ctrl-C come in the second backward, when w3 has its gradient and w2 has not."""
    count = [0]

    def stop(gradient: torch.Tensor) -> None:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt

    model.w2.register_hook(stop)


def in_step(monkeypatch: pytest.MonkeyPatch, model: Weights) -> None:
    """Let Ctrl-C come in the second step, when some buckets are updated."""
    waited, count = Executor._gather_ahead, [0]

    def stop(self: Executor, stopwatch: object) -> None:
        waited(self, stopwatch)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] == 6:
            del self, stopwatch  # this frame is the test's, not the package's
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(Executor, "_gather_ahead", stop)


@pytest.mark.parametrize(
    ("how", "where", "lost"),
    [
        ("drop-in", in_backward, r"closed\. Call"),
        ("streaming", in_backward, r"closed\. The gradients of its last backward are dropped\."),
        ("overlapped", in_backward, r"closed\. The gradients of its last backward are dropped\."),
        ("drop-in", in_step, r"some weights are updated and others are not\. Call"),
        ("streaming", in_step, "others are not. The gradients of its last backward are dropped"),
    ],
)
@pytest.mark.usefixtures("last_error")
def test_an_interrupted_function_can_be_called_again(
    monkeypatch: pytest.MonkeyPatch, how: str, where: Any, lost: str
) -> None:
    model = Weights(SHAPES)
    memory: list[Any] = []
    where(monkeypatch, model)
    # One bucket of all parameters, which waits for their gradients, or one for each.
    bucket_nbytes = 4096 if where is in_backward else 512
    interrupted(lambda: fit(model, how, bucket_nbytes, memory))
    assert memory
    assert all(reference() is not None for reference in memory)
    alive: list[bool] = []
    build = ShardedOptimizer._build_state

    def look(self: ShardedOptimizer, *arguments: Any) -> None:
        alive.extend(reference() is not None for reference in memory)
        build(self, *arguments)

    monkeypatch.setattr(ShardedOptimizer, "_build_state", look)
    with pytest.warns(UserWarning, match=lost):
        optimizer = make(model, how)
    # Both states never exist together.
    assert alive == [False] * len(alive)
    # As in torch, gradients that nobody has dropped stay. Part of a backward does not.
    assert (model.w3.grad is None) == (how != "drop-in")
    start = copies(model)
    if how == "drop-in":
        optimizer.zero_grad()
    model(exact_gradients(model.all, 5, 1)).backward()
    optimizer.step()
    train(model, optimizer, range(6, 8))
    optimizer.close()
    assert_follows_torch(model, start, range(5, 8))


def test_an_update_that_fails_is_reported_by_the_newer_optimizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Weights(SHAPES)
    older = make(model, "overlapped")
    train(model, older, range(1))
    older.synchronize()
    core = older._core
    assert core is not None

    def fail(*arguments: object) -> None:
        raise ArithmeticError("the kernel failed")

    monkeypatch.setattr(core.tasks, "launch", fail)
    model(exact_gradients(model.all, 1, 1)).backward()
    older.step()
    with (
        pytest.warns(UserWarning, match="takes over"),
        pytest.raises(ArithmeticError, match="the kernel failed"),
    ):
        make(model)
    start = copies(model)
    newer = make(model)
    train(model, newer, range(2))
    assert_follows_torch(model, start, range(2))


def test_a_dropped_optimizer_of_some_parameters_is_no_obstacle() -> None:
    model = Weights(SHAPES)
    older = OffloadAdam(model.all[:2], lr=LR)
    train(model, older, range(1))
    older.itself = older  # type: ignore[attr-defined]  # so that only a collection frees it
    dropped = weakref.ref(older)
    gc.disable()
    try:
        del older
        assert dropped() is not None
        start = copies(model)
        newer = make(model)
    finally:
        gc.enable()
    assert dropped() is None
    train(model, newer, range(3))
    assert_follows_torch(model, start, range(3))
