"""Any mode, groups, schedule, gradients and dtype: the same as the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam import Adam
from tests.support.devices import HOST_AS_DEVICE
from tests.unit.adam.cases import (
    RATES,
    Case,
    build,
    build_reference,
    check,
    gradients,
    in_walking_order,
    to_reference,
)

NUM_STEPS = 5
MODES = [
    (),
    ("use_nesterov",),
    ("use_amsgrad",),
    ("use_lazy",),
    ("use_lazy", "use_nesterov"),
    ("use_offload",),
    ("use_offload", "use_nesterov"),
]

pytestmark = pytest.mark.filterwarnings("ignore:grad_centralization has no effect")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    options = draw(st.sampled_from(MODES))
    if draw(st.booleans()):
        options = (*options, "epsilon_hat")
    return Case(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        rate=draw(st.sampled_from(sorted(RATES))),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        moving_decay=draw(st.booleans()),
        grouped=draw(st.booleans()),
        centralized=draw(st.booleans()),
        sparse="use_amsgrad" not in options and draw(st.booleans()),
        loss_scale=draw(st.sampled_from([1.0, 8.0])),
        betas=draw(st.sampled_from([(0.9, 0.999), (0.5, 0.9)])),
        eps=draw(st.sampled_from([1e-8, 1e-2])),
        options=options,
        seed=draw(st.integers(0, 10_000)),
    )


def run(case: Case, kind: type[Adam]) -> None:
    optimizer, reference = build(case, kind), build_reference(case)
    amsgrad = "use_amsgrad" in case.options
    assert all(("max_exp_avg_sq" in optimizer.state[p]) == amsgrad for p in optimizer.parameters)
    for step in range(NUM_STEPS):
        given_now = gradients(case, step)
        assert bool(optimizer(in_walking_order(optimizer, given_now)))
        assert reference.update(to_reference(given_now))
        check(optimizer, reference, step + 1)
    assert optimizer.global_step == NUM_STEPS


@settings(max_examples=150)
@given(cases())
def test_every_case_follows_the_reference(case: Case) -> None:
    run(case, Adam)


class OnDevice(Adam):
    _backend = HOST_AS_DEVICE


@settings(max_examples=60)
@given(cases())
def test_state_on_a_device_follows_it_as_well(case: Case) -> None:
    run(case, OnDevice)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("epsilon_hat", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_mode_at_least_once(mode: tuple[str, ...], epsilon_hat: bool, sparse: bool) -> None:
    if sparse and "use_amsgrad" in mode:
        pytest.skip("amsgrad takes no sparse gradient")
    options = (*mode, "epsilon_hat") if epsilon_hat else mode
    for grouped in (False, True):
        case = Case(
            weight_decay=0.1,
            grouped=grouped,
            centralized=True,
            sparse=sparse,
            loss_scale=8.0,
            options=options,
            rate="cosine",
        )
        run(case, Adam)


def test_a_skipped_step_moves_neither_counter_nor_schedule() -> None:
    case = Case(rate="vector", weight_decay=0.1)
    optimizer, reference = build(case), build_reference(case)
    for step in range(6):
        given_now = gradients(case, step)
        if step in (1, 4):
            given_now[1] = torch.full((4,), float("inf") if step == 1 else float("nan"))
            assert bool(optimizer(tuple(given_now)))
            assert not reference.update(to_reference(given_now))
            assert optimizer.last_step is not None
            assert optimizer.last_step.skipped
            assert optimizer.last_step.non_finite == ("bias",)
        else:
            optimizer(tuple(given_now))
            assert reference.update(to_reference(given_now))
        check(optimizer, reference, step + 1)
    assert optimizer.global_step == 4


def test_lazy_with_dense_gradients_is_plain_adam() -> None:
    plain, lazy = (
        build(Case(weight_decay=0.1)),
        build(Case(weight_decay=0.1, options=("use_lazy",))),
    )
    for step in range(NUM_STEPS):
        for optimizer in (plain, lazy):
            optimizer(tuple(gradients(Case(), step)))
    for one, other in zip(plain.parameters, lazy.parameters, strict=True):
        assert torch.equal(one, other)
