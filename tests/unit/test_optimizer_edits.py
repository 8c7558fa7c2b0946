"""What is done to an optimizer after it was made is followed, or refused with nothing changed."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam
from offload_adam.memory.codes import values_of
from offload_adam.state.state_shard import shards_of


def parameter(value: float = 0.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((2,), value))


def made(optimizer_type: Any = OffloadAdam) -> Any:
    """Return an optimizer of two groups, with "a" and "b", and "c"; all have gradients."""
    optimizer = optimizer_type(
        [
            {"params": [("a", parameter(1.0)), ("b", parameter(2.0))]},
            {"params": [("c", parameter(3.0))]},
        ]
    )
    for member in members(optimizer):
        member.grad = torch.ones(2)
    return optimizer


def members(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [member for group in optimizer.param_groups for member in group["params"]]


def everything(parameters: list[torch.nn.Parameter], optimizer: OffloadAdam) -> list[Any]:
    parts = list(shards_of(optimizer._settled().states))
    held = [part.parameter for part in parts]
    state = [values_of(plane) for part in parts for plane in part.planes.values()]
    steps = [part.step for part in parts]
    return [tensor.tolist() for tensor in (*parameters, *held, *state, *steps)]


def refuse(
    optimizer: OffloadAdam, edit: Callable[[], object], error: type[Exception], words: str
) -> None:
    """Edit, and expect that the next step names it and changes nothing."""
    parameters = members(optimizer)
    before = everything(parameters, optimizer)
    edit()
    for use in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(error, match=words):
            use()
    assert everything(parameters, optimizer) == before


@pytest.mark.parametrize("optimizer_type", [OffloadAdam, Adam])
@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("lr", math.nan, ValueError, "lr must be finite and at least 0, not nan"),
        ("lr", -1.0, ValueError, "lr must be finite and at least 0, not -1.0"),
        ("lr", torch.tensor(math.inf), ValueError, "lr must be finite"),
        ("lr", "x", TypeError, "lr must be a number, not 'x'"),
        ("eps", -1.0, ValueError, "eps must be"),
        ("weight_decay", -0.1, ValueError, "weight_decay must be"),
        ("betas", (1.0, 0.9), ValueError, r"betas\[0\] must lie in \[0, 1\), not 1.0"),
        ("betas", (0.9, 2.0), ValueError, r"betas\[1\] must lie"),
        ("betas", 0.9, ValueError, "betas must be two numbers"),
        ("maximize", "no", TypeError, "maximize must be a bool, not 'no'"),
        ("epsilon_hat", 1, TypeError, "epsilon_hat must be a bool, not 1"),
    ],
)
def test_a_hyperparameter_that_cannot_be_is_refused_at_the_step(
    optimizer_type: Any, key: str, value: Any, error: type[Exception], words: str
) -> None:
    optimizer = made(optimizer_type)
    good = optimizer.param_groups[1].get(key)
    edit = lambda: optimizer.param_groups[1].update({key: value})  # noqa: E731
    refuse(optimizer, edit, error, r"param_groups\[1\]: " + words)
    optimizer.param_groups[1][key] = False if good is None else good
    optimizer.step()
    assert optimizer.last_step.num_updated == 3


def test_a_tensor_that_is_changed_in_place_is_checked_again() -> None:
    member = parameter()
    optimizer = OffloadAdam([member], lr=torch.tensor(0.1))
    member.grad = torch.ones(2)
    optimizer.step()
    refuse(optimizer, lambda: optimizer.param_groups[0]["lr"].neg_(), ValueError, "lr must be")


def test_a_hyperparameter_that_is_missing_is_named() -> None:
    optimizer = made()
    edit = lambda: optimizer.param_groups[1].pop("eps")  # noqa: E731
    refuse(optimizer, edit, ValueError, r"param_groups\[1\] has lost its key 'eps'")


@pytest.mark.parametrize("bad", [-1.0, 0, math.nan, "1", True])
def test_max_grad_norm_is_checked_when_it_is_set(bad: Any) -> None:
    member = parameter()
    optimizer = OffloadAdam([member], max_grad_norm=2.0)
    with pytest.raises((TypeError, ValueError), match="max_grad_norm must be"):
        optimizer.max_grad_norm = bad
    assert optimizer.max_grad_norm == 2.0
    optimizer.max_grad_norm = 1
    member.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.clip_factor == pytest.approx(0.2, rel=1e-6)
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.last_step.clip_factor == 1.0


def test_parameters_that_come_or_go_are_refused_by_name() -> None:
    def edited(edit: Callable[[list[dict[str, Any]]], object], words: str) -> None:
        optimizer = made()
        refuse(optimizer, lambda: edit(optimizer.param_groups), ValueError, words)

    other = parameter()
    edited(
        lambda groups: groups[0]["params"].append(other),
        r"\['params'\]\[2\] was added after .* add_param_group\(\)",
    )
    edited(lambda groups: groups[0]["params"].pop(), "'b' was removed from param_groups.0.")
    edited(
        # An equal scalar in its place is another parameter all the same.
        lambda groups: groups[1].update(
            params=[torch.nn.Parameter(groups[1]["params"][0].clone())]
        ),
        r"param_groups\[1\]\['params'\]\[0\] was added after",
    )
    edited(
        lambda groups: groups[1]["params"].append(groups[0]["params"].pop(0)),
        r"'a' was moved from param_groups\[0\] to param_groups\[1\]\['params'\]\[1\]",
    )
    edited(lambda groups: groups[1].pop("params"), r"param_groups\[1\] has lost its key 'params'")
    edited(lambda groups: groups.pop(), "There are 1 parameter groups, .* state for 2")
    edited(lambda groups: groups.append({**groups[0], "params": [other]}), "add_param_group")
    edited(lambda groups: groups.reverse(), "'c' was moved from")


def test_an_equal_scalar_is_another_parameter() -> None:
    scalar = torch.nn.Parameter(torch.ones(()))
    optimizer = OffloadAdam([("s", scalar)])
    scalar.grad = torch.ones(())
    same = torch.nn.Parameter(torch.ones(()))
    edit = lambda: optimizer.param_groups[0].update(params=[same])  # noqa: E731
    refuse(optimizer, edit, ValueError, "was added after the optimizer was constructed")


def test_an_edit_is_refused_before_a_further_group_is_taken_in() -> None:
    optimizer = made()
    optimizer.param_groups[0]["params"].append(parameter())
    with pytest.raises(ValueError, match="was added after"):
        optimizer.add_param_group({"params": [("d", parameter())]})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [("d", parameter())]})
    optimizer.step()
    assert optimizer.last_step.num_updated == 3


def test_memory_that_runs_out_for_a_further_group_leaves_the_optimizer_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer, reference = made(), made()

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for a slot")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._alive().transfer, "allocate", run_out)
        with pytest.raises(torch.OutOfMemoryError, match="no memory for a slot"):
            optimizer.add_param_group({"params": [("d", parameter())]})
    assert len(optimizer.param_groups) == 2
    for _ in range(2):
        optimizer.step()
        reference.step()
    assert optimizer.last_step.num_updated == 3
    assert everything(members(optimizer), optimizer) == everything(members(reference), reference)
    optimizer.add_param_group({"params": [("d", parameter())]})
    members(optimizer)[-1].grad = torch.ones(2)
    optimizer.step()
    assert optimizer.last_step.num_updated == 4


def test_a_parameter_of_a_later_group_is_named_by_its_own_group() -> None:
    first, second = parameter(), parameter()
    optimizer = OffloadAdam([first])
    optimizer.add_param_group({"params": [second]})
    (first.sum() + second.sum() * math.nan).backward()
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.non_finite == ("param_groups[1]['params'][0]",)


def test_another_order_of_a_group_is_no_edit() -> None:
    optimizer, reference = made(), made()
    for _ in range(2):
        optimizer.param_groups[0]["params"].reverse()
        optimizer.step()
        reference.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == members(reference)[0].tolist()


@pytest.mark.parametrize(
    ("optimizer_type", "key"), [(OffloadAdam, "amsgrad"), (Adam, "grad_centralization")]
)
def test_options_that_lay_out_the_state_stay(optimizer_type: Any, key: str) -> None:
    optimizer = made(optimizer_type)
    edit = lambda: optimizer.param_groups[1].update({key: True})  # noqa: E731
    words = rf"param_groups\[1\]\['{key}'\] was changed to True, .* {key}=True"
    refuse(optimizer, edit, ValueError, words)


def test_a_loaded_centralization_must_be_the_same() -> None:
    optimizer = made(Adam)
    saved = optimizer.full_state_dict()
    saved["param_groups"][1]["grad_centralization"] = True
    with pytest.raises(ValueError, match="Group 1 was saved with grad_centralization=True"):
        optimizer.load_state_dict(saved)
    optimizer.step()


def test_state_that_is_replaced_is_refused() -> None:
    def replaced(edit: Callable[[Any], object]) -> None:
        optimizer = made()
        parts = list(shards_of(optimizer._settled().states))
        planes = [values_of(plane) for part in parts for plane in part.planes.values()]
        tensors = [*(t for part in parts for t in (part.parameter, part.step)), *planes]
        before = [tensor.tolist() for tensor in tensors]
        edit(optimizer)
        with pytest.raises(
            ValueError, match=r"optimizer.state was replaced .* load_state_dict\(\)"
        ):
            optimizer.step()
        with pytest.raises(ValueError, match=r"optimizer\.state was replaced"):
            optimizer.state_dict()
        assert [tensor.tolist() for tensor in tensors] == before

    replaced(lambda optimizer: setattr(optimizer, "state", defaultdict(dict)))
    replaced(lambda optimizer: optimizer.state.clear())
    replaced(lambda optimizer: optimizer.state.pop(members(optimizer)[0]))


@pytest.mark.parametrize("optimizer_type", [OffloadAdam, Adam])
@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, pickle.dumps, lambda made: torch.save(made, io.BytesIO())]
)
def test_an_optimizer_is_not_copied(optimizer_type: Any, how: Callable[[Any], object]) -> None:
    optimizer = made(optimizer_type)
    with pytest.raises(
        TypeError, match=r"full_state_dict\(\).* local_state_dict\(\).*save_checkpoint"
    ):
        how(optimizer)
    optimizer.step()
    assert optimizer.last_step.num_updated == 3


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.ConstantLR(optimizer),
                torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            ],
            [1],
        ),
    ],
)
def test_schedulers_save_their_state_all_the_same(schedule: Callable[[Any], Any]) -> None:
    optimizer = made()
    scheduler = schedule(optimizer)
    optimizer.step()
    scheduler.step(*([1.0] if hasattr(scheduler, "patience") else []))
    saved = pickle.loads(pickle.dumps(scheduler.state_dict()))
    schedule(made()).load_state_dict(saved)
    assert copy.deepcopy(optimizer.state_dict())["param_groups"] == saved_groups(optimizer)


def saved_groups(optimizer: OffloadAdam) -> Any:
    return optimizer.state_dict()["param_groups"]


def test_settings_are_told_by_the_group_that_they_are_of() -> None:
    """What ranks that differ tell each other; `Adam` steps with two of these a group."""
    for optimizer_type in (OffloadAdam, Adam):
        optimizer = made(optimizer_type)
        optimizer.param_groups[1]["lr"] = 0.25
        fields = optimizer._step_inputs().fields()
        assert {field for field, value in fields if value == "0.25"} == {"lr of group 1"}
