"""The cases of torch's own optimizer tests, each compared with torch's plain Adam or AdamW."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.support.torch_cases import (
    PAIRS,
    Affine,
    assert_equal,
    assert_equal_state,
    case_module,
    flags_of,
    info_of,
    inputs_of,
    make_pair,
)

NUM_STEPS = 12

pytestmark = pytest.mark.parametrize("name", PAIRS)


def pairs(name: str, **options: Any) -> Iterator[tuple[dict[str, Any], Affine, Affine, Any, Any]]:
    """Yield (arguments, our model, torch's model, our optimizer, torch's) for each input."""
    for number, kwargs in enumerate(inputs_of(name)):
        ours, theirs = Affine(seed=number, **options), Affine(seed=number, **options)
        yield kwargs, ours, theirs, *make_pair(name, ours.parameters, theirs.parameters, **kwargs)


def moves_right(before: torch.Tensor, after: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether the loss went down, or up with `maximize`."""
    return bool(after > before if kwargs.get("maximize") else after < before)


def advance(scheduler: Any, loss: torch.Tensor) -> None:
    """Advance a scheduler; one of them takes the loss."""
    scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))


@pytest.mark.parametrize("contiguous", [True, False])
def test_every_input_takes_torchs_steps(name: str, contiguous: bool) -> None:
    for kwargs, ours, theirs, optimizer, reference in pairs(name, contiguous=contiguous):
        first = ours.loss()
        for _ in range(NUM_STEPS):
            loss = optimizer.step(ours.closure_of(optimizer))
            torch.testing.assert_close(loss, reference.step(theirs.closure_of(reference)))
            assert_equal(ours.parameters, theirs.parameters)
        assert_equal_state(optimizer, reference)
        assert moves_right(first, ours.loss(), kwargs), kwargs


def test_torchs_schedulers_of_these_tests_drive_it(name: str) -> None:
    combinations = info_of(name).scheduler_inputs
    assert combinations
    for makers in combinations:
        for kwargs, ours, theirs, optimizer, reference in pairs(name):
            first = ours.loss()
            schedules = [[make(made) for make in makers] for made in (optimizer, reference)]
            for _ in range(NUM_STEPS):
                loss = optimizer.step(ours.closure_of(optimizer))
                expected = reference.step(theirs.closure_of(reference))
                for mine, other in zip(*schedules, strict=True):
                    advance(mine, loss)
                    advance(other, expected)
                lr = float(reference.param_groups[0]["lr"])
                assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr, rel=1e-6)
                assert_equal(ours.parameters, theirs.parameters)
            assert moves_right(first, ours.loss(), kwargs), kwargs


