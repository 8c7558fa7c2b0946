"""Each unit of a model waits for its own parameters, however the model reads them."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload_adam import OffloadAdam, OffloadPolicy, UnreadyParameterError
from tests.support.policies import in_policies
from tests.support.updates import running_first
from tests.unit.overlap.lazy_worker import Lazy, LazyOffloading, LazyWorker, copying, latest

WIDTH = 8
NUM_STEPS = 4


def batch(step: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))


class Plain(nn.Module):
    """An input layer, blocks in a ModuleList, a norm and a head."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Tied(Plain):
    """The head is the first layer's weight, read without a call of the module that owns it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return nn.functional.linear(self.norm(x), self.entry.weight)


class ParentReads(Plain):
    """The first layer reads a weight of the last unit, before that unit is entered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x) + self.blocks[2].get_parameter("weight").sum()
        return super().forward(x)


class HeadIsRead(Plain):
    """The head's weight is read by the root; the head itself is never called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return nn.functional.linear(self.norm(x), self.head.weight, self.head.bias)


class Attends(Plain):
    """MultiheadAttention reads the weight of its child `out_proj`, but never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2) for _ in range(2))
        self.outer = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in (*self.blocks, self.outer):
            x = x + block(x, x, x)[0]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Twice(Plain):
    """One block is called twice, one not at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](torch.tanh(self.blocks[0](self.entry(x))))
        return self.head(self.norm(self.blocks[2](x)))  # type: ignore[no-any-return]


class Shared(Plain):
    """Two units share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].weight = self.blocks[0].weight


