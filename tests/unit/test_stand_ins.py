"""What `.grad` holds after a streamed gradient has left: nothing computes with it silently."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.errors import StreamedGradientError
from offload_adam.gradients.stand_in import StandIn
from offload_adam.mindspore.adam import Adam
from tests.support.policies import in_policies
from tests.support.scenario import Offloading


def streamed() -> tuple[torch.nn.Linear, OffloadAdam]:
    """Return a model after a backward whose gradients have left, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = OffloadAdam(model.named_parameters(), lr=1e-2, module=model)
    model(torch.ones(2, 4)).square().sum().backward()
    return model, optimizer


REFUSED: dict[str, Callable[[torch.nn.Linear, torch.Tensor], object]] = {
    "clip_grad_value_": lambda m, g: torch.nn.utils.clip_grad_value_(m.parameters(), 1.0),
    "abs().mean()": lambda m, g: g.abs().mean(),
    "isnan().any()": lambda m, g: g.isnan().any(),
    "isfinite": lambda m, g: torch.isfinite(g).all(),
    "item": lambda m, g: g.item(),
    "tolist": lambda m, g: g.tolist(),
    "numpy": lambda m, g: g.numpy(),
    "detach().cpu().numpy()": lambda m, g: g.detach().cpu().numpy(),
    "data_ptr": lambda m, g: g.data_ptr(),
    "share_memory_": lambda m, g: g.share_memory_(),
    "clone": lambda m, g: g.clone(),
    "iteration": lambda m, g: list(g),
    "add": lambda m, g: g + torch.ones(3, 4),
    "add_": lambda m, g: g.add_(torch.ones(3, 4)),
    "add_ to .data": lambda m, g: g.data.add_(torch.ones(3, 4)),
    "added to another": lambda m, g: torch.ones(3, 4).add_(g),
    "zero_": lambda m, g: g.zero_(),
    "zero_grad(False)": lambda m, g: m.zero_grad(set_to_none=False),
    "copy_": lambda m, g: g.copy_(torch.ones(3, 4)),
    "out=": lambda m, g: torch.add(torch.ones(3, 4), 1.0, out=g),
    "data=": lambda m, g: setattr(g, "data", torch.ones(3, 4)),
    "parameters_to_vector": lambda m, g: torch.nn.utils.parameters_to_vector([g]),
    "save": lambda m, g: torch.save(g, "/dev/null"),
    "Adam": lambda m, g: torch.optim.Adam(m.parameters()).step(),
    "another norm": lambda m, g: torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0, float("inf")),
    "norm of rows": lambda m, g: g.norm(dim=1),
    "a factor for each element": lambda m, g: g.mul_(torch.ones(3, 4)),
    "out-of-place multiplication": lambda m, g: g * 2.0,
    "SGD": lambda m, g: torch.optim.SGD(m.parameters(), lr=1.0).step(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_whatever_needs_values_is_refused_with_the_remedy(case: str) -> None:
    model, optimizer = streamed()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradient = model.weight.grad
    assert gradient is not None
    with pytest.raises(
        StreamedGradientError, match=r"'(weight|bias)'.*max_grad_norm=.*without module="
    ):
        REFUSED[case](model, gradient)
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.num_updated == 2


@pytest.mark.parametrize("takes", ["norm", "total_norm", "foreach_norm"])
def test_a_norm_is_that_of_the_gradient(takes: str) -> None:
    model, optimizer = streamed()
    twin = copy.deepcopy(model).double()
    twin(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    for _ in range(2):  # and again after a multiplication
        found = [parameter.grad for parameter in model.parameters()]
        expected = [parameter.grad for parameter in twin.parameters()]
        for norm, other in zip(_norms(takes, found), _norms(takes, expected), strict=True):
            assert float(norm) == pytest.approx(float(other), rel=1e-6)
        for parameter in [*model.parameters(), *twin.parameters()]:
            assert parameter.grad is not None
            parameter.grad.mul_(-3.0).div_(torch.tensor(2.0))
    optimizer.step()
    for parameter, other_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        # exp_avg is 0.1 of the gradient.
        assert other_parameter.grad is not None
        expected_avg = other_parameter.grad * 0.1
        assert torch.allclose(
            optimizer.state[parameter]["exp_avg"].double().view_as(expected_avg),
            expected_avg,
            rtol=1e-6,
        )


def _norms(takes: str, gradients: list[torch.Tensor | None]) -> list[torch.Tensor]:
    present = [gradient for gradient in gradients if gradient is not None]
    if takes == "norm":
        return [gradient.norm() for gradient in present]
    if takes == "foreach_norm":
        return list(torch._foreach_norm(present))
    return [torch.nn.utils.get_total_norm(present)]


def test_gradients_that_are_not_finite_give_torchs_norm_and_skip_the_step() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = OffloadAdam(model.parameters(), module=model)
    before = model.weight.detach().clone()
    (model(torch.ones(2, 4)).sum() * float("nan")).backward()
    assert torch.isnan(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("maker", "options"),
    [
        (OffloadAdam, {"overlap": True}),
        (Offloading, {}),
        (Offloading, {"overlap": True}),
        (Offloading, {"offload_fraction": 0.5}),
        (Offloading, {"offload_fraction": 0.5, "overlap": True}),
    ],
)
def test_torchs_clipping_trains_like_torch_wherever_state_lies(
    maker: type[OffloadAdam], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    reference = copy.deepcopy(model).double()
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, eps=1e-3, foreach=False)
    optimizer = maker(
        model.parameters(),
        lr=1e-2,
        eps=1e-3,
        module=model,
        **in_policies(bucket_nbytes=600, **options),
    )
    for step in range(3):
        data = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        (model(data) * 9).square().sum().backward()
        (reference(data.double()) * 9).square().sum().backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        # The gradients themselves are fp32 in one model and fp64 in the other.
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        optimizer.step()
        oracle.step()
        oracle.zero_grad()
    optimizer.synchronize()
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (parameter - other).abs().max() < 2e-6
    optimizer.close()


def test_clipping_holds_for_one_step_and_adds_to_max_grad_norm() -> None:
    model, optimizer = streamed()
    total = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.total_norm == pytest.approx(0.5, rel=1e-5)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert optimizer.last_step.total_norm > 0.5
    assert total > 0.5


def test_multiplying_some_gradients_or_in_between_backwards_is_an_error() -> None:
    model, optimizer = streamed()
    assert model.weight.grad is not None
    model.weight.grad.mul_(0.5)
    with pytest.raises(ValueError, match="gradient of parameter 'bias' was not"):
        optimizer.step()
    assert model.bias.grad is not None
    model.bias.grad.mul_(0.25)
    with pytest.raises(ValueError, match=r"different factors: 0\.25, 0\.5"):
        optimizer.step()
    model.bias.grad.mul_(2.0)
    optimizer.step()
    optimizer.close()
    adding = OffloadAdam(model.parameters(), module=model, accumulate="host")
    model(torch.ones(2, 4)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="after the last backward of a step"):
        adding.step()
    adding.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    adding.step()


def test_it_describes_itself_without_values() -> None:
    model, _ = streamed()
    gradient = model.weight.grad
    assert gradient is not None
    assert "'weight'" in repr(gradient)
    assert "'weight'" in f"{gradient}"
    assert (gradient.shape, gradient.dtype) == ((3, 4), torch.float32)
    assert (gradient.numel(), gradient.stride(), gradient.layout) == (12, (4, 1), torch.strided)
    assert not gradient.is_sparse
    assert not gradient.requires_grad


def test_grad_tells_which_parameters_had_a_gradient() -> None:
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(3)) for _ in range(4))
    optimizer = OffloadAdam(model.parameters(), module=model, accumulate="host")
    for first, second in ((0, 1), (2, 1)):
        model[first].sum().backward()
        model[second].sum().backward()
        found = [parameter.grad is not None for parameter in model]
        assert found == [number in (first, second) for number in range(4)]
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad is None for parameter in model)