def test_groups_have_their_own_options(name: str) -> None:
    """One with the input's options, one without weight decay, one with a tiny learning rate."""
    for number, kwargs in enumerate(inputs_of(name)):
        models = Affine(seed=number), Affine(seed=number)
        still = [torch.nn.Parameter(torch.ones(2)) for _ in models]
        options = {"lr": 1e-3, **kwargs}
        groups = [
            [
                {"params": [model.weight], **copy.deepcopy(options)},
                {"params": [model.bias], **copy.deepcopy(options), "weight_decay": 0.0},
                {"params": [other]},
            ]
            for model, other in zip(models, still, strict=True)
        ]
        optimizer, reference = make_pair(name, *groups, lr=1e-28)
        schedules = [info_of(name).scheduler_inputs[0][0](made) for made in (optimizer, reference)]
        first = models[0].loss()
        for _ in range(NUM_STEPS):
            for model, made, other in zip(models, (optimizer, reference), still, strict=True):
                model.closure_of(made)()
                other.grad = torch.full_like(other, 0.5)
                made.step()
            assert_equal(models[0].parameters, models[1].parameters)
            for schedule in schedules:
                schedule.step()
        assert moves_right(first, models[0].loss(), kwargs)
        assert torch.equal(still[0], torch.ones(2))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_tensor_is_a_learning_rate(name: str, shape: tuple[int, ...]) -> None:
    for kwargs in inputs_of(name):
        ours, theirs = Affine(), Affine()
        kwargs["lr"] = torch.full(shape, 1e-2)
        optimizer, reference = make_pair(name, ours.parameters, theirs.parameters, **kwargs)
        rates = [made.param_groups[0]["lr"] for made in (optimizer, reference)]
        for _ in range(4):
            optimizer.step(ours.closure_of(optimizer))
            reference.step(theirs.closure_of(reference))
            assert_equal(ours.parameters, theirs.parameters)
            for rate in rates:  # in place, as torch's schedulers do
                rate.mul_(0.5)
        assert optimizer.param_groups[0]["lr"] is rates[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_of_16_bit_parameters_take_torchs_fp32_steps(name: str, dtype: torch.dtype) -> None:
    """Beside an fp32 parameter, as torch's case of mixed dtypes."""
    for number, kwargs in enumerate(inputs_of(name)):
        generator = torch.Generator().manual_seed(number)
        values = [
            torch.randn(5, 3, generator=generator).to(dtype),
            torch.randn(7, generator=generator),
        ]
        ours = [torch.nn.Parameter(value.clone()) for value in values]
        theirs = [torch.nn.Parameter(value.float()) for value in values]
        optimizer, reference = make_pair(name, ours, theirs, **kwargs)
        for _ in range(NUM_STEPS):
            for our, their in zip(ours, theirs, strict=True):
                our.grad = torch.randn(our.shape, generator=generator).to(our.dtype)
                their.grad = our.grad.float()
            optimizer.step()
            reference.step()
        assert_equal([optimizer.state[ours[0]]["master_weight"], ours[1]], theirs)
        assert torch.equal(ours[0], optimizer.state[ours[0]]["master_weight"].to(dtype))


def test_gradients_may_be_missing_and_layers_frozen_for_a_while(name: str) -> None:
    """Also beside a parameter without elements, which torch's case has last."""

    def model() -> torch.nn.Sequential:
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
        )

    inputs = torch.linspace(0.1, 0.6, 6, dtype=torch.float32).reshape(3, 2)
    for kwargs in inputs_of(name):
        models = model(), model()
        empty = [torch.nn.Parameter(torch.empty(0)) for _ in models]
        members = [[*m.parameters(), e] for m, e in zip(models, empty, strict=True)]
        optimizers = make_pair(name, *members, **kwargs)
        for step in range(7):
            for part, optimizer, last in zip(models, optimizers, empty, strict=True):
                optimizer.zero_grad()
                last.grad = torch.empty(0)
                part[2].requires_grad_(not 3 <= step < 5)
                if step != 2:
                    part(inputs).sum().backward()
                optimizer.step()
            assert_equal(*members)
        assert_equal_state(*optimizers)


def test_a_step_without_gradients_changes_nothing(name: str) -> None:
    for kwargs in inputs_of(name):
        frozen = [torch.randn(2, 3), torch.tensor([1, 1])]
        before = [tensor.clone() for tensor in frozen]
        optimizer = PAIRS[name](frozen, **kwargs)
        assert optimizer.step(lambda: 3.0) == 3.0
        trained = Affine()
        idle = PAIRS[name](trained.parameters, **kwargs)
        idle.step()
        assert_equal(
            [*frozen, *trained.parameters], [*before, *Affine().parameters], rtol=0, atol=0
        )
        assert [float(entry["step"]) for entry in idle.state.values()] == [0.0, 0.0]


def test_gradients_of_zero_change_nothing_without_weight_decay(name: str) -> None:
    for kwargs in inputs_of(name):
        ours, theirs = Affine(), Affine()
        optimizer, reference = make_pair(
            name, ours.parameters, theirs.parameters, **{**kwargs, "weight_decay": 0.0}
        )
        for parameter in (*ours.parameters, *theirs.parameters):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        reference.step()
        before = Affine().parameters
        assert_equal(ours.parameters, before, rtol=0, atol=0)
        assert_equal(theirs.parameters, before, rtol=0, atol=0)


