"""Gradients that leave during backward: accumulation, checkpoints, errors, late gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from offload_adam import OffloadAdam, OffloadPolicy
from offload_adam.gradients.stand_in import StandIn
from tests.support.scenario import Offloading


class Blocks(torch.nn.Module):
    """A few layers, optionally run under reentrant checkpoints, with one layer shared by all."""

    def __init__(self, *, checkpointed: bool = False, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))
        self.shared = torch.nn.Linear(6, 6) if shared else None
        self.checkpointed = checkpointed

    def block(self, layer: torch.nn.Module, data: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = layer(data)
        return torch.tanh(result if self.shared is None else self.shared(result))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.checkpointed:
                data = checkpoint(self.block, layer, data, use_reentrant=True)
            else:
                data = self.block(layer, data)
        return data


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 6, generator=generator).requires_grad_()


def train_reference(model: torch.nn.Module, batches: list[list[int]]) -> list[torch.Tensor]:
    """Train a float64 copy with torch's Adam; each step sums over its batches."""
    reference = copy.deepcopy(model).double()
    if isinstance(reference, Blocks):
        reference.checkpointed = False
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    for members in batches:
        for member in members:
            reference(batch(member).double()).square().sum().backward()
        oracle.step()
        oracle.zero_grad()
    return [parameter.detach() for parameter in reference.parameters()]


def assert_close(model: torch.nn.Module, expected: list[torch.Tensor]) -> None:
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        assert (parameter - reference).abs().max() < 2e-6


@pytest.mark.parametrize("maker", [OffloadAdam, Offloading])
def test_gradients_leave_during_backward_and_the_result_is_torchs(
    maker: type[OffloadAdam],
) -> None:
    model = Blocks()
    expected = train_reference(model, [[0], [1], [2]])
    optimizer = maker(
        model.parameters(), lr=1e-2, module=model, offload=OffloadPolicy(bucket_nbytes=600)
    )
    for step in range(3):
        model(batch(step)).square().sum().backward()
        assert all(type(parameter.grad) is StandIn for parameter in model.parameters())
        optimizer.step()
    optimizer.synchronize()
    assert_close(model, expected)


def test_no_sync_keeps_gradients_in_grad_until_the_last_backward() -> None:
    model = Blocks()
    expected = train_reference(model, [[0, 1, 2], [3, 4, 5]])
    optimizer = OffloadAdam(
        model.parameters(), lr=1e-2, module=model, offload=OffloadPolicy(bucket_nbytes=600)
    )
    for first in (0, 3):
        with optimizer.no_sync():
            model(batch(first)).square().sum().backward()
            with optimizer.no_sync():
                model(batch(first + 1)).square().sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
        model(batch(first + 2)).square().sum().backward()
        optimizer.step()
    assert_close(model, expected)


def test_a_backward_inside_no_sync_alone_is_enough_for_a_step() -> None:
    model = Blocks()
    expected = train_reference(model, [[0], [1]])
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    for step in range(2):
        with optimizer.no_sync():
            model(batch(step)).square().sum().backward()
        optimizer.step()
        assert all(type(parameter.grad) is StandIn for parameter in model.parameters())
    assert_close(model, expected)


def test_a_second_backward_with_accumulate_error_names_both_ways() -> None:
    model = Blocks()
    expected = train_reference(model, [[2]])
    optimizer = OffloadAdam(model.named_parameters(), lr=1e-2, module=model, accumulate="error")
    model(batch(0)).square().sum().backward()
    with pytest.raises(ValueError, match=r"'layers.3.*no_sync\(\).*accumulate='auto'"):
        model(batch(1)).square().sum().backward()
    optimizer.zero_grad()
    model(batch(2)).square().sum().backward()
    optimizer.step()
    assert_close(model, expected)