class Checkpointed(Plain):
    """Activation checkpointing runs forward again during backward."""

    reentrant = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = torch.tanh(checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class CheckpointedOtherwise(Checkpointed):
    reentrant = False


class Chain(nn.Sequential):
    """No ModuleList at all."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Tanh()
        )


class Normed(Plain):
    """weight_norm computes the weight in its own forward pre-hook."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.blocks[1])
        nn.utils.parametrizations.orthogonal(self.head)


class Alternates(Plain):
    """Each forward skips a different block."""

    turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        x = self.entry(x)
        for number, block in enumerate(self.blocks):
            if number != self.turn % 3:
                x = torch.tanh(block(x))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


MODELS: list[Callable[[], nn.Module]] = [
    Plain,
    Tied,
    ParentReads,
    HeadIsRead,
    Attends,
    Twice,
    Shared,
    Checkpointed,
    CheckpointedOtherwise,
    Chain,
    Normed,
    Alternates,
]


def make_model(maker: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return maker()


def make(
    maker: type[OffloadAdam], model: nn.Module, *, overlap: bool = True, **options: object
) -> OffloadAdam:
    given = in_policies(**{"lr": 1e-2, "max_grad_norm": 1.0, "bucket_nbytes": 300, **options})
    return maker(model.named_parameters(), module=model, overlap=overlap, **given)


def losses(model: nn.Module, optimizer: OffloadAdam, num_steps: int = NUM_STEPS) -> list[float]:
    found = []
    for step in range(num_steps):
        loss = model(batch(step)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def bits(model: nn.Module) -> list[bytes]:
    return [
        parameter.detach().flatten().view(torch.uint8).numpy().tobytes()
        for parameter in model.parameters()
    ]


def expect(
    maker: Callable[[], nn.Module], num_steps: int = NUM_STEPS
) -> tuple[list[float], list[bytes]]:
    """Return losses and weights of the sequential executor."""
    model = make_model(maker)
    optimizer = make(OffloadAdam, model, overlap=False)
    return losses(model, optimizer, num_steps), bits(model)


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    latest.clear()


@pytest.mark.parametrize("maker", MODELS)
@pytest.mark.parametrize("optimizer_class", [Lazy, LazyOffloading])
def test_every_way_of_reading_parameters_gives_the_sequential_bits(
    maker: Callable[[], nn.Module], optimizer_class: type[OffloadAdam]
) -> None:
    expected = expect(maker)
    model = make_model(maker)
    optimizer = make(optimizer_class, model)
    found = losses(model, optimizer)
    optimizer.synchronize()
    assert (found, bits(model)) == expected


@pytest.mark.parametrize("maker", MODELS)
def test_the_true_thread_gives_the_sequential_bits(maker: Callable[[], nn.Module]) -> None:
    expected = expect(maker, 8)
    model = make_model(maker)
    optimizer = make(OffloadAdam, model)
    found = losses(model, optimizer, 8)
    optimizer.synchronize()
    assert (found, bits(model)) == expected


def updates(worker: LazyWorker) -> list[str]:
    return [what for what in worker.done if what.startswith("the update")]


def step_once(model: nn.Module, optimizer: OffloadAdam, step: int = 0) -> LazyWorker:
    """Take a step whose updates do not run yet, and return the worker that would finish them."""
    model(batch(step)).square().sum().backward()
    optimizer.step()
    worker = copying[-1]
    worker.done.clear()
    assert num_waiting(worker) > 0, "step() has returned before the updates"
    return worker


def num_waiting(worker: LazyWorker) -> int:
    return sum(job.what.startswith("the update") for job in worker.waiting)


def test_a_unit_waits_for_its_own_buckets_and_for_no_later_ones() -> None:
    model = make_model(Plain)
    assert isinstance(model, Plain)
    optimizer = make(Lazy, model)
    worker = step_once(model, optimizer)
    num_updates = num_waiting(worker)
    seen: dict[str, int] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda *_: seen.__setitem__(name, len(updates(worker)))

    model.entry.register_forward_pre_hook(look("entry"))
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(look(f"block {number}"))
    model.head.register_forward_pre_hook(look("head"))
    model(batch(1))
    counts = list(seen.values())
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts), "each part waits for more than the one before"
    assert counts[0] < num_updates / 2
    assert counts[-1] == num_updates


def test_user_named_units_are_waited_for_as_a_whole() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
            self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    model = make_model(Halves)
    assert isinstance(model, Halves)
    optimizer = make(Lazy, model, units=[model.first, model.second])
    worker = step_once(model, optimizer)
    num_updates = num_waiting(worker)
    counts: list[int] = []
    model.first[0].register_forward_pre_hook(lambda *_: counts.append(len(updates(worker))))
    model.first[1].register_forward_pre_hook(lambda *_: counts.append(len(updates(worker))))
    model.second[0].register_forward_pre_hook(lambda *_: counts.append(len(updates(worker))))
    model(batch(1))
    assert counts[0] == counts[1] < counts[2] == num_updates


def test_units_that_are_not_modules_of_the_model_are_rejected() -> None:
    model = make_model(Plain)
    with pytest.raises(ValueError, match="units contains a Linear that is not a sub"):
        make(OffloadAdam, model, units=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="units= needs module="):
        OffloadAdam(model.parameters(), offload=OffloadPolicy(units=[model]))
    with pytest.raises(ValueError, match="overlap=True needs module="):
        OffloadAdam(model.parameters(), overlap=True)


def read_under_no_grad(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    with torch.no_grad():
        model(batch(9))
    return list(model.parameters())


def read_with_inference_mode(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    with torch.inference_mode():
        model(batch(9))
    return list(model.parameters())


def read_after_synchronize(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    optimizer.synchronize()
    return list(model.parameters())


def read_state_dict(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def read_state_dict_of_a_part(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    model.get_submodule("blocks.1").state_dict()
    return list(model.parameters())


def read_optimizer_state(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    optimizer.state_dict()
    return list(model.parameters())


def call_a_part(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    model.get_submodule("blocks.2")(batch(9))
    return list(model.parameters())


def close(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    optimizer.close()
    return list(model.parameters())


READERS = [
    read_under_no_grad,
    read_with_inference_mode,
    read_after_synchronize,
    read_state_dict,
    read_state_dict_of_a_part,
    read_optimizer_state,
    call_a_part,
    close,
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("optimizer_class", [Lazy, LazyOffloading])
def test_reads_outside_of_forward_get_the_new_parameters(
    reader: Callable[[nn.Module, OffloadAdam], list[torch.Tensor]],
    optimizer_class: type[OffloadAdam],
) -> None:
    _, expected = expect(Plain, 1)
    model = make_model(Plain)
    optimizer = make(optimizer_class, model)
    step_once(model, optimizer)
    tensors = reader(model, optimizer)
    found = [t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
    assert found == expected


def test_a_post_hook_of_step_reads_the_new_parameters() -> None:
    _, expected = expect(Plain, 1)
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    seen: list[list[bytes]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(bits(model)))
    model(batch(0)).square().sum().backward()
    optimizer.step()
    assert seen == [expected]


def test_weights_loaded_right_after_a_step_stay() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    step_once(model, optimizer)
    wanted = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    step_once(model, optimizer, 1)
    model.load_state_dict(wanted)
    optimizer.synchronize()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    # And the master weights follow: a step from there is a step from ones.
    step_once(model, optimizer, 2)
    optimizer.synchronize()
    assert all((p - 1).abs().max() <= 0.0101 for p in model.parameters())


@pytest.mark.parametrize("optimizer_class", [Lazy, LazyOffloading])
def test_a_write_during_an_update_is_rejected_and_one_after_it_reaches_the_master(
    optimizer_class: type[OffloadAdam],
) -> None:
    model = make_model(Plain)
    optimizer = make(optimizer_class, model)
    step_once(model, optimizer)
    optimizer.synchronize()
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(7.0)
    step_once(model, optimizer, 1)
    optimizer.synchronize()
    assert (model.get_parameter("head.bias") - 7.0).abs().max() <= 0.0101
    step_once(model, optimizer, 2)
    with torch.no_grad():
        model.get_parameter("head.bias").clamp_(-1.0, 1.0)
    with pytest.raises(UnreadyParameterError, match=r"'head.bias' was modified while.*synchronize"):
        model(batch(3))


def test_copies_of_the_model_have_no_hooks() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    step_once(model, optimizer)
    with pytest.raises(UnreadyParameterError, match="synchronize"):
        copy.deepcopy(model)
    with pytest.raises(UnreadyParameterError, match="synchronize"):
        torch.save(model, io.BytesIO())
    optimizer.synchronize()
    twin = copy.deepcopy(model)
    worker = step_once(model, optimizer, 1)
    waiting = num_waiting(worker)
    twin(batch(2)).sum().backward()
    assert num_waiting(worker) == waiting
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_a_forward_that_skips_hooks_is_an_error_before_any_bad_update() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    step_once(model, optimizer)
    assert isinstance(model, Plain)
    model.head.forward(model.norm.forward(batch(1))).sum().backward()
    with pytest.raises(UnreadyParameterError, match=r"'head\.|'norm\."):
        optimizer.step()
    before = bits(model)
    optimizer.zero_grad()
    assert bits(model) == before
    # The next forward works again.
    model(batch(2)).square().sum().backward()
    optimizer.step()


class LaterReadEarly(Plain):
    """From its second forward on, reads the head's weight long before the head's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        early = self.head.weight.square().sum() if self.num_forwards > 1 else 0.0
        return super().forward(x) + early


def test_the_gradient_of_a_read_before_the_update_is_rejected() -> None:
    model = make_model(LaterReadEarly)
    optimizer = make(Lazy, model)
    step_once(model, optimizer)
    loss = model(batch(1)).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_penalty_on_weights_of_the_last_step_is_rejected() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    step_once(model, optimizer)
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    loss = model(batch(1)).square().sum() + penalty
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad()
    optimizer.synchronize()
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    (model(batch(1)).square().sum() + penalty).backward()
    optimizer.step()


class CallsCompiled(nn.Module):
    """Calls a compiled function, and a higher-order operator, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.compiled = torch.compile(lambda x: torch.tanh(x) * 2, backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.compiled(block(x))
        return cast(torch.Tensor, torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))


def test_what_a_forward_compiles_in_its_first_run_is_not_traced() -> None:
    expected = expect(CallsCompiled)
    model = make_model(CallsCompiled)
    optimizer = make(Lazy, model)
    found = losses(model, optimizer)
    optimizer.synchronize()
    assert (found, bits(model)) == expected


def test_a_group_added_between_backward_and_step_keeps_its_gradient() -> None:
    results = []
    for kind in (OffloadAdam, Lazy):
        model = make_model(Plain)
        assert isinstance(model, Plain)
        head = {id(parameter) for parameter in model.head.parameters()}
        rest = [(n, p) for n, p in model.named_parameters() if id(p) not in head]
        optimizer = kind(
            rest,
            module=model,
            overlap=kind is Lazy,
            lr=1e-2,
            offload=OffloadPolicy(bucket_nbytes=300),
        )
        model(batch(0)).square().sum().backward()
        optimizer.step()
        model.zero_grad()
        model(batch(1)).square().sum().backward()
        optimizer.add_param_group({"params": list(model.head.named_parameters("head"))})
        optimizer.step()
        model.zero_grad()
        losses(model, optimizer, 3)
        optimizer.synchronize()
        results.append(bits(model))
    assert results[0] == results[1]


def test_a_forked_worker_that_reads_parameters_during_updates_raises_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    step_once(model, optimizer)
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        with pytest.raises(UnreadyParameterError, match="forked while a thread of its parent"):
            model(batch(1))
    optimizer.synchronize()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    model(batch(1))


def test_a_first_forward_that_skips_hooks_falls_back_to_waiting_in_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model(Plain)
    assert isinstance(model, Plain)
    expected_model = make_model(Plain)
    sequential = make(OffloadAdam, expected_model, overlap=False)
    optimizer = make(Lazy, model)
    for step in range(3):
        for each, it in ((expected_model, sequential), (model, optimizer)):
            assert isinstance(each, Plain)
            each.head.forward(each.norm.forward(batch(step))).square().sum().backward()
            it.step()
    assert "step() itself waits for" in caplog.text
    assert caplog.text.count("step() itself waits for") == 1
    assert bits(model) == bits(expected_model)


def test_parameters_that_are_not_the_models_are_waited_for_in_step() -> None:
    def run(optimizer_class: type[OffloadAdam], *, overlap: bool) -> tuple[list[bytes], bytes]:
        model = make_model(Plain)
        scale = nn.Parameter(torch.ones(5))
        named = [*model.named_parameters(), ("scale", scale)]
        optimizer = optimizer_class(
            named, lr=1e-2, module=model, overlap=overlap, offload=OffloadPolicy(bucket_nbytes=1)
        )
        for step in range(3):
            (model(batch(step)).square().sum() * scale.square().sum()).backward()
            optimizer.step()
        seen = scale.detach().numpy().tobytes()
        optimizer.synchronize()
        return bits(model), seen

    assert run(Lazy, overlap=True) == run(OffloadAdam, overlap=False)


@pytest.mark.parametrize("sync", [True, False])
def test_accumulation_and_zero_grad_at_any_moment(sync: bool) -> None:
    def run(optimizer_class: type[OffloadAdam], *, overlap: bool) -> list[bytes]:
        model = make_model(Plain)
        accumulate = None if sync else "host"
        optimizer = make(optimizer_class, model, overlap=overlap, accumulate=accumulate)
        for step in range(3):
            optimizer.zero_grad()
            model(batch(50)).square().sum().backward()
            optimizer.zero_grad()
            if sync:
                with optimizer.no_sync():
                    model(batch(step)).square().sum().backward()
            else:
                model(batch(step)).square().sum().backward()
            optimizer.zero_grad(set_to_none=step != 1)
            model(batch(step + 10))  # its output is not used
            model(batch(step + 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 1)
        optimizer.synchronize()
        return bits(model)

    assert run(Lazy, overlap=True) == run(OffloadAdam, overlap=False)


def test_at_most_two_backwards_are_unfinished_however_slow_the_thread_is() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model, accumulate="host")
    model(batch(0)).square().sum().backward()
    num_buckets = len(latest[-1].waiting)
    counts = []
    for step in range(6):
        model(batch(step)).square().sum().backward()
        counts.append(len(latest[-1].waiting))
    assert max(counts) <= 3 * num_buckets
    optimizer.step()


def test_groups_that_are_added_right_after_a_step_stream_and_overlap_too() -> None:
    def run(optimizer_class: type[OffloadAdam], *, overlap: bool) -> list[bytes]:
        model = make_model(Plain)
        members = list(model.parameters())
        optimizer = optimizer_class(
            members[:4],
            lr=1e-2,
            module=model,
            overlap=overlap,
            offload=OffloadPolicy(bucket_nbytes=300),
        )
        for step in range(2):
            model(batch(step)).square().sum().backward()
            optimizer.step()
        model.zero_grad()
        optimizer.add_param_group({"params": members[4:]})
        for step in range(2, 5):
            model(batch(step)).square().sum().backward()
            optimizer.step()
        optimizer.synchronize()
        return bits(model)

    assert run(Lazy, overlap=True) == run(OffloadAdam, overlap=False)


def test_autograd_rejects_a_graph_from_before_the_step() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    first = model(batch(0)).square().sum()
    second = model(batch(1)).square().sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_a_skipped_step_leaves_nothing_waiting_and_changes_no_bit() -> None:
    model = make_model(Plain)
    optimizer = make(Lazy, model)
    before = bits(model)
    (model(batch(0)).sum() * float("nan")).backward()
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert not latest[-1].waiting
    assert not copying[-1].waiting
    assert bits(model) == before


def test_an_error_in_the_copy_thread_surfaces_at_the_next_call_and_at_every_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(Plain)
    optimizer = make(OffloadAdam, model)
    losses(model, optimizer, 2)
    optimizer.synchronize()
    tasks = optimizer._alive().tasks

    def fail(*_: object) -> None:
        raise ZeroDivisionError("beside an update")

    monkeypatch.setattr(tasks, "finish", fail)
    model(batch(3)).square().sum().backward()
    optimizer.step()
    for call in (lambda: model(batch(4)), optimizer.synchronize, optimizer.state_dict):
        with pytest.raises(ZeroDivisionError, match="beside an update") as caught:
            call()
    first = tasks.stream_waits.schedule.forward_order[0]
    assert caught.value.__notes__ == [f"raised on the copy thread, in the update of bucket {first}"]
    with pytest.raises(ZeroDivisionError):
        optimizer.close()


def test_an_error_in_the_update_thread_surfaces_at_the_next_call_and_at_every_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(Plain)
    optimizer = make(OffloadAdam, model)
    losses(model, optimizer, 2)
    optimizer.synchronize()
    assert optimizer._core is not None
    updates = optimizer._core.tasks.updates

    def fail() -> None:
        raise ZeroDivisionError("inside the update")

    monkeypatch.setattr(updates[1], "prepare", running_first(updates[1].prepare, fail))
    model(batch(3)).square().sum().backward()
    optimizer.step()
    for call in (lambda: model(batch(4)), optimizer.synchronize, optimizer.state_dict):
        with pytest.raises(ZeroDivisionError, match="inside the update") as caught:
            call()
    frames = [frame.name for frame in caught.traceback]
    first = optimizer._core.stream_waits.schedule.forward_order[0]
    assert caught.value.__notes__ == [
        f"raised on the update thread, in the update of bucket {first}"
    ]
    assert "fail" in frames, "the traceback is that of the thread"
    with pytest.raises(ZeroDivisionError):
        optimizer.close()


@pytest.mark.parametrize("how", ["layers", "whole", "wrapped_layers", "wrapped_whole"])
def test_compiled_models_are_waited_for(how: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = expect(Plain)
    model = make_model(Plain)
    assert isinstance(model, Plain)
    called: Callable[[torch.Tensor], torch.Tensor] = model
    if how == "layers":
        for block in model.blocks:
            block.compile(backend="eager")
    elif how == "wrapped_layers":
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend="eager")  # type: ignore[assignment]
    elif how == "whole":
        model.compile(backend="eager")
    else:
        called = torch.compile(model, backend="eager")
    optimizer = make(Lazy, model)
    found = []
    for step in range(NUM_STEPS):
        loss = called(batch(step)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    optimizer.synchronize()
    assert (found, bits(model)) == expected
    if "whole" in how:
        assert "compiled as a whole" in caplog.text