def test_plain_tensors_are_trained(name: str) -> None:
    """As in torch, every leaf can be trained, also one that is no Parameter."""
    ours = [torch.ones(3, requires_grad=True)]
    theirs = [torch.ones(3, requires_grad=True)]
    optimizer, reference = make_pair(name, ours, theirs, lr=0.1)
    for made, (tensor,) in ((optimizer, ours), (reference, theirs)):
        (tensor * torch.arange(3.0)).sum().backward()
        made.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_and_its_closure_work_without_gradients_outside(name: str, context: Any) -> None:
    ours, theirs = Affine(), Affine()
    optimizer, reference = make_pair(name, ours.parameters, theirs.parameters, lr=0.1)
    for model, made in ((ours, optimizer), (theirs, reference)):
        if context is torch.inference_mode:  # autograd works in no closure there
            model.closure_of(made)()
        with context():
            made.step(model.closure_of(made) if context is torch.no_grad else None)
    assert_equal(ours.parameters, theirs.parameters)


def test_flags_of_an_implementation_change_no_bit(name: str) -> None:
    """`foreach` and `fused` choose among torch's implementations; there is one here."""
    flags = flags_of(name)
    assert {"foreach", "fused", "differentiable", "capturable"} <= {*flags}
    for kwargs in inputs_of(name):
        plain = Affine()
        optimizer = PAIRS[name](plain.parameters, **kwargs)
        optimizer.step(plain.closure_of(optimizer))
        for flag in flags:
            for value in (False, True) if flag in ("foreach", "fused") else (False,):
                model = Affine()
                flagged = PAIRS[name](model.parameters, **kwargs, **{flag: value})
                flagged.step(model.closure_of(flagged))
                assert_equal(model.parameters, plain.parameters, rtol=0, atol=0)


