"""A state saved in the middle of a run: the rest of the run is the same to the bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam
from offload_adam.schedules import WarmUpLR
from tests.unit.adam.cases import RATES, Case, build, gradients, in_walking_order
from tests.unit.adam.test_properties import MODES

pytestmark = pytest.mark.filterwarnings("ignore:grad_centralization has no effect")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as it is after it was written and read without unpickling anything."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def take_steps(optimizer: Adam, case: Case, start: int, end: int) -> None:
    for step in range(start, end):
        optimizer(in_walking_order(optimizer, gradients(case, step)))


def assert_same_to_the_bit(one: Adam, other: Adam) -> None:
    for parameter, copy in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(parameter, copy)
        for key, value in one.state[parameter].items():
            assert torch.equal(value, other.state[copy][key])
    assert one.global_step == other.global_step
    assert one.get_lr() == other.get_lr()


def copy_weights(source: Adam, target: Adam) -> None:
    with torch.no_grad():
        for one, other in zip(source.parameters, target.parameters, strict=True):
            other.copy_(one)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_the_rest_of_the_run_is_the_same(
    mode: tuple[str, ...], dtype: torch.dtype, full: bool
) -> None:
    case = Case(
        dtype=dtype,
        rate="cosine",
        weight_decay=0.1,
        moving_decay=True,
        grouped=True,
        centralized=True,
        sparse="use_amsgrad" not in mode,
        options=mode,
    )
    whole, first, second = build(case), build(case), build(case)
    take_steps(whole, case, 0, 6)
    take_steps(first, case, 0, 3)
    saved = first.full_state_dict() if full else first.state_dict()
    copy_weights(first, second)
    second.load_state_dict(through_a_file(saved))
    assert second.global_step == 3
    take_steps(second, case, 3, 6)
    assert_same_to_the_bit(whole, second)


@pytest.mark.parametrize("rate", sorted(set(RATES) - {"callable"}))
def test_learning_rates_are_part_of_the_state(rate: str) -> None:
    """The loading optimizer was made with another rate, and goes on with the saved one."""
    case, other = Case(rate=rate), Case(rate="fixed" if rate != "fixed" else "warm_up")
    whole, first, second = build(case), build(case), build(other)
    take_steps(whole, case, 0, 6)
    take_steps(first, case, 0, 3)
    copy_weights(first, second)
    second.load_state_dict(through_a_file(first.state_dict()))
    take_steps(second, case, 3, 6)
    assert_same_to_the_bit(whole, second)
    assert second.dynamic_lr == (rate != "fixed")


def test_a_callable_of_the_user_is_kept_and_must_be_there() -> None:
    case = Case(rate="callable")
    whole, first, second = build(case), build(case), build(case)
    take_steps(whole, case, 0, 6)
    take_steps(first, case, 0, 3)
    saved = first.state_dict()
    copy_weights(first, second)
    second.load_state_dict(through_a_file(saved))
    take_steps(second, case, 3, 6)
    assert_same_to_the_bit(whole, second)
    for rate in ("fixed", "vector", "cosine"):
        target = build(Case(rate=rate))
        before = [parameter.detach().clone() for parameter in target.parameters]
        with pytest.raises(ValueError, match="saved lr was a callable of your own"):
            target.load_state_dict(saved)
        assert target.global_step == 0
        assert all(map(torch.equal, before, target.parameters))


class Halving:
    """A schedule with a state of its own."""

    def __init__(self) -> None:
        self.lr = 1.0

    def __call__(self, step: int) -> float:
        return self.lr

    def state_dict(self) -> dict[str, float]:
        return {"lr": self.lr}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.lr = state["lr"]


def test_a_callable_with_a_state_is_asked_for_it() -> None:
    saving, loading = Halving(), Halving()
    first = Adam([torch.nn.Parameter(torch.ones(3))], saving)
    saving.lr = 0.25
    second = Adam([torch.nn.Parameter(torch.ones(3))], loading)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert loading.lr == 0.25
    with pytest.raises(ValueError, match="no load_state_dict"):
        Adam([torch.nn.Parameter(torch.ones(3))], lambda step: 0.1).load_state_dict(
            first.state_dict()
        )


def test_a_state_of_torchs_adam_goes_on_as_torch_would() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    theirs = torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, foreach=False)
    ours = Adam([{"params": copies}], 0.5)
    for step in range(6):
        given = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in copies
        ]
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = gradient
        theirs.step()
        if step == 2:
            with torch.no_grad():
                for parameter, copy in zip(parameters, copies, strict=True):
                    copy.copy_(parameter)
            ours.load_state_dict(theirs.state_dict())
            assert ours.global_step == 3
        elif step > 2:
            ours(tuple(given))
            for parameter, copy in zip(parameters, copies, strict=True):
                assert torch.allclose(parameter, copy, rtol=1e-6, atol=1e-7)
    assert ours.get_lr() == 0.01


def test_a_decoupled_decay_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    theirs.step()
    ours = Adam([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="decoupled_weight_decay=True is not supported by Adam"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.global_step == 0


def test_both_optimizers_read_each_other() -> None:
    ours = Adam([torch.nn.Parameter(torch.ones(3))], 0.1)
    ours((torch.ones(3),))
    other = OffloadAdam([torch.nn.Parameter(torch.ones(3))])
    other.load_state_dict(ours.state_dict())
    back = Adam([torch.nn.Parameter(torch.ones(3))], WarmUpLR(0.1, 3))
    back.load_state_dict(other.state_dict())
    assert back.global_step == 1
    state = back.state[back.parameters[0]]
    assert torch.equal(state["exp_avg"], ours.state[ours.parameters[0]]["exp_avg"])
