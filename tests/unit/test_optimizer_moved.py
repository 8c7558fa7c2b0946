"""Models that are moved, cast, unfrozen or given other data after the optimizer was constructed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from offload_adam import (
    Adam,
    OffloadAdam,
    OffloadPolicy,
    ParameterReplacedError,
    UnreadyParameterError,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.gradients.stand_in import StandIn
from offload_adam.options import StateFormat
from offload_adam.torch_private import make_wrapper_subclass, no_torch_function
from tests.unit.overlap.lazy_worker import LazyOffloading

Move = Callable[[torch.nn.Module], object]


class Small(torch.nn.Module):
    """Casts what reaches its last layer to that layer's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.hidden = torch.nn.Linear(16, 5)
        self.head = torch.nn.Linear(5, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(self.conv(inputs).flatten(1))
        outputs: torch.Tensor = self.head(hidden.to(self.head.weight.dtype))
        return outputs


def make_model() -> Small:
    torch.manual_seed(3)
    return Small()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 3, 3, 3, generator=generator).to(dtype)
        model(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_exactly(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Train with gradients that do not depend on the parameters or their strides."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        factors = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        pairs = zip(model.parameters(), factors, strict=True)
        torch.stack([(p * f.to(p.dtype)).sum() for p, f in pairs]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


def replace_all(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def replace_by_other_strides(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = (parameter.data * 0.5).to(memory_format=torch.channels_last)
        elif parameter.dim() == 2:
            parameter.data = (parameter.data * 0.5).t().contiguous().t()


def replace_by_contiguous(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = (parameter.data * 0.5).contiguous()


def shrink(model: torch.nn.Module) -> None:
    with torch.no_grad():
        vector_to_parameters(
            parameters_to_vector(model.parameters()) * 0.9, iter(model.parameters())
        )


def there_and_back(model: torch.nn.Module) -> None:
    model.double().float() if next(model.parameters()).dtype == torch.float32 else model.float().to(
        torch.bfloat16
    )


REPLACEMENTS: dict[str, Move] = {
    "data": replace_all,
    "strides": replace_by_other_strides,
    "contiguous": replace_by_contiguous,
    "vector_to_parameters": shrink,
    "there and back": there_and_back,
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_other_data_is_trained_as_by_an_optimizer_that_saw_an_in_place_write(
    replacement: str, dtype: torch.dtype, before: int, streams: bool
) -> None:
    model, expected = make_model().to(dtype), make_model().to(dtype)
    if replacement == "contiguous":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = OffloadAdam(model.parameters(), **options, module=model if streams else None)
    oracle = OffloadAdam(expected.parameters(), **options)
    train_exactly(model, optimizer, before)
    train_exactly(expected, oracle, before)
    objects = list(model.parameters())
    REPLACEMENTS[replacement](model)
    with torch.no_grad():
        for one, other in zip(expected.parameters(), model.parameters(), strict=True):
            one.copy_(other)
    train_exactly(model, optimizer)
    train_exactly(expected, oracle)
    assert_same(model, expected)
    assert all(one is other for one, other in zip(objects, model.parameters(), strict=True))


def test_other_data_of_an_fp32_model_is_trained_as_by_torch() -> None:
    model, expected = make_model(), make_model().double()
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, eps=1e-3)
    oracle = torch.optim.Adam(expected.parameters(), lr=1e-2, eps=1e-3, foreach=False)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        train(one, stepper)
        shrink(one)
        train(one, stepper)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.fixture
def _swaps() -> Iterator[None]:
    """Let `module.to()` swap parameters, which torch cannot where a weak reference exists."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swaps")
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("before", [0, 2])
def test_swapped_parameters_are_trained_as_by_torch(before: int, streams: bool) -> None:
    model, expected = make_model(), make_model().double()
    optimizer = OffloadAdam(
        model.parameters(), lr=1e-2, eps=1e-3, module=model if streams else None
    )
    oracle = torch.optim.Adam(expected.parameters(), lr=1e-2, eps=1e-3, foreach=False)
    train(model, optimizer, before)
    train(expected, oracle, before)
    model.to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            theirs.copy_(ours)
    train(model, optimizer)
    train(expected, oracle)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.usefixtures("_swaps")
def test_gradients_stream_after_a_swap_to_another_dtype() -> None:
    model, expected = make_model(), make_model().to(torch.bfloat16)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    model.to(torch.bfloat16)
    train(model, optimizer)
    oracle = OffloadAdam(expected.parameters(), lr=1e-2)
    train(expected, oracle)
    assert_same(model, expected)
    model(torch.ones(1, 3, 3, 3, dtype=torch.bfloat16)).float().sum().backward()
    assert {type(parameter.grad) for parameter in model.parameters()} == {StandIn}


def test_synchronize_and_state_dicts_put_other_data_back() -> None:
    model = make_model()
    optimizer = OffloadAdam(model.parameters())
    address = model.hidden.weight.data_ptr()
    for call in (optimizer.synchronize, optimizer.state_dict, optimizer.full_state_dict):
        model.hidden.weight.data = torch.full((5, 16), 2.0)
        call()
        assert model.hidden.weight.data_ptr() == address
        assert torch.equal(model.hidden.weight.detach(), torch.full((5, 16), 2.0))


def test_shared_memory_is_given_up_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters())
    model.share_memory()
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, 1)
    assert "'conv.weight' was moved to shared memory" in caplog.text


def cast(model: torch.nn.Module) -> torch.nn.Module:
    return model.to(torch.bfloat16)


def cast_one_layer(model: torch.nn.Module) -> None:
    model.get_submodule("head").to(torch.bfloat16)


@pytest.mark.parametrize("kind", [OffloadAdam, Adam])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("move", [cast, cast_one_layer])
def test_a_model_cast_before_the_first_step_is_laid_out_anew(
    move: Move, streams: bool, kind: type[OffloadAdam] | type[Adam]
) -> None:
    model, expected = make_model(), make_model()

    def make(one: torch.nn.Module) -> OffloadAdam | Adam:
        if kind is Adam:
            return Adam(one.parameters(), 1e-2, module=one if streams else None)
        return OffloadAdam(one.parameters(), lr=1e-2, module=one if streams else None)

    optimizer = make(model)
    move(model)
    move(expected)
    oracle = make(expected)
    train(model, optimizer)
    train(expected, oracle)
    assert_same(model, expected)
    ours, theirs = optimizer.state_dict()["state"], oracle.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert optimizer.host_nbytes == oracle.host_nbytes


def test_the_order_of_trainers_calls_works_with_clipping_and_closures() -> None:
    model, expected = make_model(), cast(make_model())
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model)
    cast(model)
    oracle = OffloadAdam(expected.parameters(), lr=1e-2)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        one(torch.ones(2, 3, 3, 3, dtype=torch.bfloat16)).float().square().mean().backward()
        norm = stepper.clip_grad_norm_(0.5)
        assert norm > 0.5
        stepper.step()
        stepper.zero_grad()

        def closure(one: torch.nn.Module = one, stepper: OffloadAdam = stepper) -> float:
            stepper.zero_grad()
            loss = one(torch.ones(2, 3, 3, 3, dtype=torch.bfloat16)).float().square().mean()
            loss.backward()
            return float(loss)

        stepper.step(closure)
    assert_same(model, expected)


@pytest.mark.parametrize("overlapped_before", [False, True])
def test_updates_overlap_after_a_model_was_cast(
    overlapped_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, expected = make_model(), cast(make_model())
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model, overlap=overlapped_before)
    # As without a choice, when the model is moved to a GPU.
    optimizer._options = replace(optimizer._options, overlap=True)
    cast(model)
    oracle = OffloadAdam(expected.parameters(), lr=1e-2)
    for step in range(3):
        train(model, optimizer, 1)
        train(expected, oracle, 1)
        # The first forward ran without the hooks of the new layout.
        assert optimizer._alive().executor.is_pending == (step > 0)
    optimizer.synchronize()
    assert_same(model, expected)
    assert "From now on" not in caplog.text


def test_reads_that_skip_hooks_are_found_after_a_cast(caplog: pytest.LogCaptureFixture) -> None:
    model, expected = make_model(), cast(make_model())
    optimizer = LazyOffloading(model.parameters(), lr=1e-2, module=model, overlap=True)
    cast(model)
    oracle = OffloadAdam(expected.parameters(), lr=1e-2)
    train_exactly(model, optimizer, 4)
    train_exactly(expected, oracle, 4)
    optimizer.synchronize()
    assert_same(model, expected)
    assert caplog.text.count("From now on, step() itself waits") == 1


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "int8"])
def test_state_that_was_loaded_before_the_move_is_kept(state_format: StateFormat) -> None:
    first = make_model()
    trained = OffloadAdam(first.parameters(), lr=1e-2, state_format=state_format)
    train(first, trained)
    saved = trained.full_state_dict()

    model, expected = make_model(), cast(make_model())
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, state_format=state_format)
    optimizer.load_state_dict(saved)
    optimizer.num_steps = 3
    cast(model)
    oracle = OffloadAdam(expected.parameters(), lr=1e-2, state_format=state_format)
    oracle.load_state_dict(saved)
    train(model, optimizer)
    train(expected, oracle)
    assert_same(model, expected)
    assert optimizer.num_steps == 6


@pytest.mark.parametrize("state_format", ["bf16", "mixed", "int8"])
def test_state_that_was_not_loaded_may_have_other_ranges_after_the_move(
    state_format: StateFormat,
) -> None:
    """Buckets of half as many bytes hold other parameters."""
    model, expected = make_model(), cast(make_model())
    options: dict[str, Any] = {
        "lr": 1e-2,
        "state_format": state_format,
        "offload": OffloadPolicy(bucket_nbytes=1000),
    }
    optimizer = OffloadAdam(model.parameters(), **options)
    before = [state.layout.numel for state in optimizer._alive().states]
    cast(model)
    oracle = OffloadAdam(expected.parameters(), **options)
    train(model, optimizer)
    train(expected, oracle)
    assert_same(model, expected)
    assert [state.layout.numel for state in optimizer._alive().states] != before


def test_a_parameter_that_cannot_be_trained_after_the_move_is_rejected_and_can_be_moved_back() -> (
    None
):
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters(), lr=1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.double()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'conv.weight' has dtype torch.float64"):
            optimizer.step()
    model.float()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    expected = make_model()
    train(model, optimizer)
    train(expected, OffloadAdam(expected.parameters(), lr=1e-2))
    assert_same(model, expected)
    assert [int(entry["step"]) for entry in optimizer.state_dict()["state"].values()] == [3] * 6


def test_a_model_that_is_cast_after_a_step_is_rejected_by_name() -> None:
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters())
    train(model, optimizer, 1)
    model.to(torch.bfloat16)
    message = r"'conv.weight'.*torch.bfloat16 \[4, 3, 2, 2\] on cpu .* torch.float32"
    with pytest.raises(ParameterReplacedError, match=message):
        optimizer.step()


def test_a_model_that_is_moved_after_its_gradients_left_is_rejected() -> None:
    model = make_model()
    optimizer = OffloadAdam(model.parameters(), module=model)
    model(torch.ones(1, 3, 3, 3)).sum().backward()
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"moved between backward\(\) and the first step\(\)"):
        optimizer.step()


def test_averaged_weights_can_be_swapped_in_and_out_while_updates_run() -> None:
    model, expected = make_model(), make_model()
    optimizer = LazyOffloading(model.parameters(), lr=1e-2, module=model, overlap=True)
    oracle = OffloadAdam(expected.parameters(), lr=1e-2)
    for _ in range(3):
        train(model, optimizer, 1)
        train(expected, oracle, 1)
        kept = [parameter.data for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
        assert torch.equal(model(torch.ones(1, 3, 3, 3)), torch.zeros(1, 2))
        for parameter, data in zip(model.parameters(), kept, strict=True):
            parameter.data = data
    del kept, data
    optimizer.synchronize()
    assert_same(model, expected)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        replace_all(one)
        train(one, stepper, 1)
    optimizer.synchronize()
    assert_same(model, expected)


def test_data_replaced_while_its_update_runs_is_rejected() -> None:
    model = make_model()
    optimizer = LazyOffloading(model.parameters(), lr=1e-2, module=model, overlap=True)
    train(model, optimizer, 1)
    replace_all(model)
    model(torch.ones(1, 3, 3, 3)).sum().backward()
    with pytest.raises(UnreadyParameterError, match=r"synchronize\(\)"):
        optimizer.step()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unfrozen_parameter_is_trained_from_then_on(dtype: torch.dtype, streams: bool) -> None:
    model, expected = make_model().to(dtype), make_model().double()
    for one in (model, expected):
        one.conv.requires_grad_(False)
        one.hidden.bias.requires_grad_(False)
    with torch.no_grad():
        for parameter, like in zip(expected.parameters(), model.parameters(), strict=True):
            parameter.copy_(like)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model if streams else None)
    oracle = torch.optim.Adam(expected.parameters(), lr=1e-2, foreach=False)
    frozen = model.conv.weight.detach().clone()
    nbytes = optimizer.host_nbytes["state"]

    def train_both(steps: int) -> None:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            losses = []
            for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
                if ours.requires_grad:
                    factor = torch.randn(ours.shape, generator=generator).to(dtype)
                    losses.append((ours * factor).sum())
                    theirs.grad = factor.double()
            torch.stack(losses).sum().backward()
            for stepper in (optimizer, oracle):
                stepper.step()
                stepper.zero_grad()

    train_both(3)
    assert torch.equal(model.conv.weight, frozen)
    for one in (model, expected):
        one.conv.requires_grad_(True)
    train_both(3)
    assert not torch.equal(model.conv.weight, frozen)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        master = (
            optimizer.state[ours].get("master_weight", ours) if ours in optimizer.state else ours
        )
        assert (master.double() - theirs).abs().max() < 1e-6
    assert optimizer.host_nbytes["state"] > nbytes
    assert int(optimizer.state[model.conv.weight]["step"]) == 3
    assert int(optimizer.state[model.head.weight]["step"]) == 6
    assert len(optimizer.full_state_dict()["state"]) == 5


def test_unfreezing_logs_its_bytes_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.conv.requires_grad_(False)
    optimizer = OffloadAdam(model.named_parameters())
    model.conv.requires_grad_(True)
    with caplog.at_level(logging.INFO, logger="offload_adam"):
        train(model, optimizer)
    (message,) = [text for text in caplog.messages if "require gradients since" in text]
    assert "2 parameter(s)" in message
    assert "'conv.weight'" in message


def test_unfreezing_between_two_backwards_of_a_step_loses_no_gradient() -> None:
    model, expected = make_model(), make_model()
    for one in (model, expected):
        one.conv.requires_grad_(False)
    optimizer = OffloadAdam(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    oracle = torch.optim.Adam(expected.parameters(), lr=1e-2)
    for one in (model, expected):
        one(torch.ones(1, 3, 3, 3)).sum().backward()
        one.conv.requires_grad_(True)
        one(torch.ones(1, 3, 3, 3)).sum().backward()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    oracle.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_a_gradient_of_a_frozen_parameter_is_rejected() -> None:
    model = make_model()
    model.conv.requires_grad_(False)
    optimizer = OffloadAdam(model.named_parameters())
    model.get_parameter("conv.bias").grad = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"'conv.bias' has a gradient but no state, because it is fr"
    ):
        optimizer.step()


def test_saved_state_of_a_parameter_that_is_frozen_now_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters())
    train(model, optimizer, 1)
    again = make_model()
    again.conv.requires_grad_(False)
    OffloadAdam(again.named_parameters()).load_state_dict(optimizer.state_dict())
    assert "2 frozen parameter(s), such as 'conv.weight', is not loaded" in caplog.text


def test_checkpoints_and_state_dicts_load_into_an_optimizer_made_before_unfreezing(
    tmp_path: Path,
) -> None:
    model = make_model()
    optimizer = OffloadAdam(model.parameters(), lr=1e-2)
    train(model, optimizer)
    save_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer)
    saved = optimizer.full_state_dict()
    train(model, optimizer)
    for load in ("checkpoint", "state dict"):
        again = make_model()
        again.conv.requires_grad_(False)
        resumed = OffloadAdam(again.parameters(), lr=1e-2)
        again.conv.requires_grad_(True)
        if load == "checkpoint":
            load_checkpoint(tmp_path / "saved", model=again, optimizer=resumed)
        else:
            optimizer_state = saved
            source = make_model()
            train(source, OffloadAdam(source.parameters(), lr=1e-2))
            again.load_state_dict(source.state_dict())
            resumed.load_state_dict(optimizer_state)
        train(again, resumed)
        assert_same(again, model)


class Quantized(torch.Tensor):
    """A tensor of the shape and dtype of an fp32 parameter, without its memory."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> Quantized:
        made = make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype)
        assert isinstance(made, Quantized)
        return made

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0])
        plain = [torch.zeros(a.shape) if isinstance(a, Quantized) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_a_parameter_that_is_swapped_for_another_kind_of_tensor_is_rejected() -> None:
    model = make_model()
    optimizer = OffloadAdam(model.named_parameters())
    train(model, optimizer, 1)
    weight = model.hidden.weight
    torch.utils.swap_tensors(weight, torch.nn.Parameter(Quantized(weight)))
    weight.grad = torch.ones(5, 16)
    with pytest.raises(ParameterReplacedError, match=r"'hidden.weight'.* data are Quantized of"):
        optimizer.step()
