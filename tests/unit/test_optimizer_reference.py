"""OffloadAdam against torch's plain single-tensor Adam in float64, element by element."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam, OffloadAdamW, OffloadPolicy
from offload_adam.gradients.stand_in import StandIn
from tests.support.scenario import Offloading

SHAPES = [(3, 5), (), (130,), (0, 4), (1,), (7, 64), (2, 3, 4, 5)]
NUM_STEPS = 12


def make_parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]
    last = parameters[-1].detach().to(memory_format=torch.channels_last)
    return [*parameters[:-1], torch.nn.Parameter(last)]


def master_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what the update works on: the master weight, or an fp32 parameter itself."""
    master: torch.Tensor = optimizer.state[parameter].get("master_weight", parameter)
    return master.detach()


MODES: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "l2": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.05},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "maximize_decoupled": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "betas": {"betas": (0.0, 0.5), "eps": 1e-3},
    "clipped": {"max_grad_norm": 0.7, "weight_decay": 0.1, "decoupled_weight_decay": True},
}


def torch_optimizer(
    parameters: list[torch.nn.Parameter], options: dict[str, Any], lr: float
) -> torch.optim.Optimizer:
    known = {k: v for k, v in options.items() if k not in ("max_grad_norm", "nesterov")}
    decoupled = known.pop("decoupled_weight_decay", False)
    maker = torch.optim.AdamW if decoupled else torch.optim.Adam
    known.setdefault("weight_decay", 0.0)
    return maker(parameters, lr=lr, foreach=False, **known)


