"""`Adam` is a `torch.optim.Optimizer`: groups, hooks, closures, schedulers, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import Adam, OffloadAdam
from offload_adam.schedules import CosineDecayLR, WarmUpLR


def one(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((3,), value))


def test_step_uses_grad_and_leaves_it() -> None:
    called, stepped = one(), one()
    by_call, by_step = Adam([called], 0.1), Adam([stepped], 0.1)
    for scale in (1.0, -3.0, 0.5):
        gradient = torch.full((3,), scale)
        by_call((gradient,))
        stepped.grad = gradient.clone()
        assert by_step.step() is None
        assert torch.equal(stepped.grad, gradient)
        by_step.zero_grad()
        assert stepped.grad is None
        assert torch.equal(called, stepped)


def test_given_gradients_leave_grad_as_it_was() -> None:
    parameter = one()
    optimizer = Adam([parameter])
    before = torch.full((3,), 7.0)
    parameter.grad = before
    optimizer((torch.ones(3),))
    assert parameter.grad is before
    assert torch.equal(before, torch.full((3,), 7.0))
    with pytest.raises(ValueError, match="has shape"):
        optimizer((torch.ones(2),))
    assert parameter.grad is before


def test_no_gradient_is_given_as_none() -> None:
    first, second = one(), one()
    optimizer = Adam([first, second])
    optimizer((None, torch.ones(3)))
    assert torch.equal(first, torch.ones(3))
    assert not torch.equal(second, torch.ones(3))
    assert optimizer.global_step == 1
    optimizer((None, None))
    assert optimizer.global_step == 2


def test_closures_and_hooks_are_called() -> None:
    parameter = one()
    optimizer = Adam([parameter], 0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> float:
        calls.append("closure")
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    optimizer((torch.ones(3),))
    assert calls == ["pre", "closure", "post", "pre", "post"]


def test_torchs_schedulers_move_a_fixed_rate() -> None:
    optimizer = Adam([one()], 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for _ in range(3):
        rates.append(optimizer.get_lr())
        optimizer((torch.ones(3),))
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.05, 0.025])


def test_schedules_serve_both_optimizers() -> None:
    schedule = CosineDecayLR(0.0, 0.1, 4)
    with_adam, with_offload = one(), one()
    adam = Adam([with_adam], schedule)
    offload = OffloadAdam([with_offload], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(offload, schedule)
    for scale in (1.0, -2.0, 3.0):
        adam((torch.full((3,), scale),))
        with_offload.grad = torch.full((3,), scale)
        offload.step()
        scheduler.step()
        assert torch.equal(with_adam, with_offload)


def test_a_dynamic_rate_is_shown_as_last_used() -> None:
    optimizer = Adam([one()], WarmUpLR(0.4, 4), weight_decay=lambda step: step / 8, module=None)
    group = optimizer.param_groups[0]
    shown = []
    for _ in range(3):
        shown.append((group["lr"], optimizer.get_lr(), optimizer.get_weight_decay()))
        optimizer((torch.ones(3),))
    assert shown == [(0.0, 0.0, 0.0), (0.0, 0.1, 0.125), (0.1, 0.2, 0.25)]
    assert (optimizer.dynamic_lr, optimizer.dynamic_weight_decay) == (True, True)
    optimizer((torch.full((3,), float("nan")),))
    assert group["lr"] == 0.2
    assert optimizer.get_lr() == pytest.approx(0.3)


def test_what_groups_say_is_readable() -> None:
    first, second, third = one(), one(), one()
    optimizer = Adam(
        [
            {"params": [first], "lr": WarmUpLR(0.4, 4), "weight_decay": 0.5},
            {"params": [second, third], "grad_centralization": True},
            {"order_params": [third, first, second]},
        ],
        0.1,
        weight_decay=0.25,
    )
    assert [id(p) for p in optimizer.parameters] == [id(p) for p in (third, first, second)]
    assert optimizer.get_lr() == (0.1, 0.0, 0.1)
    assert optimizer.get_weight_decay() == (0.25, 0.5, 0.25)
    assert optimizer.get_lr_parameter(first) == 0.0
    assert optimizer.get_lr_parameter([second, first]) == [0.1, 0.0]
    assert (optimizer.is_group, optimizer.is_group_lr) == (True, True)
    assert optimizer.is_group_params_ordered
    assert (optimizer.dynamic_lr, optimizer.dynamic_weight_decay) == (True, False)
    plain = Adam([one()], 0.1)
    assert (plain.is_group, plain.is_group_lr, plain.is_group_params_ordered) == (False,) * 3
    assert (plain.get_lr(), plain.get_weight_decay(), plain.target) == (0.1, 0.0, "CPU")


def test_offload_reports_the_parameters_in_reverse() -> None:
    first, second = one(1.0), one(2.0)
    optimizer = Adam([first, second], 0.1, use_offload=True)
    assert [id(p) for p in optimizer.parameters] == [id(second), id(first)]
    optimizer((torch.full((3,), 1.0), None))
    assert torch.equal(first, torch.ones(3))
    assert not torch.equal(second, torch.full((3,), 2.0))
    ordered = Adam(
        [{"params": [p := one(), q := one()]}, {"order_params": [p, q]}], use_offload=True
    )
    assert [id(parameter) for parameter in ordered.parameters] == [id(p), id(q)]


@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("use_offload", [False, True])
def test_norm_layers_count_as_gamma_and_beta(decay_norms: bool, use_offload: bool) -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.RMSNorm(3)
    )
    optimizer = Adam(
        model.parameters(),
        0.1,
        weight_decay=0.5,
        module=model,
        decay_norms=decay_norms,
        use_offload=use_offload,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer(tuple(torch.zeros_like(p) for p in optimizer.parameters))
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        # With no gradient but the decay's, every weight that decays and is not 0 moves.
        moves = (name.startswith("0.") or decay_norms) and bool((old != 0).any())
        assert torch.equal(parameter, old) != moves, name


def test_a_group_is_added_later() -> None:
    optimizer = Adam([one()], [0.1, 0.2, 0.3])
    later = one()
    optimizer((torch.ones(3),))
    with pytest.raises(KeyError, match="betas"):
        optimizer.add_param_group({"params": [later], "betas": (0.9, 0.9)})
    with pytest.raises(ValueError, match="different lengths"):
        optimizer.add_param_group({"params": [later], "lr": [0.1]})
    optimizer.add_param_group({"params": [later], "weight_decay": 0.5})
    assert len(optimizer.parameters) == 2
    optimizer((torch.ones(3), torch.ones(3)))
    assert float(optimizer.state[later]["step"]) == 2.0
    assert optimizer.param_groups[1]["lr"] == 0.2


def test_steps_of_many_threads_are_one_after_the_other() -> None:
    parameter, alone = one(), one()
    optimizer, reference = Adam([parameter], 0.01, use_locking=True), Adam([alone], 0.01)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                optimizer((torch.ones(3),))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for _ in range(80):
        reference((torch.ones(3),))
    assert not errors
    assert optimizer.global_step == 80
    assert torch.equal(parameter, alone)


def test_clipping_and_loss_scale_go_together() -> None:
    options: dict[str, Any] = {"learning_rate": 0.1, "max_grad_norm": 1.0}
    scaled, plain = one(), one()
    with_scale = Adam([scaled], loss_scale=128.0, **options)
    without = Adam([plain], **options)
    for gradient in (torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.1, 0.2, 0.0])):
        with_scale((128.0 * gradient,))
        without((gradient,))
        assert with_scale.last_step is not None
        assert with_scale.last_step.total_norm == pytest.approx(gradient.norm().item())
        assert torch.allclose(scaled, plain, rtol=1e-6)