@pytest.mark.parametrize("maker", [OffloadAdam, Offloading])
def test_accumulate_on_host_adds_in_fp32(maker: type[OffloadAdam]) -> None:
    parameter = torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    model = torch.nn.ParameterList([parameter, other])
    optimizer = maker(model.parameters(), module=model, accumulate="host", betas=(0.5, 0.5))
    for _ in range(2):
        # 256 + 1 + 1 is 256 in bfloat16, and 258 only in fp32.
        for value in (256.0, 1.0, 1.0):
            (parameter.sum() * value).backward()
        (other.sum() * 3.0).backward()
        optimizer.step()
    # b1 = 0.5: after two steps of the same gradient exp_avg is 3/4 of it.
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full((300,), 258 * 0.75))
    assert torch.equal(optimizer.state[other]["exp_avg"], torch.full((3,), 3 * 0.75))


def test_accumulate_on_host_trains_like_torch() -> None:
    model = Blocks()
    expected = train_reference(model, [[0, 1], [2, 3, 4]])
    optimizer = OffloadAdam(
        model.parameters(),
        lr=1e-2,
        module=model,
        accumulate="host",
        offload=OffloadPolicy(bucket_nbytes=600),
    )
    for members in ([0, 1], [2, 3, 4]):
        for member in members:
            model(batch(member)).square().sum().backward()
        optimizer.step()
    assert_close(model, expected)


def test_reentrant_checkpoints_are_settled_at_the_outermost_end() -> None:
    model = Blocks(checkpointed=True)
    expected = train_reference(model, [[0], [1], [2]])
    optimizer = OffloadAdam(
        model.parameters(), lr=1e-2, module=model, offload=OffloadPolicy(bucket_nbytes=600)
    )
    for step in range(3):
        model(batch(step)).square().sum().backward()
        optimizer.step()
    assert_close(model, expected)


def test_a_parameter_shared_across_reentrant_checkpoints_is_never_silently_wrong() -> None:
    model = Blocks(checkpointed=True, shared=True)
    expected = train_reference(model, [[0], [1]])
    optimizer = OffloadAdam(
        model.named_parameters(), lr=1e-2, module=model, offload=OffloadPolicy(bucket_nbytes=100)
    )
    try:
        model(batch(0)).square().sum().backward()
    except ValueError as error:
        assert "'shared." in str(error)  # noqa: PT017
    else:
        optimizer.step()
        model(batch(1)).square().sum().backward()
        optimizer.step()
        assert_close(model, expected)


def test_a_backward_that_raised_leaves_nothing_behind() -> None:
    model = Blocks()
    expected = train_reference(model, [[1]])
    optimizer = OffloadAdam(
        model.parameters(), lr=1e-2, module=model, offload=OffloadPolicy(bucket_nbytes=100)
    )

    def fail(gradient: torch.Tensor) -> None:
        raise KeyError("in the middle of backward")

    handle = model.get_parameter("layers.1.weight").register_hook(fail)
    with pytest.raises(KeyError):
        model(batch(0)).square().sum().backward()
    handle.remove()
    optimizer.zero_grad()
    model(batch(1)).square().sum().backward()
    optimizer.step()
    assert_close(model, expected)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = Blocks()
    unused = torch.nn.Parameter(torch.ones(4))
    model.register_parameter("unused", unused)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    model(batch(0)).square().sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(4))
    assert optimizer.state[unused]["step"] == 0
    assert optimizer.last_step is not None
    assert optimizer.last_step.num_updated == 8


def test_gradients_set_by_hand_after_the_backward_count() -> None:
    model = Blocks()
    late = torch.nn.Parameter(torch.zeros(4))
    model.register_parameter("late", late)
    for maker, accumulate in ((OffloadAdam, None), (Offloading, None), (OffloadAdam, "host")):
        with torch.no_grad():
            late.zero_()
        optimizer = maker(model.parameters(), lr=1e-2, module=model, accumulate=accumulate)
        model(batch(0)).square().sum().backward()
        late.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
        optimizer.step()
        assert torch.allclose(late.detach(), torch.tensor([-1.0, 1.0, -1.0, 1.0]) * 1e-2)
        assert optimizer.state[model.get_parameter("layers.0.weight")]["step"] == 1
        optimizer.close()