@pytest.mark.parametrize("maker", [OffloadAdam, Offloading])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_modes_match_torch_in_float64(
    mode: str, dtype: torch.dtype, maker: type[OffloadAdam]
) -> None:
    lr = 1e-2
    options = MODES[mode]
    parameters = make_parameters(dtype)
    references = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = maker(parameters, lr=lr, offload=OffloadPolicy(bucket_nbytes=1024), **options)
    oracle = torch_optimizer(references, options, lr)
    generator = torch.Generator().manual_seed(5)
    for step in range(NUM_STEPS):
        for parameter, reference in zip(parameters, references, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = gradient.clone()
            reference.grad = gradient.double()
        optimizer.step()
        if "max_grad_norm" in options:
            norm = torch.nn.utils.clip_grad_norm_(references, options["max_grad_norm"])
            assert optimizer.last_step is not None
            assert optimizer.last_step.total_norm == pytest.approx(float(norm), rel=1e-12)
        oracle.step()
        for parameter, reference in zip(parameters, references, strict=True):
            _assert_close(optimizer, oracle, parameter, reference, lr, step + 1)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_adamw_matches_torchs_adamw_in_float64(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    parameters = make_parameters(dtype)
    references = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = OffloadAdamW(parameters, lr=1e-2, **options)
    oracle = torch.optim.AdamW(references, lr=1e-2, foreach=False, **options)
    generator = torch.Generator().manual_seed(5)
    for step in range(NUM_STEPS):
        for parameter, reference in zip(parameters, references, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = gradient.clone()
            reference.grad = gradient.double()
        optimizer.step()
        oracle.step()
        for parameter, reference in zip(parameters, references, strict=True):
            _assert_close(optimizer, oracle, parameter, reference, 1e-2, step + 1)


class Product(torch.autograd.Function):
    """The sum of weight * gradient, with an fp32 gradient for weights of any dtype."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return (weight.float() * gradient).sum()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * outer, None


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("is_set_late", [False, True])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, None], ids=str)
def test_gradients_of_another_dtype_match_torch_in_float64(
    grad_dtype: torch.dtype | None, is_set_late: bool, streams: bool
) -> None:
    parameters = make_parameters(torch.bfloat16)
    references = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    model = torch.nn.ParameterList(parameters)

    def allow() -> None:
        for parameter in parameters:
            parameter.grad_dtype = grad_dtype

    if not is_set_late:
        allow()
    optimizer = OffloadAdam(parameters, lr=1e-2, module=model if streams else None)
    if is_set_late:
        allow()
    oracle = torch.optim.Adam(references, lr=1e-2, foreach=False)
    generator = torch.Generator().manual_seed(5)
    for step in range(NUM_STEPS):
        for parameter, reference in zip(parameters, references, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator)
            product: Any = Product
            product.apply(parameter, gradient).backward()
            assert (type(parameter.grad) is StandIn) is streams
            reference.grad = gradient.to(grad_dtype or torch.float32).double()
        optimizer.step()
        oracle.step()
        for parameter, reference in zip(parameters, references, strict=True):
            _assert_close(optimizer, oracle, parameter, reference, 1e-2, step + 1)
        optimizer.zero_grad()


def test_offload_adamw_has_the_arguments_of_offload_adam() -> None:
    arguments = dict(inspect.signature(OffloadAdam).parameters)
    decoupled = dict(inspect.signature(OffloadAdamW).parameters)
    assert decoupled.pop("weight_decay").default == 1e-2
    for name in ("weight_decay", "decoupled_weight_decay"):
        del arguments[name]
    assert list(decoupled.items()) == list(arguments.items())


def _assert_close(
    optimizer: OffloadAdam,
    oracle: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    reference: torch.nn.Parameter,
    lr: float,
    steps: int,
) -> None:
    # Each step rounds the weight once (2**-24 of it) and computes a step of at most a few lr in a
    # dozen float32 operations (12 * 2**-24 of it); errors of earlier steps stay in the weight.
    ulp = 2.0**-24
    bound = steps * (ulp * (reference.abs() + 1.0) + 24 * ulp * 4 * lr)
    assert ((master_of(optimizer, parameter) - reference).abs() <= bound).all()
    expected = oracle.state[reference]
    assert optimizer.state[parameter]["step"] == expected["step"]
    # A moment is a weighted sum of `steps` terms, each rounded a few times, of size up to |g|.
    for key, scale in (("exp_avg", 8.0), ("exp_avg_sq", 64.0)):
        error = (optimizer.state[parameter][key] - expected[key]).abs()
        assert (error <= 8 * ulp * (expected[key].abs() + scale / 8)).all(), key
    # The parameter is its master weight, rounded to nearest even.
    assert torch.equal(parameter.detach(), master_of(optimizer, parameter).to(parameter.dtype))


@pytest.mark.parametrize("decoupled", [False, True])
def test_nesterov_matches_the_formula_in_float64(decoupled: bool) -> None:
    betas, lr, eps, decay = (0.9, 0.99), 1e-2, 1e-8, 0.1
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 130))
    w = parameter.detach().double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    optimizer = OffloadAdam(
        [parameter],
        lr,
        betas,
        eps,
        decay,
        nesterov=True,
        decoupled_weight_decay=decoupled,
    )
    generator = torch.Generator().manual_seed(2)
    for t in range(1, NUM_STEPS + 1):
        gradient = torch.randn(130, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double() + (0.0 if decoupled else decay) * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        numerator = betas[0] * m + (1 - betas[0]) * g
        m_hat = numerator / (1 - betas[0] ** t)
        w = w * (1 - lr * decay * decoupled) - lr * m_hat / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        assert (parameter.detach() - w).abs().max() < t * 2.0**-22


def test_dtypes_frozen_and_unused_parameters_mix_in_one_model() -> None:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 3
    parameters = [torch.nn.Parameter(torch.randn(50).to(dtype)) for dtype in dtypes]
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    unused = parameters[4]
    before = unused.detach().clone()
    masters = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    optimizer = OffloadAdam(
        [*parameters, frozen], lr=1e-2, offload=OffloadPolicy(bucket_nbytes=300)
    )
    oracle = torch.optim.Adam(masters, lr=1e-2, foreach=False)
    for _ in range(3):
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter is not unused:
                parameter.grad = torch.randn(50).to(parameter.dtype)
                master.grad = parameter.grad.double()
        optimizer.step()
        oracle.step()
    for parameter, master in zip(parameters, masters, strict=True):
        assert (master_of(optimizer, parameter) - master).abs().max() < 1e-6
    assert torch.equal(unused.detach(), before)
    assert optimizer.state[unused]["step"] == 0
    assert frozen not in optimizer.state
    assert torch.equal(frozen, torch.ones(3))


def test_each_parameter_counts_its_own_steps() -> None:
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    references = [torch.nn.Parameter(torch.ones(4).double()) for _ in range(2)]
    optimizer = OffloadAdam([first, second], lr=0.1)
    oracle = torch.optim.Adam(references, lr=0.1, foreach=False)
    for step in range(4):
        first.grad = torch.full((4,), 0.5 + step)
        references[0].grad = first.grad.double()
        second.grad = torch.full((4,), 2.0) if step % 2 else None
        references[1].grad = None if second.grad is None else second.grad.double()
        optimizer.step()
        oracle.step()
    assert optimizer.state[first]["step"] == 4
    assert optimizer.state[second]["step"] == 2
    for parameter, reference in zip((first, second), references, strict=True):
        assert (parameter - reference).abs().max() < 1e-6


def test_groups_and_schedulers_are_read_at_each_step() -> None:
    parameters = [torch.nn.Parameter(torch.ones(10)) for _ in range(2)]
    references = [torch.nn.Parameter(torch.ones(10).double()) for _ in range(2)]

    def groups(members: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": [members[0]], "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": [members[1]], "weight_decay": 0.3},
        ]

    optimizer = OffloadAdam(groups(parameters), lr=0.01)
    oracle = torch.optim.Adam(groups(references), lr=0.01, foreach=False)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step))
        for o in (optimizer, oracle)
    ]
    for step in range(5):
        for parameter, reference in zip(parameters, references, strict=True):
            parameter.grad = torch.full((10,), 0.1 * (step + 1))
            reference.grad = parameter.grad.double()
        optimizer.step()
        oracle.step()
        for schedule in schedules:
            schedule.step()
    for parameter, reference in zip(parameters, references, strict=True):
        assert (parameter - reference).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:num_threads=5 is more")
def test_bits_do_not_depend_on_buckets_threads_or_way_of_use() -> None:
    """Invariant 1: buckets, splits, threads, drop-in or streaming, in place or through copies."""
    results = []
    variants = itertools.product((300, 1 << 30), (1, 2, 5), (False, True), (False, True))
    for bucket_nbytes, num_threads, streams, offloads in variants:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(33, 70), torch.nn.Tanh(), torch.nn.Linear(70, 3)
        ).bfloat16()
        optimizer = (Offloading if offloads else OffloadAdam)(
            model.parameters(),
            lr=1e-2,
            max_grad_norm=0.1,
            offload=OffloadPolicy(bucket_nbytes=bucket_nbytes),
            num_threads=num_threads,
            module=model if streams else None,
            overlap=False,
        )
        for _ in range(4):
            model(torch.randn(5, 33).bfloat16()).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([optimizer.state[p]["master_weight"].clone() for p in model.parameters()])
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)
