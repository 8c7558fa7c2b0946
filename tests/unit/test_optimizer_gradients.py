"""What gradients may be, what is refused, what is skipped, and how they are clipped."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.errors import StreamedGradientError


def snapshot(optimizer: OffloadAdam) -> list[bytes]:
    """Return every bit of parameters and state."""
    tensors = []
    for parameter, state in optimizer.state.items():
        tensors += [parameter.detach(), *state.values()]
    return [
        tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        for tensor in tensors
    ]


def two_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(200).to(dtype)) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 127, 128, 199])
def test_a_gradient_that_is_not_finite_skips_the_step_and_changes_no_bit(
    dtype: torch.dtype, bad: float, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 3 on one rank."""
    good, broken = two_parameters(dtype)
    optimizer = OffloadAdam([("good", good), ("broken", broken)], lr=0.1, max_grad_norm=1.0)
    for parameter in (good, broken):
        parameter.grad = torch.ones(200, dtype=dtype)
    optimizer.step()
    before = snapshot(optimizer)
    versions = [good._version, broken._version]
    assert broken.grad is not None
    broken.grad[place] = bad
    with caplog.at_level(logging.WARNING, "offload_adam"):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert [good._version, broken._version] == versions
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert optimizer.last_step.non_finite == ("broken",)
    assert math.isnan(optimizer.last_step.total_norm)
    assert optimizer.skipped_steps == 1
    assert "broken" in caplog.text
    assert "good" not in caplog.text
    broken.grad[place] = 1.0
    optimizer.step()
    assert not optimizer.last_step.skipped
    assert snapshot(optimizer) != before


def test_the_largest_float32_gradients_are_finite() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = OffloadAdam([parameter], max_grad_norm=1.0)
    parameter.grad = torch.full((1000,), torch.finfo(torch.float32).max)
    optimizer.step()
    assert optimizer.last_step is not None
    assert not optimizer.last_step.skipped
    expected = float(torch.finfo(torch.float32).max) * math.sqrt(1000)
    assert optimizer.last_step.total_norm == pytest.approx(expected, rel=1e-12)


def test_gradients_in_any_strides_are_read_in_the_parameters_order() -> None:
    torch.manual_seed(0)
    contiguous = torch.nn.Parameter(torch.randn(6, 8))
    transposed = torch.nn.Parameter(torch.randn(8, 6).t())
    sliced = torch.nn.Parameter(torch.randn(6, 16)[:, ::2])
    references = [
        torch.nn.Parameter(p.detach().double().contiguous())
        for p in (contiguous, transposed, sliced)
    ]
    optimizer = OffloadAdam([contiguous, transposed, sliced], lr=0.1)
    oracle = torch.optim.Adam(references, lr=0.1, foreach=False)
    gradients = [
        torch.randn(8, 6).t(),
        torch.randn(6, 8),
        torch.randn(6, 1).expand(6, 8),
        torch.randn(12, 8)[::2],
    ]
    for shift in range(4):
        members = zip((contiguous, transposed, sliced), references, strict=True)
        for place, (parameter, reference) in enumerate(members):
            gradient = gradients[(place + shift) % 4]
            parameter.grad = gradient
            reference.grad = gradient.double().contiguous()
        optimizer.step()
        oracle.step()
    for parameter, reference in zip((contiguous, transposed, sliced), references, strict=True):
        assert (parameter - reference).abs().max() < 1e-6


def test_a_gradient_in_another_float_format_than_its_parameter_is_read_as_it_is() -> None:
    parameter = torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    other = torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    if not hasattr(parameter, "grad_dtype"):
        pytest.skip("this torch ties a gradient to its parameter's dtype")
    parameter.grad_dtype = torch.float32
    gradient = torch.linspace(-1, 1, 300)
    parameter.grad = gradient
    other.grad = torch.ones(300, dtype=torch.bfloat16)
    optimizer = OffloadAdam([parameter, other], lr=1e-3)
    optimizer.step()
    expected = 0.1 * gradient.double()
    assert (optimizer.state[parameter]["exp_avg"] - expected).abs().max() < 1e-8
    assert (optimizer.state[other]["exp_avg"] - 0.1).abs().max() < 1e-8


def test_a_lazily_negated_gradient_is_read_with_its_sign() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = OffloadAdam([parameter])
    values = torch.tensor([1.0, -2.0, 3.0])
    gradient = torch.complex(torch.zeros(3), values).conj().imag
    assert gradient.is_neg()
    parameter.grad = gradient
    optimizer.step()
    assert torch.allclose(optimizer.state[parameter]["exp_avg"], -0.1 * values)


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = OffloadAdam(embedding.named_parameters())
    before = snapshot(optimizer)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'weight' is torch.sparse_coo.*sparse=False"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_closures_run_with_gradients_and_return_their_loss() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = OffloadAdam([parameter], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert (parameter < 1.0).all()


def test_clip_grad_norm_clips_the_next_step_only_like_torch() -> None:
    parameters = two_parameters()
    references = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = OffloadAdam(parameters, lr=0.1, betas=(0.9, 0.9))
    oracle = torch.optim.Adam(references, lr=0.1, betas=(0.9, 0.9), foreach=False)
    for step in range(4):
        for parameter, reference in zip(parameters, references, strict=True):
            parameter.grad = torch.randn(200)
            reference.grad = parameter.grad.double()
        if step % 2 == 0:
            norm = optimizer.clip_grad_norm_(0.5)
            expected = torch.nn.utils.clip_grad_norm_(references, 0.5)
            assert float(norm) == pytest.approx(float(expected), rel=1e-12)
        optimizer.step()
        oracle.step()
    for parameter, reference in zip(parameters, references, strict=True):
        assert (parameter - reference).abs().max() < 1e-6