def test_a_grad_on_a_parameter_whose_gradient_has_left_is_refused() -> None:
    model = Blocks()
    optimizer = OffloadAdam(model.named_parameters(), module=model)
    model(batch(0)).square().sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.get_parameter("layers.2.bias").grad = torch.ones(6)
    with pytest.raises(ValueError, match=r"'layers.2.bias' has a .grad at step\(\)"):
        optimizer.step()
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)


def test_zero_grad_drops_gradients_that_have_left() -> None:
    model = Blocks()
    expected = train_reference(model, [[1]])
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    model(batch(0)).square().sum().backward()
    optimizer.zero_grad()
    model(batch(1)).square().sum().backward()
    optimizer.step()
    assert_close(model, expected)


def test_clip_grad_norm_sees_gradients_that_have_left() -> None:
    model = Blocks()
    reference = copy.deepcopy(model).double()
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    for step in range(3):
        reference(batch(step).double()).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        oracle.step()
        oracle.zero_grad()
        model(batch(step)).square().sum().backward()
        norm = optimizer.clip_grad_norm_(0.3)
        # The gradients themselves are fp32 in one model and fp64 in the other.
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        optimizer.step()
    assert_close(model, [parameter.detach() for parameter in reference.parameters()])


def test_parameters_of_a_new_group_stream_too() -> None:
    model = Blocks()
    expected = train_reference(model, [[0], [1]])
    members = list(model.parameters())
    optimizer = OffloadAdam(members[:4], lr=1e-2, module=model)
    optimizer.add_param_group({"params": members[4:]})
    for step in range(2):
        model(batch(step)).square().sum().backward()
        assert all(type(parameter.grad) is StandIn for parameter in members)
        optimizer.step()
    assert_close(model, expected)


def test_close_takes_the_hooks_off() -> None:
    model = Blocks()
    optimizer = OffloadAdam(model.parameters(), module=model)
    optimizer.close()
    optimizer.close()
    model(batch(0)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="has been closed"):
        optimizer.step()


def many_small() -> torch.nn.ParameterList:
    torch.manual_seed(0)
    return torch.nn.ParameterList(torch.nn.Parameter(torch.randn(3)) for _ in range(200))


def backward_of(parameters: torch.nn.ParameterList, used: Iterable[int], factor: float) -> None:
    torch.stack([(parameters[i].square() * (factor + i)).sum() for i in used]).sum().backward()


@pytest.mark.parametrize("accumulate", [None, "host"])
@pytest.mark.parametrize("used", [range(200), range(3, 200, 7), range(199, -1, -2), range(20, 31)])
def test_a_bucket_of_many_small_parameters_streams_whatever_is_used(
    used: range, accumulate: str | None
) -> None:
    model = many_small()
    reference = copy.deepcopy(model).double()
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model, accumulate=accumulate)
    for step in range(3):
        with optimizer.no_sync():
            backward_of(model, range(0, 200, 3), 0.5)
        backward_of(model, used, 1.0 + step)
        if accumulate == "host":
            backward_of(model, range(200), 2.0)
        elif len(used) == 200:
            assert all(type(parameter.grad) is StandIn for parameter in model)
        optimizer.step()
        for number, parameter in enumerate(model):
            had_gradient = accumulate == "host" or number % 3 == 0 or number in used
            assert type(parameter.grad) is (StandIn if had_gradient else type(None))
        for members, factor in ((range(0, 200, 3), 0.5), (used, 1.0 + step)):
            backward_of(reference, members, factor)
        if accumulate == "host":
            backward_of(reference, range(200), 2.0)
        oracle.step()
        oracle.zero_grad()
    for parameter, expected in zip(model, reference, strict=True):
        assert optimizer.state[parameter]["step"] == oracle.state[expected].get("step", 0)
    assert_close(model, [parameter.detach() for parameter in reference])