def test_the_next_backward_replaces_it_exactly_also_where_gradients_are_shared() -> None:
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    model = torch.nn.ParameterList([first, second])
    optimizer = OffloadAdam(model.parameters(), module=model)
    for value in (2.0, 3.0):
        ((first + second) * value).sum().backward()
        optimizer.step()
    ((first + second) * 4.0).sum().backward()
    optimizer.close()
    assert first.grad is second.grad is None
    first.grad, second.grad = StandIn("first", first), StandIn("second", second)
    ((first + second) * 5.0).sum().backward()
    (first * 2.0).sum().backward()
    assert torch.equal(first.grad, torch.full((3,), 7.0))
    assert torch.equal(second.grad, torch.full((3,), 5.0))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_backward_with_create_graph_replaces_it() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    parameter.grad = StandIn("it", parameter)
    (parameter**3).sum().backward(create_graph=True)
    gradient = parameter.grad
    assert torch.equal(gradient, torch.tensor([12.0, 27.0]))
    (second,) = torch.autograd.grad(gradient.sum(), parameter)
    assert torch.equal(second, torch.tensor([12.0, 18.0]))
    parameter.grad = None


def test_gradients_inside_no_sync_can_be_read_and_edited_there() -> None:
    model, optimizer = streamed()
    optimizer.step()
    with optimizer.no_sync():
        model(torch.ones(2, 4)).sum().backward()
        assert model.weight.grad is not None
        assert torch.equal(model.weight.grad, torch.full((3, 4), 2.0))


