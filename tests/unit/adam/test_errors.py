"""Wrong arguments of `Adam`: type of the error, argument in its message, nothing modified."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload_adam import Adam
from offload_adam.schedules import CosineDecayLR

INF, NAN = math.inf, math.nan


def one() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


ARGUMENTS: list[tuple[str, Any, type[Exception]]] = [
    ("params", None, ValueError),
    ("params", [], ValueError),
    ("params", (), ValueError),
    ("params", 3, TypeError),
    ("params", "weights", TypeError),
    ("params", {one()}, TypeError),
    ("params", one(), TypeError),
    ("params", [1, 2], TypeError),
    ("params", [torch.ones(3)], TypeError),
    ("params", [one(), "name"], TypeError),
    ("params", [one(), {"params": [one()]}], TypeError),
    ("params", [{"params": [one()]}, one()], TypeError),
    ("params", [("a", one()), one()], TypeError),
    ("params", [{"lr": 0.1}], KeyError),
    ("params", [{"params": [one()], "momentum": 0.9}], KeyError),
    ("params", [{"params": []}], ValueError),
    ("params", [{"params": None}], ValueError),
    ("params", [{"params": [one(), 3]}], TypeError),
    ("params", [{"params": one()}], TypeError),
    ("grad_centralization", [{"params": [one()], "grad_centralization": 1}], TypeError),
    ("lr", [{"params": [one()], "lr": True}], TypeError),
    ("lr", [{"params": [one()], "lr": -0.1}], ValueError),
    ("weight_decay", [{"params": [one()], "weight_decay": "much"}], TypeError),
    ("weight_decay", [{"params": [one()], "weight_decay": -0.1}], ValueError),
    ("different lengths", [{"params": [one()], "lr": v} for v in ([0.1], [0.1, 0.2])], ValueError),
    ("order_params", [{"params": [one()]}, {"order_params": 3}], TypeError),
    ("order_params", [{"params": [one()]}, {"order_params": []}], ValueError),
    ("order_params", [{"params": [one()]}, {"order_params": [one()]}], ValueError),
    ("learning_rate", True, TypeError),
    ("learning_rate", None, TypeError),
    ("learning_rate", "fast", TypeError),
    ("learning_rate", {0.1}, TypeError),
    ("learning_rate", {0: 0.1}, TypeError),
    ("learning_rate", 1j, TypeError),
    ("learning_rate", [0.1, "x"], TypeError),
    ("learning_rate", [0.1, True], TypeError),
    ("learning_rate", -0.1, ValueError),
    ("learning_rate", NAN, ValueError),
    ("learning_rate", np.float32(INF), ValueError),
    ("learning_rate", Fraction(10**400), ValueError),
    ("learning_rate", 10**400, ValueError),
    ("learning_rate", -(10**400), ValueError),
    ("learning_rate", np.array("fast"), TypeError),
    ("learning_rate", np.array(True), TypeError),
    ("learning_rate", np.array(-0.1), ValueError),
    ("learning_rate", INF, ValueError),
    ("learning_rate", [], ValueError),
    ("learning_rate", [0.1, -0.1], ValueError),
    ("learning_rate", torch.ones(2, 2), ValueError),
    ("learning_rate", torch.tensor(-0.1), ValueError),
    ("learning_rate", torch.tensor([0.1, -0.1]), ValueError),
    ("learning_rate", torch.tensor(True), TypeError),
    ("learning_rate", lambda step: "fast", TypeError),
    ("learning_rate", lambda step: -1.0, ValueError),
    *[(name, v, TypeError) for name in ("beta1", "beta2") for v in (1, 0, True, "x", None)],
    *[(name, v, ValueError) for name in ("beta1", "beta2") for v in (0.0, 1.0, -0.1, 1.5, NAN)],
    *[("eps", value, TypeError) for value in (1, True, "x", None)],
    *[("eps", value, ValueError) for value in (0.0, -1e-8, INF, NAN)],
    *[
        (name, value, TypeError)
        for name in (
            "use_locking",
            "use_nesterov",
            "use_amsgrad",
            "use_lazy",
            "use_offload",
            "epsilon_hat",
            "decay_norms",
        )
        for value in (0, 1, None, "yes", 1.0)
    ],
    *[("weight_decay", value, TypeError) for value in (True, "x", None, [0.1])],
    *[("weight_decay", value, ValueError) for value in (-0.1, NAN, INF, 10**400)],
    *[("loss_scale", value, TypeError) for value in (True, "x", None)],
    *[("loss_scale", value, ValueError) for value in (0.0, -1.0, 0, INF, NAN, 10**400)],
    ("momentum", 0.9, KeyError),
]


@pytest.mark.parametrize(("name", "value", "error"), ARGUMENTS, ids=lambda value: repr(value)[:40])
def test_a_wrong_argument_is_named_and_nothing_is_touched(
    name: str, value: Any, error: type[Exception]
) -> None:
    parameter = one()
    address = parameter.data_ptr()
    is_params = isinstance(value, (list, tuple)) and any(isinstance(v, dict) for v in value)
    in_params = name == "params" or (is_params and name != "learning_rate")
    arguments = {"params": value} if in_params else {"params": [parameter], name: value}
    with pytest.raises(error) as caught:
        Adam(**arguments)
    assert caught.type is error
    assert name in str(caught.value)
    assert parameter.data_ptr() == address
    Adam([parameter])  # what failed can be done right


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", "It is called learning_rate here. For the arguments of torch.optim.Adam, use Offl"),
        ("betas", "It is called beta1 and beta2 here"),
        ("amsgrad", "It is called use_amsgrad here"),
        ("fused", "Besides .* only accepts use_lazy and use_offload. For .* use OffloadAdam"),
    ],
)
def test_an_argument_of_torchs_adam_is_translated(name: str, words: str) -> None:
    options: dict[str, Any] = {name: 0.1}
    with pytest.raises(KeyError, match=f"Adam has no argument '{name}'. {words}"):
        Adam([one()], **options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"use_lazy": True, "use_offload": True}, ("use_lazy", "use_offload")),
        ({"use_lazy": True, "use_amsgrad": True}, ("use_lazy", "use_amsgrad")),
        ({"use_offload": True, "use_amsgrad": True}, ("use_offload", "use_amsgrad")),
        ({"use_nesterov": True, "use_amsgrad": True}, ("use_nesterov", "use_amsgrad")),
    ],
)
def test_arguments_that_exclude_each_other(options: dict[str, Any], names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="exclude") as caught:
        Adam([one()], **options)
    assert all(name in str(caught.value) for name in names)


def test_nesterov_is_ignored_with_amsgrad_as_observed() -> None:
    with pytest.warns(UserWarning, match="use_nesterov has no effect"):
        both = Adam([one()], use_nesterov=True, use_amsgrad=True, epsilon_hat=True)
    alone = Adam([one()], use_amsgrad=True, epsilon_hat=True)
    for optimizer in (both, alone):
        for scale in (1.0, -2.0):
            optimizer((torch.full((3,), scale),))
    assert torch.equal(both.parameters[0], alone.parameters[0])


def test_a_parameter_that_stands_twice() -> None:
    parameter = one()
    for params in (
        [{"params": [parameter]}, {"params": [parameter]}],
        [{"params": [parameter, parameter]}],
    ):
        with pytest.raises(RuntimeError, match="also in"):
            Adam(params)
    optimizer = Adam([{"params": [parameter]}])
    with pytest.raises(RuntimeError, match="also in"):
        optimizer.add_param_group({"params": [parameter]})
    assert len(optimizer.param_groups) == 1


ACCEPTED: list[tuple[str, Callable[[], Any]]] = [
    ("learning_rate", lambda: 0),
    ("learning_rate", lambda: 1),
    ("learning_rate", lambda: 0.1),
    ("learning_rate", lambda: np.float32(0.1)),
    ("learning_rate", lambda: torch.tensor(0.1)),
    ("learning_rate", lambda: torch.tensor([0.1, 0.2])),
    ("learning_rate", lambda: np.array([0.1, 0.2])),
    ("learning_rate", lambda: np.array(0.1)),
    ("learning_rate", lambda: [0.1, 1]),
    ("learning_rate", lambda: (v for v in (0.1, 0.2))),
    ("learning_rate", lambda: range(3)),
    ("learning_rate", lambda: CosineDecayLR(0.0, 0.1, 5)),
    ("learning_rate", lambda: lambda step: 0.1 / (step + 1)),
    ("learning_rate", lambda: lambda step: torch.tensor(0.1)),
    ("weight_decay", lambda: 1),
    ("weight_decay", lambda: lambda step: 0.1),
    ("loss_scale", lambda: 1024),
    ("params", lambda: (p for p in [one()])),
    ("params", lambda: (one(),)),
    ("params", lambda: [("layer.weight", one())]),
    ("params", lambda: [{"params": [("layer.weight", one())]}]),
    ("params", lambda: [{"params": (p for p in [one()]), "lr": 0.5}]),
    ("params", lambda: nn.Linear(3, 2).named_parameters()),
]


@pytest.mark.filterwarnings("ignore:weight_decay acts")
@pytest.mark.parametrize(("name", "make"), ACCEPTED)
def test_what_is_allowed_is_accepted(name: str, make: Callable[[], Any]) -> None:
    optimizer = Adam(**{"params": [one()], name: make()})
    assert bool(optimizer(tuple(torch.ones_like(p) for p in optimizer.parameters)))


def test_a_learning_rate_of_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_adam.mindspore.dynamic.MAX_NUM_VALUES", 3)
    Adam([one()], [0.1] * 3)
    for values in ([0.1] * 4, torch.full((4,), 0.1), (0.1 for _ in iter(int, 1))):
        with pytest.raises(ValueError, match="more than"):
            Adam([one()], values)


def frozen_state(optimizer: Adam) -> list[bytes]:
    tensors = [p.detach() for p in optimizer.parameters]
    tensors += [t for p in optimizer.parameters for t in optimizer.state[p].values()]
    return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


TABLE = torch.Size([5, 2])


def rows(index: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[index]]), torch.ones(1, 2), TABLE, check_invariants=False
    )


GIVEN: list[tuple[Any, type[Exception], str]] = [
    ((torch.ones(3),), ValueError, "1 gradients for 2 parameters"),
    ((torch.ones(3), rows(1), rows(1)), ValueError, "3 gradients for 2"),
    ((torch.ones(4), rows(1)), ValueError, "'w' has shape"),
    ((torch.ones(3), torch.ones(2, 5)), ValueError, "'table' has shape"),
    ((torch.ones(3, device="meta"), rows(1)), ValueError, "'w' is on meta"),
    ((torch.ones(3, dtype=torch.float64), rows(1)), TypeError, "'w' has dtype torch.float64"),
    ((torch.ones(3, dtype=torch.bfloat16), None), TypeError, "'w' has dtype torch.bfloat16"),
    (([1.0, 1.0, 1.0], rows(1)), TypeError, "'w' is a list"),
    ((1.0, None), TypeError, "'w' is a float"),
    (torch.ones(2), TypeError, "gradients must be a tuple"),
    (None, TypeError, "gradients must be a tuple"),
    ({"w": torch.ones(3)}, TypeError, "gradients must be a tuple"),
    ((torch.ones(3), rows(5)), ValueError, r"'table' has an index of 5"),
    ((torch.ones(3), rows(-1)), ValueError, r"'table' has an index of -1"),
    ((torch.ones(3), torch.ones(5, 2).to_sparse()), ValueError, "'table' is sparse in 2 dim"),
]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("gradients", "error", "words"), GIVEN, ids=lambda value: repr(value)[:30])
def test_wrong_gradients_change_nothing_and_can_be_repeated(
    gradients: Any, error: type[Exception], words: str, lazy: bool
) -> None:
    named = [("w", one()), ("table", nn.Parameter(torch.ones(TABLE)))]
    optimizer = Adam(named, [0.1, 0.2, 0.3], use_lazy=lazy)
    correct = (torch.ones(3), rows(1))
    optimizer(correct)
    before = frozen_state(optimizer)
    with pytest.raises(error, match=words):
        optimizer(gradients)
    assert frozen_state(optimizer) == before
    assert optimizer.global_step == 1
    assert all(parameter.grad is None for parameter in optimizer.parameters)
    optimizer(correct)
    assert (optimizer.global_step, optimizer.param_groups[0]["lr"]) == (2, 0.2)


def test_amsgrad_takes_no_sparse_gradient() -> None:
    parameter = nn.Parameter(torch.ones(TABLE))
    optimizer = Adam([("table", parameter)], use_amsgrad=True)
    with pytest.raises(ValueError, match=r"'table' is torch\.sparse_coo"):
        optimizer((rows(1),))
    assert torch.equal(parameter, torch.ones(TABLE))


def test_a_vector_that_has_run_out_stops_before_anything_changes() -> None:
    parameter = one()
    optimizer = Adam([parameter], [0.1, 0.2])
    for _ in range(2):
        optimizer((torch.ones(3),))
    before = frozen_state(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"learning_rate has 2 values.*none for step 2"):
            optimizer((torch.ones(3),))
    assert frozen_state(optimizer) == before
    assert optimizer.global_step == 2
    assert optimizer.get_lr() == 0.2


def test_target() -> None:
    optimizer = Adam([one()])
    assert optimizer.target == "CPU"
    optimizer.target = "CPU"
    with pytest.raises(TypeError, match="target must be a str, not 1"):
        optimizer.target = 1  # type: ignore[assignment]
    for value in ("GPU", "Ascend", "cpu", ""):
        with pytest.raises(ValueError, match=re.escape(f"target must be 'CPU', not {value!r}")):
            optimizer.target = value
    assert optimizer.target == "CPU"


def test_get_lr_parameter_refuses_what_is_no_parameter_of_its() -> None:
    optimizer = Adam([one()])
    with pytest.raises(TypeError, match="param must be a parameter"):
        optimizer.get_lr_parameter("w")
    with pytest.raises(TypeError, match=r"param\[0\] must be a parameter, not a str"):
        optimizer.get_lr_parameter(["w"])
    with pytest.raises(ValueError, match="param is not in any group"):
        optimizer.get_lr_parameter(one())


def test_writing_to_what_changes_by_itself() -> None:
    optimizer = Adam([one()], [0.1, 0.2], weight_decay=lambda step: 0.5)
    group = optimizer.param_groups[0]
    for key, value in (("lr", 0.3), ("weight_decay", 0.1)):
        with pytest.raises(ValueError, match=f"{key} of this group changes with the step"):
            group[key] = value
        with pytest.raises(ValueError, match=f"{key} of this group changes with the step"):
            group.update({"eps": 1e-4, key: value})
        with pytest.raises(ValueError, match=f"{key} of this group changes with the step"):
            group |= {key: value}
    with pytest.raises(ValueError, match="changes with the step"):
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5).step()
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.1, 0.5, 1e-8)
    group.update(eps=1e-4, lr=0.1)
    assert group["eps"] == 1e-4


def test_decay_that_filters_nothing_is_said_once() -> None:
    with pytest.warns(UserWarning, match="weight_decay applies to every parameter") as caught:
        Adam([one()], weight_decay=0.1)
    assert len(caught) == 1
    layer = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Adam([one()])
        Adam(layer.parameters(), weight_decay=0.1, module=layer)
        Adam([("a", one()), ("norm.gamma", one())], weight_decay=0.1)
        Adam([{"params": [one()], "weight_decay": 0.1}], weight_decay=0.1)


def test_keys_beside_order_params_are_ignored_with_a_warning() -> None:
    first, second = one(), one()
    with pytest.warns(UserWarning, match=r"order_params also holds \['lr'\]"):
        optimizer = Adam(
            [{"params": [first, second]}, {"order_params": [second, first], "lr": 0.5}]
        )
    assert [p is q for p, q in zip(optimizer.parameters, (second, first), strict=True)] == [
        True
    ] * 2
    assert optimizer.get_lr() == 1e-3