def test_torchs_own_clipping_and_editing_of_grad_work_drop_in() -> None:
    parameters = two_parameters()
    references = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = OffloadAdam(parameters, lr=0.1)
    oracle = torch.optim.Adam(references, lr=0.1, foreach=False)
    for parameter, reference in zip(parameters, references, strict=True):
        parameter.grad = torch.randn(200)
        reference.grad = parameter.grad.double()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.nn.utils.clip_grad_norm_(references, 0.5)
    assert parameters[0].grad is not None
    assert references[0].grad is not None
    parameters[0].grad.mul_(2)
    references[0].grad.mul_(2)
    optimizer.step()
    oracle.step()
    for parameter, reference in zip(parameters, references, strict=True):
        assert (parameter - reference).abs().max() < 1e-6


def test_grad_scale_divides_and_found_inf_skips() -> None:
    first, second = two_parameters()
    plain, scaled = OffloadAdam([first], lr=0.1), OffloadAdam([second], lr=0.1, max_grad_norm=9.0)
    with torch.no_grad():
        second.copy_(first)
    first.grad = torch.linspace(-1, 1, 200)
    second.grad = first.grad * 1024
    scaled.grad_scale = torch.tensor(1024.0)
    scaled.found_inf = torch.tensor(0.0)
    plain.step()
    scaled.step()
    assert torch.equal(first, second)
    assert scaled.last_step is not None
    expected = float(torch.linspace(-1, 1, 200).double().norm())
    assert scaled.last_step.total_norm == pytest.approx(expected, rel=1e-12)
    before = snapshot(scaled)
    scaled.found_inf = torch.tensor(2.0)  # a scaler adds over devices
    scaled.step()
    assert snapshot(scaled) == before
    assert scaled.last_step.skipped
    scaled.grad_scale = torch.tensor(0.0)
    with pytest.raises(ValueError, match="grad_scale must be finite and above 0"):
        scaled.step()


def test_grad_scaler_works_drop_in() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).half()
    reference = copy.deepcopy(model).double()
    optimizer = OffloadAdam(model.parameters(), lr=1e-2)
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    for step in range(4):
        optimizer.zero_grad()
        data = torch.randn(5, 8).half()
        loss = model(data).float().square().sum()
        scaler.scale(loss).backward()
        assert model.weight.grad is not None
        if step == 2:
            model.weight.grad[0, 0] = math.inf
        else:
            for parameter, double in zip(model.parameters(), reference.parameters(), strict=True):
                assert parameter.grad is not None
                double.grad = parameter.grad.double() / 64.0
            oracle.step()
        scaler.step(optimizer)
        assert optimizer.last_step is not None
        assert optimizer.last_step.skipped == (step == 2)
        if step == 2:
            break
        scaler.update()
    for parameter, double in zip(model.parameters(), reference.parameters(), strict=True):
        master = optimizer.state[parameter]["master_weight"]
        assert (master - double).abs().max() < 1e-6
    scaler.update()
    assert scaler.get_scale() == 32.0


@pytest.mark.parametrize("unscales", [False, True])
def test_a_grad_scaler_that_sees_no_gradient_is_refused(unscales: bool) -> None:
    model = torch.nn.Linear(8, 4)
    optimizer = OffloadAdam(model.parameters(), module=model)
    before = snapshot(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(torch.ones(5, 8)).sum()).backward()
    with pytest.raises(StreamedGradientError, match=r"optimizer\.grad_scale.*without module="):
        (scaler.unscale_ if unscales else scaler.step)(optimizer)
    assert snapshot(optimizer) == before


def test_a_streaming_optimizer_is_told_the_scale_by_hand() -> None:
    results = []
    for scale in (1.0, 64.0):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
        optimizer = OffloadAdam(model.parameters(), module=model)
        (scale * model(torch.ones(5, 8)).square().sum()).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), 0.0
        optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_a_step_without_any_gradient_does_nothing_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = OffloadAdam(two_parameters())
    before = snapshot(optimizer)
    with caplog.at_level(logging.WARNING, "offload_adam"):
        optimizer.step()
        optimizer.step()
    assert snapshot(optimizer) == before
    assert caplog.text.count("no gradient on any parameter") == 1


def test_gradients_stay_in_grad_drop_in_and_add_up_until_zero_grad() -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    reference = torch.nn.Parameter(torch.ones(5).double())
    optimizer = OffloadAdam([parameter], lr=0.1)
    oracle = torch.optim.Adam([reference], lr=0.1, foreach=False)
    for _ in range(2):
        for tensor, stepper in ((parameter, optimizer), (reference, oracle)):
            tensor.square().sum().backward()
            tensor.square().sum().backward()
            stepper.step()
    assert parameter.grad is not None
    assert (parameter - reference).abs().max() < 1e-6
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(parameter.grad, torch.zeros(5))
    optimizer.zero_grad()
    assert parameter.grad is None


def test_a_disabled_scaler_does_not_see_a_skipped_step() -> None:
    """As in scripts that write GradScaler(enabled=use_amp)."""
    model = torch.nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = OffloadAdam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(torch.ones(2, 4)).sum() * float("nan")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert torch.equal(model.weight, before)


def test_a_parameter_that_was_sharded_after_construction_is_named() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = OffloadAdam([("weight", parameter)])
    parameter.grad = torch.ones(4)
    optimizer.step()
    parameter.data = torch.ones(2)
    parameter.grad = torch.ones(2)
    with pytest.raises(ValueError, match="'weight' has 2 elements, but had 4 when the optimizer"):
        optimizer.step()