def test_sparse_gradients_leave_a_stand_in_and_replace_it() -> None:
    model = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = Adam(model.parameters(), 1e-2, use_offload=True, module=model)
    for _ in range(2):
        model(torch.tensor([1, 3])).sum().backward()
        assert type(model.weight.grad) is StandIn
        optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.total_norm == 2.0


def test_grad_set_to_none_after_its_gradient_has_left_is_an_error() -> None:
    model, optimizer = streamed()
    before = model.weight.detach().clone()
    model.zero_grad()
    with pytest.raises(ValueError, match=r"'(weight|bias)' was set to None.*optimizer.zero_grad"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def test_given_gradients_may_not_be_stand_ins() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = Adam(model.parameters(), 1e-2, module=model, use_offload=True)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(TypeError, match=r"is a stand-in.*without module="):
        optimizer(tuple(parameter.grad for parameter in optimizer.parameters))


def test_models_with_stand_ins_are_copied_moved_and_saved() -> None:
    model, optimizer = streamed()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.weight, model.weight)
    assert "'weight'" in repr(copy.deepcopy(model.weight.grad))
    torch.save(model, "/dev/null")
    torch.optim.swa_utils.AveragedModel(model)
    model.to("cpu")
    optimizer.step()
    model.bfloat16()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.bfloat16
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert type(model.weight.grad) is StandIn


def test_it_keeps_neither_optimizer_nor_model_alive_and_goes_on_close() -> None:
    model, optimizer = streamed()
    optimizer.close()
    assert model.weight.grad is None
    model, optimizer = streamed()
    stand_in = model.weight.grad
    gone = weakref.ref(optimizer), weakref.ref(model)
    del optimizer
    gc.collect()
    assert gone[0]() is None
    model(torch.ones(2, 4)).sum().backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((3, 4), 2.0))
    del model
    gc.collect()
    assert gone[1]() is None
    assert type(stand_in) is StandIn


def test_other_optimizers_over_other_parameters_are_unaffected() -> None:
    _, optimizer = streamed()
    other = torch.nn.Parameter(torch.ones(3))
    (other * 2.0).sum().backward()
    assert torch.nn.utils.clip_grad_norm_([other], 1.0) == pytest.approx(12.0**0.5)
    torch.optim.SGD([other], lr=1.0).step()
    expected = torch.full((3,), 1 - 1 / 3**0.5)
    assert torch.allclose(other.detach(), expected, atol=1e-6)
    optimizer.step()


COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "double()": lambda gradient: gradient.double(),
    "deepcopy": lambda gradient: copy.deepcopy(gradient),
    "detach() of a copy": lambda gradient: gradient.double().detach(),
}


@pytest.mark.parametrize("how", COPIES)
def test_multiplying_a_copy_does_not_change_the_update(how: str) -> None:
    """Logging code divides copies by the loss scale; the gradient itself stays."""
    (model, optimizer), (other, expected) = streamed(), streamed()
    copies = [COPIES[how](p.grad) for p in model.parameters() if p.grad is not None]
    norms = [float(gradient.norm()) for gradient in copies]
    with pytest.raises(StreamedGradientError):
        torch._foreach_div_(copies, 1000.0)
    assert norms == [float(p.grad.norm()) for p in other.parameters() if p.grad is not None]
    optimizer.step()
    expected.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("accumulate", [None, "host"])
def test_a_backward_after_the_models_zero_grad_is_an_error(accumulate: str | None) -> None:
    """It would add to gradients that the caller believes dropped."""
    model = torch.nn.Linear(4, 3)
    optimizer = OffloadAdam(model.parameters(), module=model, accumulate=accumulate)
    loss = model(torch.ones(2, 4)).square().sum()
    loss.backward(retain_graph=True)
    model.zero_grad()
    with pytest.raises(ValueError, match=r"'weight' was set to None, .* optimizer\.zero_grad\(\)"):
        (loss * 1e-3).backward(retain_graph=True)
    optimizer.zero_grad()
    (loss * 1e-3).backward(retain_graph=True)
    optimizer.step()
    assert optimizer.last_step is not None
    gradients = torch.autograd.grad(loss * 1e-3, list(model.parameters()))
    expected = torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in gradients]))
    assert optimizer.last_step.total_norm == pytest.approx(float(expected), rel=1e-5)


class FailsOnce(torch.autograd.Function):
    """A backward that raises at its first call, as one that runs out of memory."""

    has_failed = False

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if not FailsOnce.has_failed:
            FailsOnce.has_failed = True
            raise RuntimeError("out of memory")
        return gradient


def test_a_retry_after_a_failed_backward_and_the_models_zero_grad_is_an_error() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(first, second)
    optimizer = OffloadAdam(model.parameters(), module=model)
    fails_once: Any = FailsOnce.apply
    FailsOnce.has_failed = False
    with pytest.raises(RuntimeError, match="out of memory"):
        second(fails_once(first(torch.ones(2, 4)))).sum().backward()
    model.zero_grad()
    with pytest.raises(ValueError, match=r"was set to None, .* optimizer\.zero_grad\(\)"):
        second(fails_once(first(torch.ones(2, 4)))).sum().backward()
    optimizer.zero_grad()
    second(fails_once(first(torch.ones(2, 4)))).sum().backward()
    optimizer.step()


def test_the_models_zero_grad_with_zeros_works_after_the_step() -> None:
    model, optimizer = streamed()
    optimizer.step()
    model.zero_grad(set_to_none=False)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.clip_factor == 1.0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_is_compiled_again_while_stand_ins_are_there(backend: str) -> None:
    """A batch of another size compiles once more, and looks at every `.grad`."""
    torch._dynamo.reset()
    models = [streamed(), streamed()]
    forwards: list[Any] = [torch.compile(models[0][0], backend=backend), models[1][0]]
    for (model, optimizer), forward in zip(models, forwards, strict=True):
        optimizer.step()
        for batch in (2, 3):
            forward(torch.ones(batch, 4)).square().sum().backward()
            assert type(model.weight.grad) is StandIn
            optimizer.step()
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight)
    torch._dynamo.reset()