# Arguments that torch's implementations cannot take, and that have their plain meaning here.
TAKEN = (
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
)
# Our words, where they are not torch's. By torch's description of the case.
OUR_WORDS = {
    "Tensor lr must be 1-element": r"^lr must be a number",
    "beta1 should be between 0 and 1": r"^betas\[0\] must lie in \[0, 1\), not 1\.0",
    "weight_decay should > 0": r"^weight_decay must be finite and at least 0, not -1",
    "a param group cannot have duplicate parameters": r"is twice in its group\. List it once",
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_wrong_arguments_are_errors_like_torchs(name: str) -> None:
    """Where torch only warns of a parameter that is listed twice, this is an error."""
    cases = info_of(name).optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(cases) >= 10
    for case in cases:
        given = case.optimizer_error_input
        parameters = Affine().parameters if given.params is None else given.params
        if given.desc in TAKEN:
            floats = tuple(map(float, given.kwargs.get("betas", (0.9, 0.999))))
            options = {"lr": float(given.kwargs["lr"]), "betas": floats}
            ours, plain = Affine(), Affine()
            made = PAIRS[name](ours.parameters, **given.kwargs)
            same = PAIRS[name](plain.parameters, **options)
            made.step(ours.closure_of(made))
            same.step(plain.closure_of(same))
            assert_equal(ours.parameters, plain.parameters, rtol=0, atol=0)
            continue
        assert case.error_on == case_module().OptimizerErrorEnum.CONSTRUCTION_ERROR
        words = OUR_WORDS.get(given.desc, case.error_regex)
        with pytest.raises((TypeError, ValueError), match=words):
            PAIRS[name](parameters, **given.kwargs)


def test_it_can_be_printed(name: str) -> None:
    for kwargs in inputs_of(name):
        text = repr(PAIRS[name](Affine().parameters, **kwargs))
        assert text.startswith(f"Offload{name} (\nParameter Group 0\n")
        expected = {"lr": 0.001, **kwargs}
        assert f"    lr: {expected['lr']}\n" in text


def test_step_hooks_run_in_torchs_order(name: str) -> None:
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    model = Affine()
    optimizer = PAIRS[name](model.parameters, lr=0.5)
    seen: list[torch.Tensor] = []

    def post(made: Any, args: Any, kwargs: Any) -> None:
        assert made is optimizer
        assert kwargs == {}
        seen.append(model.bias.detach().clone())
        calls.append("post")

    handles += [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(post),
    ]
    try:
        for _ in range(2):
            optimizer.step(model.closure_of(optimizer))
        assert calls == ["global pre", "pre", "post", "global post"] * 2
        assert not torch.equal(seen[0], Affine().bias)  # the hook saw the updated parameters
        assert torch.equal(seen[1], model.bias)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step(model.closure_of(optimizer))
    assert len(calls) == 8


def test_a_pre_hook_may_change_the_arguments(name: str) -> None:
    model = Affine()
    optimizer = PAIRS[name](model.parameters)
    optimizer.register_step_pre_hook(lambda made, args, kwargs: ((made, lambda: 7.0), {}))
    assert optimizer.step() == 7.0
    optimizer.register_step_pre_hook(lambda made, args, kwargs: 3)
    with pytest.raises(RuntimeError, match=r"must return None or a tuple"):
        optimizer.step()


def test_a_step_is_named_in_a_profile(name: str) -> None:
    model = Affine()
    optimizer = PAIRS[name](model.parameters)
    with torch.profiler.profile() as profile:
        optimizer.step(model.closure_of(optimizer))
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#Offload{name}.step" in names


def test_a_scalers_found_inf_keeps_every_bit(name: str) -> None:
    for kwargs in inputs_of(name):
        for scale in (None, torch.ones(1)):
            model = Affine()
            optimizer = PAIRS[name](model.parameters, **kwargs)
            model.closure_of(optimizer)()
            optimizer.grad_scale, optimizer.found_inf = scale, torch.ones(())
            optimizer.step()
            assert_equal(model.parameters, Affine().parameters, rtol=0, atol=0)
            assert {float(entry["step"]) for entry in optimizer.state.values()} == {0.0}


def test_a_default_dtype_of_float64_changes_no_bit(name: str) -> None:
    for kwargs in inputs_of(name):
        plain, model = Affine(), Affine()
        optimizer = PAIRS[name](plain.parameters, **kwargs)
        optimizer.step(plain.closure_of(optimizer))
        torch.set_default_dtype(torch.float64)
        try:
            made = PAIRS[name](model.parameters, **kwargs)
            made.step(model.closure_of(made))
        finally:
            torch.set_default_dtype(torch.float32)
        assert_equal(model.parameters, plain.parameters, rtol=0, atol=0)
        assert made.state[model.weight]["exp_avg"].dtype == torch.float32


def test_zero_grad_is_torchs(name: str) -> None:
    model = Affine()
    optimizer = PAIRS[name](model.parameters)
    model.loss().backward()
    gradient = model.weight.grad
    optimizer.zero_grad(set_to_none=False)
    assert model.weight.grad is gradient
    assert gradient is not None
    assert not gradient.any()
    optimizer.zero_grad()
    assert model.weight.grad is None


def set_gradients(kind: str, model: Affine) -> None:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(5, 10, generator=generator)
    if kind == "expanded":
        model.weight.grad, model.bias.grad = drawn[0, :5].expand(10, 5), drawn[0, :1].expand(10)
    elif kind == "transposed":
        model.weight.grad, model.bias.grad = drawn.T, drawn[:, 0].repeat(4)[::2]
    elif kind == "parameters":
        model.weight.grad = torch.nn.Parameter(drawn.T.contiguous())
        model.bias.grad = torch.nn.Parameter(drawn[0])
    elif kind == "shared":
        model.weight.grad = drawn.reshape(10, 5)
        model.bias.grad = drawn.reshape(-1)[:10]
    else:
        assert kind == "with a graph"
        gradients = torch.autograd.grad(model.loss(), model.parameters, create_graph=True)
        model.weight.grad, model.bias.grad = gradients


@pytest.mark.parametrize("kind", ["expanded", "transposed", "parameters", "shared", "with a graph"])
def test_gradients_of_every_kind_are_torchs(name: str, kind: str) -> None:
    ours, theirs = Affine(), Affine()
    optimizer, reference = make_pair(name, ours.parameters, theirs.parameters, lr=0.1)
    for _ in range(3):
        for model, made in ((ours, optimizer), (theirs, reference)):
            set_gradients(kind, model)
            made.step()
        assert_equal(ours.parameters, theirs.parameters)


def test_groups_edited_between_steps_are_torchs(name: str) -> None:
    ours, theirs = Affine(), Affine()
    later = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer, reference = make_pair(name, ours.parameters, theirs.parameters)
    edits: list[dict[str, Any]] = [
        {"lr": 0.5},
        {"lr": torch.tensor(0.1)},
        {"betas": [0.5, 0.6]},
        {"eps": 1},
        {"maximize": True},
        {"weight_decay": 0.3},
        {"decoupled_weight_decay": name == "Adam"},
        {"mine": "a key of the user"},
    ]
    for number, edit in enumerate(edits):
        for model, made, new in zip((ours, theirs), (optimizer, reference), later, strict=True):
            made.param_groups[0].update(edit)
            if number == 4:
                made.add_param_group({"params": (p for p in [new]), "lr": 0.2, "mine": 1})
            model.closure_of(made)()
            new.grad = torch.full((3,), 0.25)
            made.step()
        assert_equal([*ours.parameters, later[0]], [*theirs.parameters, later[1]])
    assert optimizer.param_groups[0]["mine"] == "a key of the user"
    assert optimizer.param_groups[1]["mine"] == 1


def test_edits_of_the_state_are_torchs(name: str) -> None:
    ours, theirs = Affine(), Affine()
    optimizer, reference = make_pair(name, ours.parameters, theirs.parameters, lr=0.1)
    for in_place in (True, False):
        for model, made in ((ours, optimizer), (theirs, reference)):
            made.step(model.closure_of(made))
            entry = made.state[model.weight]
            if in_place:
                entry["step"].fill_(50.0)
                entry["exp_avg"].mul_(0.5)
                entry["exp_avg_sq"].add_(1.0)
            else:
                entry["step"] = torch.tensor(3.0)
                entry["exp_avg"] = torch.zeros(10, 5)
                entry["exp_avg_sq"] = torch.ones(10, 5)
            made.step(model.closure_of(made))
        assert_equal(ours.parameters, theirs.parameters)
    assert_equal_state(optimizer, reference)


def test_an_optimizer_may_step_during_backward(name: str) -> None:
    """One optimizer for each parameter, so that no gradient lives longer than its hook."""
    ours, theirs = Affine(), Affine()
    for model, make in ((ours, PAIRS[name]), (theirs, getattr(torch.optim, name))):
        optimizers = {parameter: make([parameter], lr=0.1) for parameter in model.parameters}

        def update(parameter: Any, optimizers: dict[Any, Any] = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters:
            parameter.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            model.loss().backward()
        assert all(parameter.grad is None for parameter in model.parameters)
    assert_equal(ours.parameters, theirs.parameters)


def test_memory_moves_at_construction(name: str) -> None:
    """Unlike in torch: what shared the old memory keeps the old values."""
    model = Affine()
    early = model.weight.data
    optimizer = PAIRS[name](model.parameters, lr=0.1)
    late = model.weight.data
    optimizer.step(model.closure_of(optimizer))
    assert torch.equal(early, Affine().weight)
    assert torch.equal(late, model.weight)
    assert not torch.equal(late, early)


def test_it_is_an_optimizer_of_torch(name: str) -> None:
    optimizer = PAIRS[name](Affine().parameters)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not isinstance(optimizer, torch.optim.Adam)