def test_arrivals_inside_no_sync_do_not_count_for_the_next_backward() -> None:
    model = many_small()
    reference = copy.deepcopy(model).double()
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    # Backward brings first what was used last: here the parameters whose hooks deliver, so that
    # the bucket would seem complete before most of its gradients are there.
    order = sorted(range(200), key=lambda i: (199 - i) % 16 == 0 or i == 0)
    with optimizer.no_sync():
        backward_of(model, order, 0.5)
    backward_of(model, order, 1.0)
    optimizer.step()
    for factor in (0.5, 1.0):
        backward_of(reference, order, factor)
    oracle.step()
    assert_close(model, [parameter.detach() for parameter in reference])


def test_arrivals_that_no_hook_delivered_do_not_count_for_the_next_backward() -> None:
    """Of a bucket of many parameters most hooks only note an arrival for a later one."""

    def make() -> torch.nn.ParameterList:
        return torch.nn.ParameterList(torch.nn.Parameter(torch.full((3,), 1.0)) for _ in range(100))

    def train(model: torch.nn.ParameterList, optimizer: torch.optim.Optimizer, noted: int) -> None:
        (model[noted] * 2.0).sum().backward()
        optimizer.step()
        for parameter in model:  # as in a loop that never calls zero_grad()
            if optimizer.__class__ is torch.optim.Adam:
                parameter.grad = None
        # What is used first in the forward gets its gradient last.
        members = [model[noted], *(p for index, p in enumerate(model) if index != noted)]
        loss = torch.zeros(())
        for parameter in members:
            loss = loss + (parameter * parameter).sum()
        loss.backward()
        optimizer.step()

    model, expected = make(), make()
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    core = optimizer._alive()
    parameters = core.states[0].parameters
    assert len(parameters) == 100
    noted = next(i for i, given in enumerate(model) if given is parameters[1])
    train(model, optimizer, noted)
    train(expected, torch.optim.Adam(expected.parameters(), lr=1e-2), noted)
    for parameter, other in zip(model, expected, strict=True):
        torch.testing.assert_close(parameter, other, rtol=0.0, atol=1e-6)
    optimizer.close()


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(10, 4)
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.embedding(rows))
        return result.square().mean()


@pytest.mark.parametrize("kind", [OffloadAdam, Offloading])
def test_gradients_of_a_bucket_that_could_not_be_read_are_forgotten(
    kind: type[OffloadAdam],
) -> None:
    rows = torch.tensor([1, 2, 3])
    states = []
    for fails_before in (False, True):
        model = Embedded()
        optimizer = kind(model.parameters(), lr=1e-2, module=model)
        if fails_before:
            model.embedding.sparse = True
            with pytest.raises(ValueError, match="support only dense gradients"):
                model(rows).backward()
            model.embedding.sparse = False
            optimizer.zero_grad()
        model(rows).backward()
        optimizer.step()
        states.append([optimizer.state[p]["exp_avg"].clone() for p in model.parameters()])
        optimizer.close()
    for clean, repeated in zip(*states, strict=True):
        assert torch.equal(clean, repeated)


def test_a_step_without_gradients_whose_copy_has_failed_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(8)])
    offload = OffloadPolicy(bucket_nbytes=1100, pin="staging")
    optimizer = Offloading(model.parameters(), module=model, offload=offload, accumulate="host")
    transfer = optimizer._alive().transfer
    finish = transfer.finish_copy

    def fail(gradient_copy: object) -> None:
        monkeypatch.setattr(transfer, "finish_copy", finish)
        raise OSError("injected")

    monkeypatch.setattr(transfer, "finish_copy", fail)
    with pytest.raises(OSError, match="injected"):  # noqa: PT012 (either of them finishes copies)
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"are missing.*Call zero_grad\(\)"):
            optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(2, 16)).sum().backward()
    expected = torch.stack([g.norm() for g in gradients_of(model, torch.ones(2, 16))]).norm()
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.total_norm == pytest.approx(float(expected), rel=1e-5)
    optimizer.close()


def gradients_of(model: torch.nn.Module, data: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(model(data).sum(), list(model.parameters()))
